"""Ranks that watch each other: one that dies or hangs ends the job in bounded time, by name.

A rank's main thread may be blocked in anything: a collective, a disk, a dead network. So two threads look after it.
One writes signs of life into the run's store, over its own connection, and reads those of the others. The other
looks at clocks alone and ends the process, so that no blocked socket stops it. What it goes by:

lost        no sign of life from a rank: killed, frozen, or its machine or link is gone
stalled     signs of life without progress: hung in its data, or in a collective. Main threads say where they are
            (`at`, an attribute's write); who is furthest behind is the one that the others wait for
failed      a rank says itself that it ends with an error

The first rank to find something writes its verdict into the store, and all say the same line, one rank a host.
A rank whose interpreter is itself blocked (a C call that keeps the GIL) is lost to the others, whose end makes its
launcher kill it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finetune import PEER_LOST, UserError, first_line, say_at_once
from finetune.terminal import ranks_text

LONG = 6.0
"""Times `stalled_s` that may be taken by what is long: loading, compiling, validating, sampling, saving."""
_BEAT_SECONDS = 2.0
_FAILED_GRACE_SECONDS = 10.0  # in which others may end with the same error by themselves
_READERS_AT_FULL_PACE = 256  # more ranks than these are read less often, or the store would suffocate
_FAILED, _DONE, _ALIVE = "failed", "done", "alive"


@dataclass(frozen=True)
class Bounds:
    """Seconds until a rank counts as lost or stalled, and for all ranks to come together; 0 for never."""

    lost_s: float = 60.0
    stalled_s: float = 600.0
    start_s: float = 600.0

    @property
    def collective(self) -> datetime.timedelta:
        """What a collective may take: longer than the watch, which knows whom to name."""
        seconds = LONG * self.stalled_s + 2 * self.lost_s if self.stalled_s else 30 * 86400
        return datetime.timedelta(seconds=max(seconds, 60))


class Mark(NamedTuple):
    """Where a main thread is. Ranks do the same things, so marks of different ranks can be compared."""

    step: int  # that is being made, from 1; 0 before the first
    turn: int  # of the place in its step
    place: str
    patience: float  # times `stalled_s` that this may take

    def __str__(self) -> str:
        return f"{self.place} at step {self.step}" if self.step else f"{self.place} before the first step"


_STARTING = Mark(0, 0, "starting", LONG)


@dataclass
class _Peer:
    """What is known of a rank. `heard`: when its last sign of life came, on this process's clock."""

    host: str = ""
    beats: int = -1
    heard: float = 0.0
    mark: Mark = _STARTING
    idle_s: float = 0.0  # since its main thread went on, when it was heard
    state: str = _ALIVE
    why: str = ""
    failed_at: float = 0.0


@dataclass(frozen=True)
class _Verdict:
    line: str
    ranks: list[int] = field(default_factory=list)  # that are to blame, and can't speak


