"""Whom the watch blames, and when: several watches over one store in this process, with clocks of their own."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from finetune import PEER_LOST, PeerLostError, UserError
from finetune.distributed import watch as module
from finetune.distributed import world
from finetune.distributed.watch import LONG, Bounds, Mark, Watch


class Told(Watch):
    """A rank whose verdict is kept rather than ended with."""

    said = ""

    def _end(self, verdict):
        self.said = self.said or verdict.line
        self._over.set()


@pytest.fixture
def ranks():
    """`ranks(3, Bounds(...))`: that many watches, all begun."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made: list[Told] = []

    def make(size: int, bounds: Bounds) -> list[Told]:
        for rank in range(size):
            client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
            made.append(Told(rank, size, dist.PrefixStore("watch", client), ("127.0.0.1", server.port), bounds))
        threads = [threading.Thread(target=watch.start) for watch in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return made

    yield make
    for watch in made:
        watch.leave()


def silence(watch: Watch) -> None:
    """As SIGKILL would: no thread of it goes on, and nothing new is said at its end."""
    last = watch._base.get(str(watch.rank)).decode()
    watch._sign_of_life = lambda beats: last
    watch._over.set()
    for thread in watch._threads:
        thread.join()


def until(true, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def test_a_silent_rank_is_named_by_all_and_one_that_left_is_not(ranks):
    zero, one, two, three = ranks(4, Bounds(lost_s=2.5, stalled_s=0))
    two.leave()
    time.sleep(3.5)
    assert not any(watch.said for watch in (zero, one, three))
    silence(one)
    assert until(lambda: zero.said and three.said)
    assert zero.said == three.said
    assert zero.said.startswith(f"rank 1 on {zero.host} has given no sign of life for ")


def test_the_rank_furthest_behind_is_named(ranks):
    zero, one, two = ranks(3, Bounds(lost_s=30, stalled_s=1))
    for watch in (zero, one, two):
        for step in (1, 2, 3):  # the first two are given longer
            watch.begin(step)
        watch.at("waiting for data")
    for watch in (zero, two):
        watch.at("in forward and backward")
    assert until(lambda: zero.said and one.said and two.said)
    assert zero.said == one.said == two.said
    assert f"rank 1 on {zero.host} hangs: waiting for data at step 3 for " in zero.said


def test_work_that_is_long_by_nature_is_given_time(ranks):
    zero, one = ranks(2, Bounds(lost_s=30, stalled_s=0.6))
    one.at("drawing samples", LONG)
    zero.at("drawing samples", LONG)
    zero.at("in forward and backward", 1.0)  # waits for the other, and is not to blame
    time.sleep(2)
    assert not zero.said and not one.said
    assert until(lambda: zero.said and one.said)
    assert "rank 1" in zero.said and "drawing samples" in zero.said


def test_what_all_wait_in_is_said_without_blame(ranks):
    zero, one = ranks(2, Bounds(lost_s=30, stalled_s=0.8))
    for watch in (zero, one):
        watch.at("agreeing with the other ranks", 1.0)
    assert until(lambda: zero.said and one.said)
    assert zero.said.startswith("no rank has gone on for ")
    assert "agreeing with the other ranks" in zero.said


def test_progress_is_no_stall(ranks):
    zero, one = ranks(2, Bounds(lost_s=30, stalled_s=2))
    for step in range(1, 36):
        for watch in (zero, one):
            watch.begin(step)
        time.sleep(0.1)
    assert not zero.said and not one.said


def test_an_error_of_its_own_is_told_to_the_others(ranks, monkeypatch):
    monkeypatch.setattr(module, "_FAILED_GRACE_SECONDS", 0.5)
    zero, one = ranks(2, Bounds(lost_s=6, stalled_s=0))
    one.judge(ValueError("no such layer\nand more"))  # returns at once: the error goes its way
    assert until(lambda: zero.said)
    assert zero.said == f"rank 1 on {zero.host} failed: ValueError: no such layer"


def test_a_broken_connection_waits_for_the_verdict_and_names_the_silent_rank(ranks):
    zero, one = ranks(2, Bounds(lost_s=6, stalled_s=0))
    silence(one)
    started = time.monotonic()
    zero.judge(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"))
    assert zero.said.startswith(f"rank 1 on {zero.host} has given no sign of life")
    assert time.monotonic() - started < 9  # and not lost_s, of a minute by default, on top


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (dist.DistNetworkError("Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError(), False),
        (ConnectionResetError("of a data server"), False),
        (UserError("run.dir cannot be a run's folder"), False),
    ],
)
def test_errors_of_our_own_are_told_from_lost_peers(error, expected):
    assert module._is_of_connection(error) is expected
    clean_up = RuntimeError("gloo: closed")
    clean_up.__context__ = error
    assert module._is_of_connection(clean_up) is expected  # the first one counts


def test_a_gone_store_is_told(ranks):
    (zero, one) = ranks(2, Bounds(lost_s=1.5, stalled_s=0))
    for watch in (zero, one):
        watch.address = ("127.0.0.1", 1)  # refuses
        watch._store = None
    assert until(lambda: zero.said and one.said)
    assert "the store of this run at 127.0.0.1 has not answered" in zero.said


HUNG = """
import time
from pathlib import Path
from finetune.distributed.watch import Bounds, Watch
watch = Watch(bounds=Bounds(0, 0.5, 0))
watch.start()
watch.at("in the optimizer", 1)
time.sleep(20)
"""


def test_a_hung_run_is_ended_where_nobody_reads_why():
    """A pipe's reader has gone, or the log's disk is full."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", HUNG], stderr=full)
    assert done.returncode == PEER_LOST


def test_five_hundred_ranks_are_read_at_the_pace_of_a_beat():
    """One look at all of them is far cheaper than the time between two looks."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reader = Watch(0, 512, server, ("127.0.0.1", server.port), Bounds())
    line = json.dumps(["host", 1, Mark(7, 3, "in forward and backward", 1.0), 0.1, "alive", ""])
    server.multi_set([str(rank) for rank in range(512)], [line] * 512)
    reader._store = server.clone()
    reader._read = time.monotonic()
    reader._read_all()
    assert all(peer.mark.step == 7 for peer in reader._peers)


def test_marks_cost_nothing_and_need_no_threads():
    watch = Watch()
    watch.start()
    watch.begin(3)
    watch.at("waiting for data")
    assert str(watch.mark) == "waiting for data at step 3"
    with contextlib.suppress(RuntimeError):
        watch.judge(RuntimeError("gloo"))
    watch.leave()
    assert Bounds(60, 600, 600).collective == datetime.timedelta(seconds=3720)


def test_a_store_that_ends_while_a_rank_joins_is_no_mistake_of_the_user(monkeypatch):
    """Its machine died in that moment, say: the launcher shall try again."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=refuse, daemon=True).start()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(PeerLostError, match="rank 0's store at 127.0.0.1:"):
            world._store(3, datetime.timedelta(seconds=2))
