"""Saving beside training: disks that are slow, full, dead or dishonest, and memory that is short."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import AwayError, UserError
from finetune.checkpoint import Checkpoints, checkpoints, find_fault, host, record, writing
from finetune.distributed.watch import Bounds, Watch
from finetune.loop import Parts
from tests.checkpoint.conftest import Command, disturb, parts_of, progress_at


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    slept = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        slept.wait(0.01)
    raise AssertionError("waited in vain")


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return (
        max((json.loads(line)["step"] for line in file.read_text().splitlines()), default=0) if file.exists() else 0
    )


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines for the user of `parts`' checkpoints."""
    lines: list[str] = []
    original = Checkpoints.__init__

    def init(self: Checkpoints, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        self.say = lines.append

    monkeypatch.setattr(Checkpoints, "__init__", init)
    return lines


@pytest.fixture
def parts(said: list[str], overrides: list[str]) -> Parts:
    parts = parts_of(overrides)
    disturb(parts)
    return parts


class Gate:
    """Lets writes to files whose path holds a text wait until it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text, self.reached, self.opened = "", threading.Event(), threading.Event()
        original = os.pwrite

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            if self.text in os.readlink(f"/proc/self/fd/{descriptor}"):
                self.reached.set()
                assert self.opened.wait(100)
            return original(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


# --- a slow disk ----------------------------------------------------------------------------------


def test_training_goes_on_while_a_slow_disk_takes_a_checkpoint(
    overrides: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """Steps go on, a save that falls due is skipped and said, memory is taken once, and the file is of its step."""
    calm, slow = tmp_path / "calm", tmp_path / "slow"
    settings = [*overrides, "train.steps=10", "checkpoint.every=3", "checkpoint.keep=9", "tracker.every=1"]
    gate.text = "none"
    assert command("train", *settings, f"run.dir={calm}")[0] == 0
    assert [p.name[-2:] for p in sorted((calm / "checkpoints").iterdir())] == ["03", "06", "09", "10"]

    monkeypatch.setattr(checkpoints, "_PATIENCE_SECONDS", 0.0)
    taken: list[int] = []
    original = host.HostMemory.__init__

    def init(self: host.HostMemory, size: int, *, pinned: bool) -> None:
        taken.append(size)
        original(self, size, pinned=pinned)

    monkeypatch.setattr(host.HostMemory, "__init__", init)
    gate.text = "step-00000003"
    opener = threading.Thread(target=lambda: (wait_until(lambda: steps_logged(slow) >= 8), gate.opened.set()))
    opener.start()
    with monkeypatch.context() as patch:  # capsys would be emptied by `command`
        out: list[str] = []
        patch.setattr("tqdm.tqdm.write", lambda line, *_, **__: out.append(line))
        assert command("train", *settings, f"run.dir={slow}")[0] == 0
    opener.join()
    assert gate.reached.is_set()
    skipped = [line for line in out if "is not saved" in line]
    assert "step 6 is not saved: step 3 is still being written" in skipped[0]
    assert "raise checkpoint.every" in skipped[0]
    names = {p.name for p in (slow / "checkpoints").iterdir()}
    assert {"step-00000003", "step-00000010"} <= names
    assert "step-00000006" not in names
    assert len(taken) == 1
    for name in ("step-00000003", "step-00000010"):
        assert contents(slow / "checkpoints" / name) == contents(calm / "checkpoints" / name)


def test_a_young_save_is_waited_for(parts: Parts, said: list[str]) -> None:
    """Tiny models save more often than a disk writes: none is lost."""
    for step in range(1, 5):
        parts.checkpoints.begin(progress_at(step), parts.strategy, parts.averages)
    parts.checkpoints.finish()
    assert said == []
    assert len(list(parts.checkpoints.folder.iterdir())) == parts.checkpoints.keep == 3


def test_no_step_waits_again_for_a_disk_that_was_slow(
    parts: Parts, said: list[str], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_PATIENCE_SECONDS", 2)  # also on a busy machine
    monkeypatch.setattr(checkpoints, "_MEETING_SECONDS", 9)
    waits: list[float] = []
    original = writing.Task.wait

    def wait(self: writing.Task[Any], seconds: float, *, stalled_after: float) -> bool:
        waits.append(seconds)
        return original(self, seconds, stalled_after=stalled_after)

    monkeypatch.setattr(writing.Task, "wait", wait)
    for step in (1, 2, 3):
        parts.checkpoints.begin(progress_at(step), parts.strategy, parts.averages)
    assert len(said) == 2
    assert len(waits) == 1
    gate.opened.set()
    parts.checkpoints.finish()
    assert find_fault(parts.checkpoints.folder / "step-00000001") is None


def test_a_slow_disk_is_no_hang(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last save takes longer than the watch lets one place take."""
    verdicts: list[str] = []

    class Told(Watch):
        def _end(self, verdict: Any) -> None:
            verdicts.append(verdict.line)

    watch = Told(bounds=Bounds(0, 0.5, 0))
    parts.strategy.world = replace(parts.strategy.world, watch=watch)
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (threading.Event().wait(0.1), original(file)))
    monkeypatch.setattr(checkpoints, "_MEETING_SECONDS", 0.05)
    watch.start()
    started = time.monotonic()
    watch.at("saving", 2)
    parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
    watch.leave()
    assert time.monotonic() - started > 1.5
    assert verdicts == []


