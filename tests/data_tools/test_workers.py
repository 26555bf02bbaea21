"""Worker processes keep the order, pass errors on, and are gone when their parent is."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.workers import CrashError, RemoteError, Workers
from finetune import UserError

ROOT = Path(__file__).resolve().parents[2]


class OddError(Exception):
    """Pickles, but can't be loaded again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def slow_square(number: int) -> int:
    time.sleep(0.002 * (number % 3))
    return number * number


def picky(number: int) -> int:
    if number == 3:
        raise KeyError("three")
    if number == 5:
        raise OddError(1, 2)
    return number


def grow(array: np.ndarray, by: int) -> np.ndarray:
    return np.concatenate([array] * by)


def die(number: int, code: int) -> int:
    if number == 4:
        os.kill(os.getpid(), code)
    return number


def pid_and_wait(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    with Workers(count) as workers:
        for _ in range(2):  # the processes are used again
            assert list(workers.map(slow_square, range(40))) == [(n, n * n) for n in range(40)]
        assert list(workers.map(str, [])) == []


def test_no_more_than_ahead_items_are_taken() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(50):
            taken += 1
            yield number

    with Workers(2) as workers:
        for given, (number, _) in enumerate(workers.map(slow_square, items(), ahead=5)):
            assert number == given
            assert taken - given <= 5


@pytest.mark.parametrize("count", [0, 2])
def test_errors_of_the_given_kinds_are_results(count: int) -> None:
    with Workers(count) as workers:
        results: list[Any] = [r for _, r in workers.map(picky, range(5), catch=(LookupError,))]
        assert [r for r in results if isinstance(r, int)] == [0, 1, 2, 4]
        assert isinstance(results[3], KeyError)
        with pytest.raises(KeyError, match="three"):
            list(workers.map(picky, range(5)))
        # An abandoned map leaves nothing behind for the next.
        assert [r for _, r in workers.map(slow_square, range(9))] == [n * n for n in range(9)]


def test_an_error_keeps_its_traceback_and_need_not_pickle() -> None:
    with Workers(1) as workers:
        with pytest.raises(RuntimeError, match="OddError: 1 and 2") as caught:
            list(workers.map(picky, [5]))
        assert isinstance(caught.value.__cause__, RemoteError)
        assert "in picky" in str(caught.value.__cause__)


def test_big_arrays_both_ways_do_not_lock_up() -> None:
    arrays = [np.full(3_000_000, number, np.uint8) for number in range(8)]
    with Workers(2) as workers:
        for number, (_, result) in enumerate(workers.map(functools.partial(grow, by=2), arrays)):
            assert isinstance(result, np.ndarray)
            assert result.shape == (6_000_000,)
            assert result[0] == result[-1] == number
            assert result.flags.writeable


@pytest.mark.parametrize(("code", "says"), [(signal.SIGKILL, "want of memory"), (signal.SIGSEGV, "signal 11")])
def test_a_killed_worker_is_one_line(code: int, says: str) -> None:
    with Workers(2) as workers, pytest.raises(UserError, match=says) as caught:
        list(workers.map(functools.partial(die, code=code), range(9), name=lambda number: f"picture {number}"))
    assert "picture 4" in str(caught.value)


def crash_once(number: int, mark: Path) -> int:
    if number == 4 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return number


@pytest.mark.parametrize("count", [1, 3])
def test_an_item_that_crashes_its_process_is_given_back(count: int, tmp_path: Path) -> None:
    with Workers(count) as workers:
        for _ in range(2):
            function = functools.partial(die, code=signal.SIGSEGV)
            results = dict(workers.map(function, range(20), catch=(CrashError,)))
            crash = results.pop(4)
            assert isinstance(crash, CrashError)
            assert str(crash) == "it crashes the process that reads it (signal 11)"
            assert list(results.items()) == [(n, n) for n in range(20) if n != 4]
        once = functools.partial(crash_once, mark=tmp_path / "mark")
        assert list(workers.map(once, range(20), catch=(CrashError,))) == [(n, n) for n in range(20)]
        with pytest.raises(UserError, match="killed"):  # by whom, nobody knows: it says nothing of the item
            list(workers.map(functools.partial(die, code=signal.SIGKILL), range(9), catch=(CrashError,)))


def test_workers_die_with_a_killed_parent() -> None:
    script = """
from data_tools.workers import Workers
from tests.data_tools.test_workers import pid_and_wait
workers = Workers(3)
for _, pid in workers.map(pid_and_wait, [0] * 3 + [600] * 20, ahead=30):
    print(pid, *(worker.process.pid for worker in workers._workers), flush=True)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    try:
        _, *pids = map(int, parent.stdout.readline().split())
        handles = [os.pidfd_open(pid) for pid in pids]
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    for handle in handles:
        assert select.select([handle], [], [], 20)[0], "a worker outlived its parent"
        os.close(handle)


def test_leaving_ends_workers_at_once() -> None:
    with Workers(2) as workers:
        results = workers.map(pid_and_wait, [0] + [600] * 6)
        next(results)
        processes = [worker.process for worker in workers._workers]
        assert [process.poll() for process in processes] == [None, None]
    assert [process.poll() for process in processes] == [0, 0]


def test_workers_do_not_import_torch() -> None:
    script = """
import sys
from data_tools.workers import Workers
from tests.data_tools.test_workers import modules
with Workers(1) as workers:
    ((_, names),) = workers.map(modules, [0])
print("torch" in names, "PIL.Image" in names)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "True"]


def modules(_: int) -> list[str]:
    import data_tools.encode  # noqa: F401

    return list(sys.modules)
