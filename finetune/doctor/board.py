"""What ranks tell each other without collectives, and a watch that ends what hangs.

Ranks post the outcome of each phase in torch's key-value store and read those of the others. A thread of each rank
beats in that store and looks at it: a rank that is silent, a phase that takes too long or a rank that failed inside
a collective which the others still wait in ends the doctor with a row that names the rank. Nothing here waits for a
collective, so it works when those don't.
"""

from __future__ import annotations

import datetime
import itertools
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from finetune import UserError, first_line, is_by_all
from finetune.data.shards.store import StoreAwayError
from finetune.doctor.table import FAIL, Row
from finetune.terminal import ranks_text

TICK_S = 1.0  # between two beats
SILENT_S = 30.0  # without a beat a rank is dead; loading a model holds Python's lock for seconds
QUIET_S = 4.5  # the same, once there is a reason to think so
GRACE_S = 10.0  # for ranks in a collective that another has left with an error, to come back by themselves
JOIN_S = 120.0
_RUNS = itertools.count()  # the doctor may run several times in one process group


@dataclass(frozen=True)
class Outcome:
    """What one rank's part of a phase gave: a value, or an error's line (`memory`: there was too little)."""

    value: Any = None
    error: str | None = None
    memory: bool = False


@dataclass(frozen=True)
class _Phase:
    number: int
    name: str
    ends: float  # of time.monotonic
    limit_s: float
    collective: bool


