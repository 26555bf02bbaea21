"""torch's agent, with the differences that `python -m launchers.torchrun --help` names."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from finetune import INTERRUPTED, PEER_LOST, STOPPED, UserError
from launchers.torchrun.failures import FINAL, Failure, code_of, say, verdict
from launchers.torchrun.others import Others
from launchers.torchrun.signals import Signals

_LAST_WORD_SECONDS = 2.0
_GOODBYE_SECONDS = 10.0
_KEY = "launchers.torchrun"  # what our keys in the agents' common store begin with
# Run by each worker before it becomes the program: it is to die with the agent, which may have died already.
_TIE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


class Agent(LocalElasticAgent):
    """Looks after the workers of this node.

    Args:
        signals: which pass on what this process is sent.
        grace: seconds that workers have to end by themselves after a failure; SIGTERM comes at half of it.
        spec, args, kwargs: torch's own.

    Attributes:
        codes: exit codes by rank, in the order of ending.
        failure: the first, on any node.

    Raises:
        UserError: the workers would not be processes of their own.
    """

    # torch's, which leaves their types open
    _store: Any
    _pcontext: Any
    _worker_group: Any

    def __init__(self, spec: Any, *args: Any, signals: Signals, grace: float, **kwargs: Any) -> None:
        if not isinstance(spec.entrypoint, str):
            raise UserError("--run-path runs the script inside the launcher's own processes: leave it out")
        spec.args = ("-I", "-c", _TIE, str(os.getpid()), spec.entrypoint, *spec.args)
        spec.entrypoint = sys.executable
        super().__init__(spec, *args, **kwargs)
        self._signals, self._grace = signals, grace
        self._forget()
        self._others = Others(spec.rdzv_handler, lambda: self._store)
        # A store that blocks must not keep the agent from looking after its own workers.
        spec.rdzv_handler.num_nodes_waiting = lambda: self._others.waiting

    def _forget(self) -> None:
        """Begin an attempt."""
        self.codes: dict[int, int] = {}
        self.failure: Failure | None = None
        self._ended: set[int] = set()  # local ranks, as are the next
        self._signalled: set[int] = set()  # that we have told to end: their codes say nothing
        self._failed_at: float | None = None  # on the monotonic clock, like the next
        self._all_ended_at: float | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        result = super().run(*args, **kwargs)
        self.end_soon()
        return result

    def exit_code(self) -> int:
        """Of the workers that have ended, wherever they ran."""
        told = [] if self.failure is None else [self.failure.code]
        return verdict([*self.codes.values(), *told])

    def end_soon(self) -> None:
        """Leave in bounded time, though the goodbye to a store whose machine is gone may block."""
        self._others.stop()
        timer = threading.Timer(_GOODBYE_SECONDS, lambda: os._exit(self.exit_code()))
        timer.daemon = True
        timer.start()

    # what torch calls at a start

    def _initialize_workers(self, worker_group: Any) -> None:
        with self._signals.lock:
            self._signals.workers = None
        super()._initialize_workers(worker_group)

    def _rendezvous(self, worker_group: Any) -> None:
        super()._rendezvous(worker_group)
        # A name of this attempt for the workers' keys in the store.
        name = self._store.compare_set(f"{_KEY}/round/{self._shared_attempt}", "", uuid.uuid4().hex)
        os.environ["LAUNCHERS_ROUND"] = name.decode()

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        self._forget()
        with self._signals.lock:
            try:
                return super()._start_workers(worker_group)
            finally:
                self._signals.install()  # torch has put its own handlers in place
                self._signals.workers = self._processes if self._pcontext is not None else None
                self._others.watch(f"{_KEY}/failed/{self._shared_attempt}")

    @property
    def _shared_attempt(self) -> str:
        """The attempt's number where one store serves all of them, as in static rendezvous.

        c10d gives each a store of its own, while nodes that joined later have counted fewer.
        """
        spec = self._worker_group.spec
        is_static = spec.rdzv_handler.get_backend() == "static"
        return str(spec.max_restarts - self._remaining_restarts) if is_static else ""

    # what torch calls again and again

    def _monitor_workers(self, worker_group: Any) -> Any:
        self._note_ends(worker_group)
        if self._is_waiting():
            return RunResult(state=WorkerState.HEALTHY)
        if {*self.codes.values()} & {*FINAL} or (self.failure and self.failure.code in FINAL):
            self._remaining_restarts = 0
        if self.failure is not None:
            self._exit_barrier_timeout = 1  # there is nobody to wait for
        return super()._monitor_workers(worker_group)

    @property
    def _processes(self) -> dict[int, Any]:
        """By local rank."""
        return {rank: handler.proc for rank, handler in self._pcontext.subprocess_handlers.items()}

    def _note_ends(self, worker_group: Any) -> None:
        """Take in which workers have ended since the last look, and how."""
        for local_rank, process in self._processes.items():
            returncode = process.poll()
            if returncode is None or local_rank in self._ended:
                continue
            self._ended.add(local_rank)
            if local_rank not in self._signalled:
                rank = worker_group.workers[local_rank].global_rank
                self.codes[rank] = code_of(returncode, self._signals.asked)
        code = verdict(list(self.codes.values()))
        if code not in (0, STOPPED, INTERRUPTED):
            rank = next(rank for rank, its in self.codes.items() if its == code)
            self._take(Failure(rank, socket.gethostname(), code), ours=True)

    def _take(self, failure: Failure, *, ours: bool) -> None:
        """Take in the first failure, or the first that is more than a witness of another."""
        if self.failure is not None and (self.failure.code != PEER_LOST or failure.code == PEER_LOST):
            return
        self.failure = failure
        if ours:
            self._others.tell(failure)
        if failure.code != PEER_LOST or failure.rank < 0:
            say(str(failure))

    def _is_waiting(self) -> bool:
        """Whether workers still have time, or other nodes something to say."""
        if (told := self._others.failure()) is not None:
            self._take(told, ours=False)
        running = {rank: process for rank, process in self._processes.items() if rank not in self._ended}
        if not running:
            return self._awaits_last_word()
        if self.failure is not None:
            self._press(running)
        return True  # torch's own look, which may be the first to see an end, knows no exit codes

    def _awaits_last_word(self) -> bool:
        """All that was lost may have been on another node, whose agent is about to say what it was."""
        now = time.monotonic()
        if self._all_ended_at is None:
            self._all_ended_at = now
        if self.failure is None or self.failure.code != PEER_LOST:
            return False
        if self._worker_group.group_world_size > 1 and now - self._all_ended_at < _LAST_WORD_SECONDS:
            return True
        say(str(self.failure))
        return False

    def _press(self, running: Mapping[int, Any]) -> None:
        """End workers that go on after a failure: not at once, for they may end by themselves."""
        now = time.monotonic()
        if self._failed_at is None:
            self._failed_at = now
        waited = now - self._failed_at
        for local_rank, process in running.items():
            if waited > self._grace / 2 and local_rank not in self._signalled:
                self._signalled.add(local_rank)
                process.terminate()
            if waited > self._grace:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