def test_a_disk_that_takes_nothing_is_given_up_in_bounded_time(
    parts: Parts, said: list[str], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_STALLED_SECONDS", 0.3)
    with pytest.raises(AwayError, match=r"cannot save .*step-00000001: the disk has taken nothing for 0 s"):
        parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)


def test_a_save_that_was_given_up_removes_nothing_newer(
    parts: Parts, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file's server does not answer, while others do: a later checkpoint is saved, and then it answers."""
    hung, original = threading.Event(), checkpoints.write_record

    def write_record(folder: Path, *rest: Any) -> None:
        if "step-00000001" in folder.name:
            assert hung.wait(100)
        original(folder, *rest)

    monkeypatch.setattr(checkpoints, "_STALLED_SECONDS", 0.3)
    monkeypatch.setattr(checkpoints, "write_record", write_record)
    folder = parts.checkpoints.folder
    parts.checkpoints.begin(progress_at(1), parts.strategy, parts.averages)
    parts.checkpoints.save(progress_at(2), parts.strategy, parts.averages)
    assert "the checkpoint of step 1 cannot be saved" in said[0]
    assert len(os.listdir(folder)) == 2
    hung.set()
    wait_until(lambda: len(os.listdir(folder)) == 1)
    assert os.listdir(folder) == ["step-00000002"]
    assert find_fault(folder / "step-00000002") is None


def test_a_save_that_hangs_while_it_is_published_ends_the_run(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it removes when it goes on can't be known."""
    hung, original = threading.Event(), checkpoints.publish

    def publish(temporary: Path, final: Path) -> None:
        assert hung.wait(100)
        original(temporary, final)

    monkeypatch.setattr(checkpoints, "_STALLED_SECONDS", 0.3)
    monkeypatch.setattr(checkpoints, "publish", publish)
    parts.checkpoints.begin(progress_at(1), parts.strategy, parts.averages)
    with pytest.raises(UserError, match=r"cannot save .*step-00000001: the disk has taken nothing"):
        parts.checkpoints.save(progress_at(2), parts.strategy, parts.averages)
    hung.set()
    wait_until(lambda: os.listdir(parts.checkpoints.folder) == ["step-00000001"])


def test_a_hung_write_keeps_no_process_from_leaving() -> None:
    hung = threading.Event()
    task = writing.Task(lambda moved: hung.wait(100), "hung")
    assert task.running and task._thread.daemon
    assert not task.wait(0.01, stalled_after=100) and not task.wait(100, stalled_after=0.01)
    hung.set()
    assert task.wait(100, stalled_after=100)


HUNG_READ = """
import sys, threading
from pathlib import Path
from finetune.checkpoint import record, writing
record._sum = lambda *_: print("reads", flush=True) or threading.Event().wait(60)
task = writing.Task(lambda moved: record.sum_files(Path(sys.argv[1]), moved), "checkpoint")
assert not task.wait(60, stalled_after=3)
"""


def test_a_hung_read_keeps_no_process_from_ending(tmp_path: Path) -> None:
    """Not even at its exit, where Python waits for an executor's threads."""
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-c", HUNG_READ, tmp_path], capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stdout) == (0, "reads\n"), done.stderr


def test_a_file_system_that_syncs_no_folders_takes_checkpoints(
    parts: Parts, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older CIFS, and shared folders of virtual machines, where the kernel has no fsync for folders."""
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
    assert find_fault(parts.checkpoints.folder / "step-00000001") is None
    assert said == []


# --- a full disk ----------------------------------------------------------------------------------


def test_a_failed_save_is_told_and_leaves_the_one_before(parts: Parts, said: list[str]) -> None:
    """Files may not grow: training goes on, each failure is said, and the next save works."""
    parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for step in (2, 3):
            parts.checkpoints.begin(progress_at(step), parts.strategy, parts.averages)
            parts.checkpoints.finish()
        assert [path.name for path in parts.checkpoints.folder.iterdir()] == ["step-00000001"]
        with pytest.raises(UserError, match="cannot save .*step-00000004: File too large; .* untouched"):
            parts.checkpoints.save(progress_at(4), parts.strategy, parts.averages)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said[0] == (
        "warning: the checkpoint of step 2 cannot be saved, the last good one is step 1: File too large"
    )
    assert "step 3 cannot be saved (2 in a row), the last good one is step 1" in said[1]
    parts.checkpoints.save(progress_at(5), parts.strategy, parts.averages)
    assert find_fault(parts.checkpoints.folder / "step-00000005") is None


def test_the_last_save_is_tried_twice(
    overrides: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failed = os.pwrite, []

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if "step-00000004" in os.readlink(f"/proc/self/fd/{descriptor}") and not failed:
            failed.append(True)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert command("train", *overrides) == (0, "")
    assert failed
    assert find_fault(tmp_path / "run/checkpoints/step-00000004") is None


def test_a_run_whose_disk_is_away_at_its_end_may_be_tried_again(
    overrides: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers try none again that ends with 2, as for a mistake."""

    def pwrite(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", pwrite)
    code, line = command("train", *overrides)
    assert code == 74
    assert "step-00000004: Input/output error; the checkpoints before it are untouched: start the same" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_training_outlives_a_full_disk(
    small_disk: Path, overrides: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the first save, with room again at the second; full at the end; then mended, and done."""
    run, filler = small_disk / "run", small_disk / "filler"
    settings = [*overrides, f"run.dir={run}", "train.steps=6", "checkpoint.keep=1"]
    out: list[str] = []
    monkeypatch.setattr("tqdm.tqdm.write", lambda line, *_, **__: out.append(line))
    original = Checkpoints._begin

    def fill() -> None:
        with filler.open("wb") as file:
            try:
                while True:
                    os.write(file.fileno(), bytes(4096))
            except OSError:
                pass

    def begin(self: Checkpoints, progress: Any, *args: Any) -> None:
        if progress.step in (2, 6):
            fill()
        if progress.step == 4:
            filler.unlink()
        original(self, progress, *args)

    monkeypatch.setattr(Checkpoints, "_begin", begin)
    code, line = command("train", *settings)
    assert (code, "cannot save" in line and "No space left on device" in line) == (2, True), line
    assert any("step 2 cannot be saved, there is none yet: No space left" in said for said in out), out
    assert os.listdir(run / "checkpoints") == ["step-00000004"]
    monkeypatch.setattr(Checkpoints, "_begin", original)
    filler.unlink()
    assert command("train", *settings) == (0, "")
    assert [json.loads(text)["step"] for text in (run / "metrics.jsonl").read_text().splitlines()] == [*range(1, 7)]
    assert os.listdir(run / "checkpoints") == ["step-00000006"]


def test_a_disk_that_is_read_only_all_at_once(small_disk: Path, said: list[str], overrides: list[str]) -> None:
    """As the kernel makes it after an error."""
    parts = parts_of(overrides, f"run.dir={small_disk / 'run'}")
    parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    parts.checkpoints.begin(progress_at(2), parts.strategy, parts.averages)
    parts.checkpoints.finish()
    assert said == [
        "warning: the checkpoint of step 2 cannot be saved, the last good one is step 1: Read-only file system"
    ]
    assert parts.checkpoints.latest() == parts.checkpoints.folder / "step-00000001"


# --- a disk that loses what it was given ----------------------------------------------------------


def test_what_is_lost_between_writing_and_reading_is_noticed(
    parts: Parts, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that the disk has forgotten has a checksum of its own: only the writers know what it was."""
    original = record.sum_files

    def lose(folder: Path, moved: Callable[[], None]) -> Any:
        with (folder / "optimizer/exp_avg.safetensors").open("r+b") as file:
            file.seek(-2000, os.SEEK_END)
            file.write(bytes(1000))
        return original(folder, moved)

    parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
    monkeypatch.setattr(checkpoints, "sum_files", lose)
    parts.checkpoints.begin(progress_at(2), parts.strategy, parts.averages)
    parts.checkpoints.finish()
    assert "optimizer/exp_avg.safetensors does not hold what was written to it" in said[0]
    assert [path.name for path in parts.checkpoints.folder.iterdir()] == ["step-00000001"]


def test_an_old_checkpoint_that_cannot_be_removed_costs_nothing(
    parts: Parts, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoints, "prune", refuse)
    parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
    assert find_fault(parts.checkpoints.folder / "step-00000001") is None
    assert said == [f"warning: old checkpoints in {parts.checkpoints.folder} cannot be removed: Permission denied"]


def test_a_defect_of_ours_keeps_its_traceback(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(writing, "_write_all", broken)
    with pytest.raises(ZeroDivisionError):
        parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)


# --- memory ---------------------------------------------------------------------------------------


def test_a_snapshot_is_of_its_step(parts: Parts, gate: Gate) -> None:
    """Masters, average and moments go on changing while it is written."""
    wanted = [shard.master.clone() for shard in parts.strategy.shards]
    parts.checkpoints.begin(progress_at(1), parts.strategy, parts.averages)
    assert gate.reached.wait(30)
    assert parts.average is not None
    for tensor in (*(s.master for s in parts.strategy.shards), *parts.average.tensors):
        tensor.zero_()
    gate.opened.set()
    parts.checkpoints.finish()
    parts.checkpoints.restore(parts.checkpoints.folder / "step-00000001", parts.strategy, parts.averages)
    assert all(torch.equal(s.master, w) for s, w in zip(parts.strategy.shards, wanted, strict=True))
    assert all(tensor.abs().max() > 0 for tensor in parts.average.tensors)


def test_short_memory_makes_rounds_with_the_same_files(parts: Parts, said: list[str]) -> None:
    parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
    little = Checkpoints(parts.checkpoints.run / "little", parts.checkpoints.layout, keep=1, memory_bytes=80_000)
    little.save(progress_at(1), parts.strategy, parts.averages)
    assert little._plan is not None and little._plan.rounds > 3
    assert little._memory.size <= 80_000
    assert "training waits while checkpoints are written; checkpoint.memory_gib" in said[0]
    assert contents(little.folder) == contents(parts.checkpoints.folder)


# --- reading --------------------------------------------------------------------------------------


def test_others_read_runs_while_a_save_is_under_way(parts: Parts, gate: Gate) -> None:
    from finetune.runs import find_checkpoint

    gate.text = "step-00000002"
    parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
    parts.checkpoints.begin(progress_at(2), parts.strategy, parts.averages)
    assert gate.reached.wait(30)
    assert find_checkpoint(parts.checkpoints.run).step == 1
    assert parts.checkpoints.latest() == parts.checkpoints.folder / "step-00000001"
    gate.opened.set()
    parts.checkpoints.finish()
    assert find_checkpoint(parts.checkpoints.run).step == 2
    file = "optimizer/exp_avg.safetensors"
    one, two = (load_file(parts.checkpoints.folder / f"step-0000000{n}" / file) for n in (1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one)
