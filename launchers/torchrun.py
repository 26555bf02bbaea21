"""`torchrun` with exit codes that mean something: `python -m launchers.torchrun [OPTIONS] -m finetune.train ...`.

It is torch's own agent (torch.distributed.run) in all but four things, which a job's script relies on: the exit
code is the workers', signals are passed on to the workers and waited for, a failure on one node ends the job on all
of them in bounded time, and one line says which rank failed first, and how.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from finetune import INTERRUPTED, PEER_LOST, STOPPED, UserError, first_line, run_cli, say_at_once

DESCRIPTION = """\
torchrun, with these differences:

exit code   the workers' own: 0 when all are well, 75 (stopped by a signal after saving: the same command goes on),
            69 (another rank died or hung), 2 (a mistake that a retry does not mend), 128+N for a worker killed by
            signal N. When workers differ: 2, else 75, else that of the first to fail, and 69 last.
signals     SIGUSR1, SIGUSR2, SIGTERM, SIGINT and SIGHUP are passed on to each worker, each time that they come;
            then the launcher waits until the workers have ended, however long they save.
failures    one line names the rank and host that failed first. The other nodes are told, and end as well: workers
            have --grace seconds to end by themselves (SIGTERM after half of it, then SIGKILL).
network     with several nodes, gloo and the rendezvous use the interface that leads to --rdzv-endpoint (or
            --master-addr), unless GLOO_SOCKET_IFNAME, --local-addr and --rdzv-conf is_host=... say otherwise.
restarts    --max-restarts is as in torchrun, but after exit codes 2, 75 and 130 nothing is restarted.
orphans     workers are killed when the launcher is.
"""
EXAMPLES = """\
examples:
  python -m launchers.torchrun --nproc-per-node 8 -m finetune.train experiment=NAME data.shards=LATENTS
  python -m launchers.torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    --rdzv-id JOB -m finetune.train strategy=zero2 ...
"""

_MISTAKE = 2
_FINAL = (_MISTAKE, STOPPED, INTERRUPTED)  # codes after which a restart helps nobody
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_UNREACHABLE_SECONDS = 120.0  # without an answer from the other nodes, before local workers are ended
_LAST_WORD_SECONDS = 2.0
_KEY = "launchers.torchrun/failed"
# Run by each worker before it becomes the program: it is to die with the agent, which may have died already.
_TIE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Failure:
    """Which rank failed, where and how. `code` is what a shell would say: 128+N for signal N."""

    rank: int
    host: str
    code: int

    def __str__(self) -> str:
        if self.rank < 0:
            return f"{self.host} does not answer any more"
        if self.code == PEER_LOST:
            return f"rank {self.rank} on {self.host} has lost another rank, see its own line: exit code {PEER_LOST}"
        where = f"rank {self.rank} on {self.host} failed first"
        if self.code == 128 + signal.SIGKILL:
            return f"{where}: killed by SIGKILL (without a hand in it: by the kernel, for want of memory)"
        if self.code > 128:
            with contextlib.suppress(ValueError):
                return f"{where}: killed by {signal.Signals(self.code - 128).name}"
        return f"{where}: exit code {self.code}"


def verdict(codes: Sequence[int]) -> int:
    """The exit code of all from those of the workers, in the order in which they ended.

    A mistake is a mistake whatever else happened, and a run that was asked to stop is to be started again; else the
    first failure is the cause, and ranks that lost their peers are its witnesses.
    """
    failed = [code for code in codes if code]
    for code in (_MISTAKE, STOPPED, INTERRUPTED):
        if code in failed:
            return code
    return next((code for code in failed if code != PEER_LOST), PEER_LOST if failed else 0)


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
        self._handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.install()
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def install(self) -> None:
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
                _say(f"{signal.Signals(number).name} before the workers had started: nothing to save")
                os._exit(_asked_code(number))
            for process in self.workers.values():
                process.send_signal(number)


def _noted(number: int, frame: FrameType | None) -> None:
    """Python's handler: the thread has the number already."""


def _asked_code(number: int) -> int:
    return STOPPED if number in (signal.SIGUSR1, signal.SIGTERM) else 128 + number


def _say(line: str) -> None:
    say_at_once(f"launchers.torchrun: {line}\n")