class Watch:
    """One rank's part in it. Without bounds it only takes marks.

    Args:
        store: reached by all ranks under the same names; None for a run of one process.
        address: of the store, as (host, port).
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        store: Any = None,
        address: tuple[str, int] = ("", 0),
        bounds: Bounds | None = None,
    ) -> None:
        self.rank, self.size, self.bounds, self.address = rank, size, bounds or Bounds(0, 0, 0), address
        self.host = socket.gethostname()
        self.mark = _STARTING
        self._patience, self._steps = LONG, 0
        limits = [bound / 6 for bound in (self.bounds.lost_s, self.bounds.stalled_s) if bound > 0]
        self._beat_s = min([_BEAT_SECONDS, *limits])
        self._peers = [_Peer() for _ in range(size)]
        self._state, self._why = _ALIVE, ""
        self._base = store
        self._store: Any = None
        self._over = threading.Event()
        self._met = threading.Event()
        self._verdict: _Verdict | None = None
        self._proposal: _Verdict | None = None
        self._missing: list[int] | None = None
        self._refused = 0
        self._suspicious = self._judged = False
        self._threads: list[threading.Thread] = []

    # --- told by the main thread

    def at(self, place: str, patience: float | None = None) -> None:
        """The main thread begins something that all ranks do: `waiting for data`, `saving`."""
        step, turn, _, _ = self.mark
        self.mark = Mark(step, turn + 1, place, self._patience if patience is None else patience)

    def going_on(self) -> None:
        """What the main thread waits for comes forward, however slowly: the time for it begins anew."""
        self.mark = Mark(*self.mark)  # of the same turn: ranks that only wait are not behind

    def begin(self, step: int) -> None:
        """The main thread begins a step, counted from 1. This process's first two steps may compile."""
        self._steps += 1
        self._patience = LONG if self._steps <= 2 else 1.0
        self.mark = Mark(step, 0, "beginning", self._patience)

    def start(self) -> None:
        """Start the threads, and wait until all ranks are here.

        After `start_s` without one of them the process ends with exit code 69 and a line that names it.
        """
        now = time.monotonic()
        self._started = self._answered = self._read = self._moved = self._looked = now
        self._seen = self.mark
        if self._beats_are_timed:
            self._threads.append(threading.Thread(target=self._beat, name="beats", daemon=True))
        else:
            self._met.set()
        if self._threads or self.bounds.stalled_s > 0:
            self._threads.append(threading.Thread(target=self._look_on, name="watch", daemon=True))
        for thread in self._threads:
            thread.start()
        self._met.wait()

    def judge(self, error: BaseException) -> None:
        """An error ends this rank: tell the others, unless it only shows that one of them is lost.

        In that case this waits for the verdict, and the process ends with it. Otherwise it returns, and the error
        goes its way.
        """
        if self._judged or not self._threads:
            return
        self._judged = True
        if self._beats_are_timed and _is_of_connection(error):
            self._suspicious = True
            time.sleep(self._beat_s * 6 + 1)
        own = f"{type(error).__name__}: " if not isinstance(error, UserError) else ""
        self._finish(_FAILED, own + first_line(error))

    def leave(self) -> None:
        """This rank is done, and its silence from now on is no loss."""
        if self._state == _ALIVE:
            self._finish(_DONE, "")

    def _finish(self, state: str, why: str) -> None:
        self._state, self._why = state, why[:300]
        self._over.set()
        for thread in self._threads:
            thread.join(2)

    @property
    def _beats_are_timed(self) -> bool:
        """Whether signs of life are exchanged at all."""
        return self.size > 1 and self.bounds.lost_s > 0

    # --- the thread that talks to the store

    def _beat(self) -> None:
        beats, looked = 0, 0.0
        pace = self._beat_s * max(1.0, self.size / _READERS_AT_FULL_PACE)
        if int(os.environ.get("LOCAL_RANK", 0)) > 1 and self.size > 16:
            pace = max(pace, self.bounds.lost_s / 2)  # two ranks a machine look closely; the others now and then
        while True:
            over = self._over.is_set()
            try:
                if self._store is None:
                    self._store = self._connected()
                beats += 1
                self._store.set(str(self.rank), self._sign_of_life(beats))
                if not self._met.is_set():
                    self._meet()
                now = time.monotonic()
                if self._met.is_set() and not over:
                    if now - looked >= pace or self._suspicious or self._proposal is not None:
                        self._read_all()
                        looked = now
                    self._agree()
                self._answered, self._refused = time.monotonic(), 0
            except ConnectionRefusedError:
                self._refused += 1
            except Exception:
                self._store = None  # made anew where that is possible; `_trouble` counts the seconds
            if over:
                return
            self._over.wait(0.1 if not self._met.is_set() else self._beat_s)

    def _connected(self) -> Any:
        """A connection of our own, since a blocking call holds the lock of the one it uses."""
        # torch's client would fill the screen with its stack when nobody answers.
        socket.create_connection(self.address, timeout=self._beat_s).close()
        return self._base.clone()

    def _sign_of_life(self, beats: int) -> str:
        idle = time.monotonic() - self._moved
        return json.dumps([self.host, beats, self.mark, round(idle, 1), self._state, self._why])

    def _meet(self) -> None:
        keys = [str(rank) for rank in range(self.size)]
        if self._store.check(keys):
            self._read_all()
            self._met.set()
        elif time.monotonic() - self._started > self.bounds.start_s - 10 * self._beat_s:
            self._missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def _read_all(self) -> None:
        values = self._store.multi_get([str(rank) for rank in range(self.size)])
        now = time.monotonic()
        # Where nothing could be read for long, silence says nothing: the others could not write either.
        starved = now - self._read > 3 * self._beat_s + (self.bounds.lost_s / 2 if self.size > 16 else 0)
        for peer, value in zip(self._peers, values, strict=True):
            host, beats, mark, idle, state, why = json.loads(value)
            if beats != peer.beats or starved:
                peer.heard = now
            if state == _FAILED != peer.state:
                peer.failed_at = now
            peer.host, peer.beats, peer.mark, peer.idle_s = host, beats, Mark(*mark), idle
            peer.state, peer.why = state, why
        self._read = now

    def _agree(self) -> None:
        """The first verdict is everybody's."""
        if self._proposal is not None:
            said = json.dumps([self._proposal.line, self._proposal.ranks])
            self._verdict = _Verdict(*json.loads(self._store.compare_set("verdict", "", said)))
        elif self._store.check(["verdict"]):
            self._verdict = _Verdict(*json.loads(self._store.get("verdict")))

    # --- the thread that looks at clocks

    def _look_on(self) -> None:
        pause = min(0.25, self._beat_s / 2)
        while not self._over.wait(pause):
            now = time.monotonic()
            gap, self._looked = now - self._looked - pause, now
            if gap > max(1.0, self._beat_s):  # this process itself was frozen: its clocks stood still meanwhile
                self._answered += gap
                self._read += gap
                self._moved += gap
                for peer in self._peers:
                    peer.heard += gap
            if self.mark is not self._seen:
                self._seen, self._moved = self.mark, now
            verdict = self._verdict
            if verdict is None and (found := self._trouble(now)) is not None:
                self._proposal = found
                deadline = now + 2 * self._beat_s + 1
                while self._verdict is None and time.monotonic() < deadline and self._base is not None:
                    time.sleep(0.05)
                verdict = self._verdict or found
            if verdict is not None and not self._over.is_set():
                self._end(verdict)

    def _trouble(self, now: float) -> _Verdict | None:
        if not self._met.is_set():
            return self._not_met(now)
        if self._beats_are_timed:
            if (verdict := self._failed(now) or self._silent(now)) is not None:
                return verdict
            # Refused: the machine is there, and the process that held the store is not.
            if self._refused > 3 or now - self._answered > self.bounds.lost_s:
                seconds = now - self._answered
                return _Verdict(
                    f"the store of this run at {self.address[0]} has not answered for {seconds:.0f} s: rank 0's "
                    "machine, its launcher or the network to it is gone"
                )
        return self._stalled(now) if self.bounds.stalled_s > 0 else None

    def _not_met(self, now: float) -> _Verdict | None:
        seconds = now - self._started
        if seconds < self.bounds.start_s or self.bounds.start_s <= 0:
            return None
        if self._missing:
            here = [rank for rank in range(self.size) if rank not in self._missing]
            return _Verdict(
                f"{ranks_text(self._missing)} of {self.size} did not come within {seconds:.0f} s (watch.start_s); "
                f"here: {ranks_text(here)}"
            )
        return _Verdict(
            f"the store of this run at {self.address[0]}:{self.address[1]} did not answer within {seconds:.0f} s "
            "(watch.start_s): is rank 0's machine up, and can this one reach it?"
        )

    def _others(self, state: str) -> list[int]:
        return [rank for rank, peer in enumerate(self._peers) if rank != self.rank and peer.state == state]

    def _failed(self, now: float) -> _Verdict | None:
        for rank in self._others(_FAILED):
            peer = self._peers[rank]
            if self._suspicious or now - peer.failed_at > _FAILED_GRACE_SECONDS:
                return _Verdict(f"rank {rank} on {peer.host} failed: {peer.why or 'see its own lines'}", [rank])
        return None

    def _silent(self, now: float) -> _Verdict | None:
        bound = min(self.bounds.lost_s, 4 * self._beat_s) if self._suspicious else self.bounds.lost_s
        if now - self._read > bound / 2:
            return None  # nothing was read of late
        lost = [rank for rank in self._others(_ALIVE) if now - self._peers[rank].heard > bound]
        if not lost:
            return None
        first = self._peers[lost[0]]
        hosts = sorted({self._peers[rank].host for rank in lost})
        return _Verdict(
            f"{ranks_text(lost)} on {', '.join(hosts[:4])}{', ...' if len(hosts) > 4 else ''} "
            f"{'has' if len(lost) == 1 else 'have'} given no sign of life for {now - first.heard:.0f} s: killed, "
            f"frozen, or cut off; last seen {first.mark}",
            lost,
        )

    def _stalled(self, now: float) -> _Verdict | None:
        marks = {self.rank: self.mark}
        idle = {self.rank: now - self._moved}
        if self._beats_are_timed:
            for rank in self._others(_ALIVE):
                marks[rank] = self._peers[rank].mark
                idle[rank] = self._peers[rank].idle_s + now - self._peers[rank].heard
        last = min(mark[:2] for mark in marks.values())
        behind = [rank for rank, mark in marks.items() if mark[:2] == last]
        mark = marks[behind[0]]
        seconds = min(idle[rank] for rank in behind)
        if seconds < self.bounds.stalled_s * mark.patience:
            return None
        if self.size == 1:
            return _Verdict(f"no progress for {seconds:.0f} s: {mark}")
        if len(behind) == len(marks):
            return _Verdict(
                f"no rank has gone on for {seconds:.0f} s, all are {mark}: what they do together hangs, as when "
                "the network or a GPU does"
            )
        host = self.host if behind[0] == self.rank else self._peers[behind[0]].host
        where = f" on {host}" if len({self._host(rank) for rank in behind}) == 1 else ""
        return _Verdict(
            f"{ranks_text(sorted(behind))}{where} {'hangs' if len(behind) == 1 else 'hang'}: {mark} for "
            f"{seconds:.0f} s, while the others wait",
            sorted(behind),
        )

    def _host(self, rank: int) -> str:
        return self.host if rank == self.rank else self._peers[rank].host

    def _end(self, verdict: _Verdict) -> None:
        """Say it, once a host, and end this process, whatever it does."""
        speakers = [r for r in range(self.size) if self._host(r) == self.host and r not in verdict.ranks]
        if not speakers or self.rank == min(speakers) or not self._met.is_set():
            advice = "the same command goes on from the last checkpoint"
            say_at_once(f"\nerror: {verdict.line}; {advice}\n")
        if self._peers[0].host == self.host and self.size > 1:
            time.sleep(3 * self._beat_s)  # the store may end with this process: let the others read the verdict
        _keep_flight_record(self.rank)
        os._exit(PEER_LOST)


def _keep_flight_record(rank: int) -> None:
    """Write NCCL's flight record where its own watchdog would have, if the user wants that; we end before it."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace", None)
    if dump is None or os.environ.get("TORCH_NCCL_DUMP_ON_TIMEOUT", "0").lower() not in ("1", "true", "y", "yes"):
        return
    path = os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/tmp/nccl_trace_rank_") + str(rank)

    def write() -> None:
        with contextlib.suppress(Exception):
            Path(path).write_bytes(dump())

    thread = threading.Thread(target=write, daemon=True)  # it may wait for a lock that a hung collective holds
    thread.start()
    thread.join(5)


def _is_of_connection(error: BaseException) -> bool:
    """Whether an error came out of a collective or a store because a peer or the network is gone."""
    import torch.distributed as dist

    while error.__context__ is not None and not isinstance(error, UserError):
        error = error.__context__  # what went wrong first; clean-up may have failed after it
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "nccl"))
