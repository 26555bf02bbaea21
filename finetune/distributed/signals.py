"""Being asked to stop: SIGUSR1, SIGTERM and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

from finetune import STOPPED, say_at_once

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# A launcher, the job's script and the scheduler may all pass on one signal; the script asks Slurm first.
_ONE_REQUEST_SECONDS = {signal.SIGUSR1: 5.0, signal.SIGTERM: 5.0, signal.SIGINT: 1.0}


class StopRequest:
    """Notes the first signal; inside its `with` block the training loop asks for `number`, and stops by itself.

    A second one ends the process at once, and so does the first before `can_save` is set: there is nothing to keep.
    Signals are read by a thread, since Python's own handlers wait until the main thread comes back from a blocked
    collective.

    Attributes:
        number: of the first signal; 0 for none.
        can_save: the run has come so far that stopping means saving.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.number, self.can_save = rank, 0, False

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, _noted) for number in STOP_SIGNALS}
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def exit_code(self, number: int) -> int:
        """Of a process that a signal has stopped."""
        return 128 + signal.SIGINT if number == signal.SIGINT else STOPPED

    def _read(self) -> None:
        first = 0.0
        while data := os.read(self._reader, 64):
            for number in data:
                if number not in STOP_SIGNALS:
                    continue
                name = signal.Signals(number).name
                if not self.number:
                    self.number, first = number, time.monotonic()
                    if self.can_save:
                        later = (
                            f"once more, {_ONE_REQUEST_SECONDS[signal.Signals(number)]:g} s from now, stops at once"
                        )
                        self._say(f"{name}: stopping after this step with a checkpoint; {later}")
                        continue
                elif time.monotonic() - first < _ONE_REQUEST_SECONDS[signal.Signals(number)]:
                    continue
                else:
                    self._say(f"{name} once more: stopping at once; the last whole checkpoint stays")
                os._exit(self.exit_code(number))

    def _say(self, line: str) -> None:
        say_at_once(f"\n[rank {self.rank}] {line}\n")


def _noted(number: int, frame: FrameType | None) -> None:
    """Python's handler: the thread has the number already."""