def make_agent(base: type, signals: Signals, grace: float) -> type:
    """torch's agent class `base` with the differences that the module names; imported late for a quick `--help`."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerState

    class Agent(base):  # type: ignore[misc, valid-type]
        """Attributes: `current`, the agent that runs; `codes` by rank in order of ending; `failure`, the first."""

        current: Agent | None = None

        def __init__(self, spec: Any, *args: Any, **kwargs: Any) -> None:
            if not isinstance(spec.entrypoint, str):
                raise UserError("--run-path runs the script inside the launcher's own processes: leave it out")
            spec.args = ("-I", "-c", _TIE, str(os.getpid()), spec.entrypoint, *spec.args)
            spec.entrypoint = sys.executable
            super().__init__(spec, *args, **kwargs)
            self.codes: dict[int, int] = {}
            self.failure: Failure | None = None
            self._ended: set[int] = set()
            self._signalled: set[int] = set()  # local ranks that we have told to end: their codes say nothing
            self._failed_at: float | None = None  # on the monotonic clock, like the next
            self._all_ended_at: float | None = None
            self._others = _Others(spec.rdzv_handler, lambda: self._store)
            # A store that blocks must not keep the agent from looking after its own workers.
            spec.rdzv_handler.num_nodes_waiting = lambda: self._others.waiting
            type(self).current = self

        @property
        def _processes(self) -> dict[int, Any]:
            return {rank: handler.proc for rank, handler in self._pcontext.subprocess_handlers.items()}

        def _initialize_workers(self, worker_group: Any) -> None:
            with signals.lock:
                signals.workers = None
            super()._initialize_workers(worker_group)

        def _rendezvous(self, worker_group: Any) -> None:
            super()._rendezvous(worker_group)
            # A name of this attempt for the workers' keys in the store: each node counts restarts for itself.
            key = f"launchers.torchrun/round/{self._attempt if self._is_static() else ''}"
            os.environ["LAUNCHERS_ROUND"] = self._store.compare_set(key, "", uuid.uuid4().hex).decode()

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            self.codes, self.failure, self._failed_at, self._all_ended_at = {}, None, None, None
            self._ended, self._signalled = set(), set()
            with signals.lock:
                try:
                    return super()._start_workers(worker_group)
                finally:
                    signals.install()  # torch has put its own handlers in place
                    signals.workers = self._processes if self._pcontext is not None else None
                    self._others.watch(f"{_KEY}/{self._attempt if self._is_static() else ''}")

        @property
        def _attempt(self) -> int:
            return self._worker_group.spec.max_restarts - self._remaining_restarts

        def _is_static(self) -> bool:
            return self._worker_group.spec.rdzv_handler.get_backend() == "static"

        def _monitor_workers(self, worker_group: Any) -> Any:
            self._note_ends(worker_group)
            if self._waits_for_others():
                return RunResult(state=WorkerState.HEALTHY)
            if {*self.codes.values()} & {*_FINAL} or (self.failure and self.failure.code in _FINAL):
                self._remaining_restarts = 0
            if self.failure is not None:
                self._exit_barrier_timeout = 1  # there is nobody to wait for
            return super()._monitor_workers(worker_group)

        def _note_ends(self, worker_group: Any) -> None:
            for local_rank, process in self._processes.items():
                code = process.poll()
                if code is None or local_rank in self._ended:
                    continue
                self._ended.add(local_rank)
                if local_rank in self._signalled:
                    continue
                rank = worker_group.workers[local_rank].global_rank
                self.codes[rank] = (
                    _asked_code(-code) if -code in signals.asked else code if code >= 0 else 128 - code
                )
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
                _say(str(failure))

        def _waits_for_others(self) -> bool:
            """Whether workers that run are given time, and what is done when it is over."""
            if (told := self._others.failure()) is not None:
                self._take(told, ours=False)
            running = {rank: process for rank, process in self._processes.items() if rank not in self._ended}
            now = time.monotonic()
            if not running:
                if self._all_ended_at is None:
                    self._all_ended_at = now
                # All that was lost may have been on another node, whose agent is about to say what it was.
                hears_more = (
                    self._worker_group.group_world_size > 1 and now - self._all_ended_at < _LAST_WORD_SECONDS
                )
                if self.failure is None or self.failure.code != PEER_LOST:
                    return False
                if not hears_more:
                    _say(str(self.failure))
                return hears_more
            if self.failure is None:
                return True  # torch's own look, which may be the first to see an end, knows no exit codes
            if self._failed_at is None:
                self._failed_at = now
            waited = now - self._failed_at
            for local_rank, process in running.items():
                if waited > grace / 2 and local_rank not in self._signalled:
                    self._signalled.add(local_rank)
                    process.terminate()
                if waited > grace:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            return True

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
            timer = threading.Timer(10, lambda: os._exit(self.exit_code()))
            timer.daemon = True
            timer.start()

    return Agent


class _Others:
    """What the agents of the other nodes say, asked for in a thread: who failed, who waits to join.

    Attributes:
        waiting: number of nodes that wait to join, as torch's agent asks for it.
    """

    def __init__(self, handler: Any, store: Any) -> None:
        self.waiting = 0
        self._num_nodes_waiting, self._store = handler.num_nodes_waiting, store
        self._key: str | None = None
        self._telling: Failure | None = None
        self._told: Failure | None = None
        self._heard = time.monotonic()
        self._stopped = False
        self._wake = threading.Event()
        self._endpoint = str(os.environ.get("MASTER_ADDR", "the node that holds the store"))
        self._thread = threading.Thread(target=self._ask, name="others", daemon=True)

    def watch(self, key: str) -> None:
        """Go by what is under `key` of the present store."""
        self._key, self._telling, self._told, self._heard, self.waiting = key, None, None, time.monotonic(), 0
        if not self._thread.is_alive():
            self._thread.start()

    def tell(self, failure: Failure) -> None:
        self._telling = failure
        self._wake.set()

    def failure(self) -> Failure | None:
        """The first one that any node told of, or that the store is gone."""
        if self._told is None and time.monotonic() - self._heard > _UNREACHABLE_SECONDS:
            return Failure(-1, "the node that holds the rendezvous store", PEER_LOST)
        return self._told

    def stop(self) -> None:
        """Say what is left to say, for two seconds at most."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(2)

    def _ask(self) -> None:
        while True:
            key, store, telling, stopped = self._key, self._store(), self._telling, self._stopped
            with contextlib.suppress(Exception):  # a store that is gone: `failure` counts the seconds
                if telling is not None:
                    text = json.dumps([telling.rank, telling.host, telling.code])
                    if telling.code == PEER_LOST:  # a witness: what is there already says more
                        store.compare_set(key, "", text)
                    else:
                        store.set(key, text)
                    self._telling = None
                elif store.check([key]):
                    told = Failure(*json.loads(store.get(key)))
                    if key == self._key:
                        self._told = told
                if not stopped:
                    self.waiting = self._num_nodes_waiting()
                self._heard = time.monotonic()
            if stopped:
                return
            self._wake.wait(1)
            self._wake.clear()