class Board:
    """The ranks' common board, inside its `with` block.

    Args:
        rank, size: as the environment says.
        host: of this rank, for messages.
        on_break: called on one rank, in the watching thread, with the row that tells why the doctor can't go on;
            the processes end after it.
    """

    def __init__(self, rank: int, size: int, host: str, on_break: Callable[[Row], None]) -> None:
        self.rank, self.size, self.on_break = rank, size, on_break
        self.hosts = [host]
        self._host = host
        self._store: Any = None
        self._thread_store: Any = None
        self._phase: _Phase | None = None
        self._inside = False
        self._numbers = itertools.count()
        attempt = os.environ.get("LAUNCHERS_ROUND") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"doctor/{attempt}/{next(_RUNS)}"
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._beat_number = 0
        self._signal = 0
        self._signalled = self._error_since = 0.0
        self._main = threading.get_ident()

    def __enter__(self) -> Board:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # Python's own handlers wait until the main thread comes back from a blocked collective; this pipe doesn't.
        self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._old_handler = signal.signal(signal.SIGTERM, _noted)
        self._begin("start", JOIN_S, collective=False)
        self._thread = threading.Thread(target=self._watch, name="doctor", daemon=True)
        self._thread.start()
        if self.size > 1:
            self._meet()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._store is not None and isinstance(error, Exception) and not is_by_all(error):
            traceback.print_exception(error)
            said = f"rank {self.rank} on {self._host}: {type(error).__name__}: {first_line(error)[:200]}"
            row = Row(self._name, FAIL, said, "look at what that rank said")
            self._store.set(self._key("broken"), pickle.dumps(row))
            self._thread.join()  # which ends this process with the others
        if self._store is not None:
            self._leave()
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)
        signal.set_wakeup_fd(self._old_fd)
        signal.signal(signal.SIGTERM, self._old_handler)

    def exchange(
        self, name: str, function: Callable[[], Any], *, limit_s: float, collective: bool = False
    ) -> list[Outcome]:
        """Run `function` on every rank; every rank's outcome, in order of rank, on every rank.

        Args:
            name: for messages.
            limit_s: seconds until the doctor ends, with the ranks that have not come back.
            collective: ranks wait for each other inside: one that fails there keeps the others waiting.
        """
        phase = self._begin(name, limit_s, collective)
        self._inside = True
        outcome = attempt(function)
        self._inside = False
        if self._store is None:
            return [outcome]
        self._store.set(self._key(f"{phase.number}/{self.rank}"), pickle.dumps(outcome))
        if outcome.error is not None:
            self._store.set(self._key(f"{phase.number}/failed"), "1")
        keys = [self._key(f"{phase.number}/{rank}") for rank in range(self.size)]
        pause = 0.005
        while not self._store.check(keys):  # for ever: the thread keeps the time
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)
        outcomes = [pickle.loads(data) for data in self._store.multi_get(keys)]
        self._begin(f"after {name}", limit_s + JOIN_S, collective=False)
        return outcomes

    def _begin(self, name: str, limit_s: float, collective: bool) -> _Phase:
        phase = _Phase(next(self._numbers), name, time.monotonic() + limit_s, limit_s, collective)
        self._error_since = 0.0
        self._phase = phase
        return phase

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _meet(self) -> None:
        """Connect, take this rank's seat, and wait until all seats are taken."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if not address or not port:
            raise UserError(
                f"WORLD_SIZE={self.size}, but MASTER_ADDR and MASTER_PORT are not set: start through torchrun, "
                "accelerate launch or launchers/"
            )
        opens_it = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            ends = time.monotonic() + JOIN_S / 2
            while not opens_it and not _answers(address, int(port), time.monotonic() > ends):
                time.sleep(0.5)
            # `multi_tenant`: torch.distributed finds this same store when it starts on the same port.
            store: Any = dist.TCPStore(
                address,
                int(port),
                self.size,
                is_master=opens_it,
                timeout=datetime.timedelta(seconds=JOIN_S / 2),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except Exception as error:
            self._end(
                Row(
                    "ranks",
                    FAIL,
                    f"rank {self.rank} on {self._host} cannot reach MASTER_ADDR:MASTER_PORT {address}:{port} "
                    f"({first_line(error)[:200]})",
                    "see that rank 0 runs on that address and that no firewall stands between; NCCL_SOCKET_IFNAME "
                    "and GLOO_SOCKET_IFNAME choose the network",
                ),
                alone=True,
            )
        store.set(self._key(f"beat/{self.rank}"), "0")
        store.set(self._key(f"host/{self.rank}"), self._host)
        taken = store.add(self._key(f"seat/{self.rank}"), 1)
        if taken > 1:
            store.set(
                self._key("broken"),
                pickle.dumps(
                    Row(
                        "ranks",
                        FAIL,
                        f"{taken} processes say that they are rank {self.rank} of {self.size}, one on {self._host}",
                        "each process must have its own RANK: let torchrun, accelerate or launchers/ set it",
                    )
                ),
            )
        self._thread_store = store.clone()
        keys = [self._key(f"{kind}/{rank}") for kind in ("host", "seat") for rank in range(self.size)]
        while not store.check(keys):
            time.sleep(0.05)
        self.hosts = [host.decode() for host in store.multi_get(keys[: self.size])]
        self._store = store

    def _leave(self) -> None:
        """Rank 0 may hold the store: it leaves last."""
        try:
            self._store.set(self._key(f"bye/{self.rank}"), "1")
            ends = time.monotonic() + 10
            keys = [self._key(f"bye/{rank}") for rank in range(self.size)]
            while self.rank == 0 and not self._store.check(keys) and time.monotonic() < ends:
                time.sleep(0.02)
        except RuntimeError:
            pass  # it is gone, and so is the need for it

    # --- the watching thread ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], TICK_S)
            if ready:
                numbers = os.read(self._reader, 64)
                if not numbers:
                    return
                if signal.SIGTERM in numbers and not self._signal:
                    self._signal, self._signalled = signal.SIGTERM, time.monotonic()
            try:
                row = self._judge()
            except RuntimeError as error:  # the store's
                row = Row(
                    self._name,
                    FAIL,
                    f"rank {self.rank} on {self._host} has lost "
                    f"the launcher's store during {self._name}: rank 0 or the launcher has died "
                    f"({first_line(error)[:120]})",
                    "look for the first error in the launcher's log",
                )
                self._end(row, alone=True)
            if row is not None:
                self._end(row)

    @property
    def _name(self) -> str:
        return self._phase.name if self._phase else "start"

    def _judge(self) -> Row | None:
        """Why the doctor can't go on, or None."""
        phase, store = self._phase, self._thread_store
        assert phase is not None
        now = time.monotonic()
        silent: list[int] = []
        if store is not None:
            self._beat()
            if store.check([self._key("broken")]):
                return pickle.loads(store.get(self._key("broken")))
            suspected = self._signal or self._error_since
            silent = self._silent(QUIET_S if suspected else SILENT_S)
        if self._signal and (store is None or silent or now - self._signalled > 2 * QUIET_S):
            died = f"; {self._named(silent)} had died before" if silent else ""
            if phase.name == "start" and (missing := self._missing()):
                died = f"; {ranks_text(missing)} of {self.size} had not come"
            return Row(
                phase.name,
                FAIL,
                f"ended by {signal.Signals(self._signal).name} during {phase.name}{died}",
                "look at what that rank said last, and at its machine's log (dmesg: out of memory, a GPU's Xid)"
                if silent
                else "someone or a time limit stopped it: start it again",
            )
        if silent:
            return Row(
                phase.name,
                FAIL,
                f"{self._named(silent)} died during {phase.name}: no sign of life",
                "look at what it said last, and at its machine's log (dmesg: out of memory, a GPU's Xid, no power)",
            )
        if phase.collective and store is not None and self._inside:
            failed: dict[int, str] = {}
            if store.check([self._key(f"{phase.number}/failed")]):
                for rank in range(self.size):
                    key = self._key(f"{phase.number}/{rank}")
                    outcome = pickle.loads(store.get(key)) if store.check([key]) else Outcome()
                    if outcome.error is not None:
                        failed[rank] = outcome.error
            if failed:
                self._error_since = self._error_since or now
                if now - self._error_since > GRACE_S:
                    said = "; ".join(f"{self._named([rank])}: {error}" for rank, error in failed.items())
                    return Row(phase.name, FAIL, f"{said}; the others wait for it", "mend what that rank says")
        if now > phase.ends:
            return self._late(phase)
        return None

    def _late(self, phase: _Phase) -> Row:
        """The row of a phase that took too long, with where each rank stands."""
        remedy = "look at those ranks' machines, files and network; GPU: NCCL_DEBUG=INFO tells where NCCL waits"
        text = f"{phase.name} took more than {phase.limit_s:.0f} s"
        place = self._place()
        store = self._thread_store
        if store is None:
            if self.size > 1:
                return Row(phase.name, FAIL, f"{text}: rank {self.rank} stands in {place}", remedy)
            return Row(phase.name, FAIL, f"{text}: it stands in {place}", remedy)
        if phase.name == "start":
            missing = ranks_text(self._missing())
            return Row("ranks", FAIL, f"{text}: {missing} of {self.size} never came", remedy)
        store.set(self._key(f"where/{phase.number}/{self.rank}"), place)
        for _ in range(3):  # the others come to this point within the difference of their clocks
            time.sleep(TICK_S)
            self._beat()
        places: dict[str, list[int]] = {}
        for rank in range(self.size):
            key = self._key(f"where/{phase.number}/{rank}")
            where = store.get(key).decode() if store.check([key]) else "it has not said where"
            places.setdefault(where, []).append(rank)
        # Those that stand in a collective, or have come through, wait for the others.
        waits = ("torch/distributed", "parallel/distributed", "deepspeed/comm", "waiting for the others")
        ordered = sorted(places.items(), key=lambda item: any(word in item[0] for word in waits))
        return Row(
            phase.name,
            FAIL,
            f"{text}: " + "; ".join(f"{self._named(ranks)}: {where}" for where, ranks in ordered),
            remedy,
        )

    def _missing(self) -> list[int]:
        """Ranks that have not taken their seat."""
        store = self._thread_store
        return [rank for rank in range(self.size) if store and not store.check([self._key(f"seat/{rank}")])]

    def _place(self) -> str:
        """Where the main thread stands."""
        if not self._inside and self._phase is not None and self._store is not None:
            return "waiting for the others"
        frame = sys._current_frames().get(self._main)
        frames = [each for each, _ in traceback.walk_stack(frame)]
        if not frames:
            return "?"
        ours = next((each for each in frames if f"{os.sep}finetune{os.sep}" in each.f_code.co_filename), None)
        said = [_where(frames[0])]
        if ours is not None and ours is not frames[0]:
            said.append(f"called by {_where(ours)}")
        return ", ".join(said)

    def _beat(self) -> None:
        """Show that this rank lives, and see who else does."""
        store = self._thread_store
        if store is None:
            return
        self._beat_number += 1
        store.set(self._key(f"beat/{self.rank}"), str(self._beat_number))
        if len(self.hosts) < self.size:
            return  # not all have come
        beats = store.multi_get([self._key(f"beat/{rank}") for rank in range(self.size)])
        now = time.monotonic()
        for rank, beat in enumerate(beats):
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = (beat, now)

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        quiet = [rank for rank, (_, at) in self._beats.items() if now - at > seconds and rank != self.rank]
        if quiet and self._thread_store.check([self._key(f"bye/{rank}") for rank in quiet]):
            return []  # they have come through to the end
        return quiet

    def _named(self, ranks: Sequence[int]) -> str:
        if len(ranks) > 1 or len(self.hosts) < self.size:
            return ranks_text(ranks)
        return f"rank {ranks[0]} on {self.hosts[ranks[0]]}" if ranks else "no rank"

    def _end(self, row: Row, alone: bool = False) -> NoReturn:
        """Let the lowest living rank say why, then end this process. Never returns."""
        store = self._thread_store
        try:
            speaker = True
            if store is not None and not alone:
                store.set(self._key("broken"), pickle.dumps(row))
                silent = self._silent(QUIET_S)
                living = [rank for rank in range(self.size) if rank not in silent]
                speaker = living[0] == self.rank
            if speaker:
                worker = threading.Thread(target=self.on_break, args=(row,), daemon=True)
                worker.start()  # it removes files, on a disk that may hang
                worker.join(timeout=15)
                if store is not None and not alone:
                    store.set(self._key("said"), "1")
            else:
                ends = time.monotonic() + 20
                # A launcher ends all ranks with the first that goes: the speaker must come to its end before.
                while time.monotonic() < ends and not store.check([self._key("said")]):
                    self._beat()
                    time.sleep(0.2)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def attempt(function: Callable[[], Any]) -> Outcome:
    """Run it: its value, or its error in a line."""
    try:
        return Outcome(function())
    except (UserError, StoreAwayError) as error:
        return Outcome(error=" ".join(str(error).split()))
    except Exception as error:
        kind = type(error).__name__
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()
        frames = [each for each in traceback.extract_tb(error.__traceback__) if "finetune" in each.filename]
        where = f" (at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
        return Outcome(error=f"{kind}: {first_line(error)[:300]}{where}", memory=memory)


def _answers(address: str, port: int, must: bool) -> bool:
    """Whether somebody listens there: torch's client fills the screen with its stack when nobody does yet.

    Raises:
        OSError: nobody, and `must`.
    """
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        if must:
            raise
        return False
    return True


def _where(frame: FrameType) -> str:
    path = frame.f_code.co_filename.split("site-packages/")[-1]
    if f"{os.sep}finetune{os.sep}" in path:
        path = "finetune/" + path.rsplit(f"{os.sep}finetune{os.sep}", 1)[1]
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}()"


def _noted(number: int, frame: FrameType | None) -> None:
    """Python's handler: the thread has the number already."""
