"""Signals to the launcher, passed on to its workers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

from launchers.torchrun.failures import asked_code, say

_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """Passes signals on from a thread, since the agent's main thread may be blocked in a store."""

    def __init__(self) -> None:
        self.asked: set[int] = set()
        self.workers: Mapping[int, Any] | None = None  # processes by local rank; None before they have started
        self.lock = threading.Lock()  # held while workers are started
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # What nohup or a shell's background job ignores stays ignored.
        self._handled = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
        self.install()
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def install(self) -> None:
        """Take the signals, also from handlers that were put in place meanwhile."""
        for number in self._handled:
            signal.signal(number, _noted)

    def _read(self, reader: int) -> None:
        while data := os.read(reader, 64):
            for number in data:
                if number in self._handled:
                    self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        with self.lock:
            self.asked.add(number)
            if self.workers is None:
                say(f"{signal.Signals(number).name} before the workers had started: nothing to save")
                os._exit(asked_code(number))
            for process in self.workers.values():
                process.send_signal(number)


def _noted(number: int, frame: FrameType | None) -> None:
    """Python's handler: the thread has the number already."""