def main(argv: Sequence[str]) -> int:
    """Launch, wait, and return the workers' exit code."""
    signals = Signals()  # before torch's import, which takes seconds
    chatty = "LOGLEVEL" in os.environ
    cpp_level = os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "INFO" if chatty else "ERROR")
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api as launcher

    if not chatty and cpp_level == "ERROR":
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the agent's alone
    args = parse(torchrun.get_args_parser(), argv)
    find_way(args)
    if not chatty:
        logging.disable(logging.ERROR)  # our line says it
    api: Any = launcher  # whose class of agents we put in place
    api.LocalElasticAgent = make_agent(api.LocalElasticAgent, signals, args.grace)
    try:
        torchrun.run(args)
    except ChildFailedError:
        pass
    except UserError:
        raise
    except Exception as error:
        agent = api.LocalElasticAgent.current
        if agent is None and isinstance(error, (ValueError, AssertionError)):
            raise UserError(first_line(error)) from None
        code = PEER_LOST if agent is None else agent.exit_code()
        if code in (0, PEER_LOST):
            _say(
                f"the nodes have not come together, or lost each other: {type(error).__name__}: {first_line(error)}"
            )
        if agent is not None:
            agent.end_soon()
        return code or PEER_LOST
    return api.LocalElasticAgent.current.exit_code()


def find_way(args: Any) -> None:
    """Settle by which address and interface this node meets the others, as far as the user has not.

    torch and gloo go by the machine's own name, which on many machines leads to the loopback interface or nowhere.
    """
    endpoint = args.rdzv_endpoint or (args.master_addr if args.rdzv_backend == "static" else "")
    if args.nnodes in ("1", "1:1") or args.standalone or not endpoint:
        return
    host = endpoint.rsplit(":", 1)[0] if endpoint.count(":") == 1 else endpoint
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: the kernel chooses the way
            ours, theirs = probe.getsockname()[0], probe.getpeername()[0]
            names = [name for _, name in socket.if_nameindex() if _address_of(probe, name) == ours]
    except OSError:
        return  # torch says what is wrong with the name
    if ours.startswith("127."):
        return
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
    args.local_addr = args.local_addr or ours
    if args.rdzv_backend == "c10d" and "is_host" not in args.rdzv_conf:
        from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

        guess = None
        with contextlib.suppress(OSError):  # the machine's own name means nothing to it
            guess = _matches_machine_hostname(host)
        # Where torch guesses right it is left to: of two launchers on one machine the second then becomes a guest.
        if (ours == theirs) != guess:
            settings = [args.rdzv_conf] if args.rdzv_conf else []
            args.rdzv_conf = ",".join([*settings, f"is_host={int(ours == theirs)}"])


def _address_of(probe: socket.socket, name: str) -> str:
    """The IPv4 address of a network interface, or nothing."""
    with contextlib.suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(answer[20:24])
    return ""


def parse(parser: Any, argv: Sequence[str]) -> Any:
    """torchrun's options and ours.

    Raises:
        SystemExit: help was asked for, or an option is wrong.
    """
    import argparse

    parser.prog, parser.usage = "python -m launchers.torchrun", "%(prog)s [OPTIONS] -m finetune.train KEY=VALUE ..."
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="After a rank has failed, the time that the others have to end by themselves (default 30).",
    )
    args = parser.parse_args(argv)
    if args.grace < 0:
        parser.error(f"--grace {args.grace:g} is negative: give seconds")
    if hasattr(args, "signals_to_handle"):
        args.signals_to_handle = "SIGQUIT"  # the others are ours
    return args


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
