"""Killed at any moment, alone or among others, `encode` comes to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.encode import work
from finetune.data.shards import Manifest, ShardError, ShardSet, ShardWriter, json_bytes, verify
from tests.conftest import ROOT, environment
from tests.data_tools.conftest import Result, encoded

Cli = Callable[..., Result]
SHAPES = [(32, 32), (24, 40), (40, 24)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 17, 17 and 5 pictures of three aspects, three of them damaged, and one key twice."""
    root = tmp_path_factory.mktemp("kill") / "images"
    rng = np.random.default_rng(0)
    with ShardWriter(root, "images", max_samples=17) as writer:
        for number in range(39):
            height, width = SHAPES[number % 3]
            data = encoded(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)))
            key = "k003" if number == 30 else f"k{number:03d}"
            record = json_bytes({"captions": [f"picture {number}"]})
            writer.write(key, {"png": data[:70] if number % 13 == 5 else data, "json": record})
        writer.finish()
    return root


@pytest.fixture(scope="module")
def arguments(uneven: Path, vae_folder: Path) -> list[str]:
    sizes = ["--size", "32", "--aspect-buckets", "--bucket-step", "8", "--flip", "0.5", "--crop", "random"]
    return [str(uneven), "--vae", str(vae_folder), *sizes, "--batch", "3", "--shard-samples", "6"]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kill") / "whole"
    assert main(["encode", *arguments, "--workers", "0", "--out", str(out)]) == 0
    assert verify(out) == []
    manifest = Manifest.load(out)
    assert manifest.samples == 39 - 3 - 1
    keys = [ShardSet.open(out).key(i) for i in range(manifest.samples)]
    assert len(set(keys)) == len(keys)
    return out


def same(one: Path, two: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def fork(arguments: list[str], out: Path, renames: int | None = None, workers: int = 0) -> int:
    """Start `encode` in a fork of this process, where torch is loaded; gives its id.

    Args:
        renames: kill it right after so many files were renamed.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if renames is not None:
            rename, left = os.replace, [renames]

            def dying(source: Path, target: Path) -> None:
                rename(source, target)
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = dying  # type: ignore[assignment]
        code = main(["encode", *arguments, "--workers", str(workers), "--out", str(out)])
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a process: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_often(arguments: list[str], undisturbed: Path, out: Path, kills: int, seed: int, workers: int) -> None:
    """Kill until it was killed so often; whenever a set is finished, compare it and begin another one."""
    rng = random.Random(seed)
    begin = time.monotonic()
    assert ended(fork(arguments, out, workers=workers)) == 0
    span = time.monotonic() - begin
    while kills:
        if (out / "manifest.json").exists() and not (out / ".work").exists():
            assert ended(fork(arguments, out, workers=workers)) == 0  # nothing to do, but for tidying up
            same(undisturbed, out)
            shutil.rmtree(out)
        pid = fork(arguments, out, workers=workers)
        time.sleep(rng.uniform(0, span))
        os.kill(pid, signal.SIGKILL)
        kills -= ended(pid) == -signal.SIGKILL
    assert ended(fork(arguments, out, workers=workers)) == 0
    same(undisturbed, out)


def test_three_kills(arguments: list[str], undisturbed: Path, tmp_path: Path) -> None:
    kill_often(arguments, undisturbed, tmp_path / "out", 3, seed=0, workers=0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_thirty_kills(arguments: list[str], undisturbed: Path, tmp_path: Path, workers: int) -> None:
    kill_often(arguments, undisturbed, tmp_path / "out", 30, seed=1, workers=workers)


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_killed_between_any_two_files(arguments: list[str], undisturbed: Path, tmp_path: Path, seed: int) -> None:
    """Each life ends right after it has made one to six files real; three are needed to finish a shard."""
    rng = random.Random(seed)
    lives = 0
    while (code := ended(fork(arguments, tmp_path / "out", renames=rng.randint(1, 6)))) != 0:
        assert code == -signal.SIGKILL
        lives += 1
        assert lives < 200
        if not (tmp_path / "out" / "manifest.json").exists():
            with pytest.raises(ShardError):
                ShardSet.open(tmp_path / "out")
    assert lives >= 5
    same(undisturbed, tmp_path / "out")


@pytest.mark.parametrize("seed", range(3))
def test_of_two_at_once_one_is_killed(arguments: list[str], undisturbed: Path, tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out"
    victim = fork(arguments, out, renames=random.Random(seed).randint(2, 12))
    others = [fork(arguments, out) for _ in range(1 + seed % 2)]
    assert [ended(pid) for pid in others] == [0] * len(others)
    assert ended(victim) in (0, -signal.SIGKILL)
    assert ended(fork(arguments, out)) == 0  # the set is complete; it deletes a lock file left behind
    same(undisturbed, out)


@pytest.mark.parametrize("workers", [1, 3])
def test_same_bytes_whatever_the_number_of_workers(
    cli: Cli, arguments: list[str], undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    assert cli("encode", *arguments, "--workers", workers, "--out", tmp_path / "out").code == 0
    same(undisturbed, tmp_path / "out")


@pytest.mark.slow
def test_torchrun(arguments: list[str], undisturbed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "data_tools"]
    done = subprocess.run(
        [*command, "encode", *arguments, "--workers", "1", "--out", str(tmp_path / "out")],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" latents, mean ") == 1
    same(undisturbed, tmp_path / "out")


def test_a_kill_leaves_nothing_that_loads(
    cli: Cli, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert ended(fork(arguments, out, renames=4)) == -signal.SIGKILL
    with pytest.raises(ShardError, match="never finished; run the same `data-tools encode` again"):
        ShardSet.open(out)
    result = cli("ingest", "folder", tmp_path, "--out", out)
    assert (result.code, "latents that are not finished" in result.err) == (2, True)
    result = cli("encode", out, *arguments[1:], "--out", tmp_path / "other")
    assert (result.code, "unfinished set of latents" in result.err) == (2, True)
    result = cli("encode", *arguments, "--batch", 4, "--workers", 0, "--out", out)
    assert (result.code, "was begun with batch 3 (now: 4)" in result.err) == (2, True)
    assert cli("encode", *arguments, "--workers", 0, "--out", out).code == 0
    same(undisturbed, out)


def test_starting_on_what_is_finished(cli: Cli, arguments: list[str], undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    result = cli("encode", *arguments, "--out", out)
    assert (result.code, "is complete" in result.out) == (0, True)
    same(undisturbed, out)
    result = cli("encode", *arguments, "--flip", "0", "--out", out)
    assert (result.code, "made with flip 0.5 (now: 0.0)" in result.err) == (2, True)
    (out / "00000.tar").write_bytes(b"broken")
    (out / "mine.txt").write_text("stays")
    assert cli("encode", *arguments, "--out", out, "--overwrite").code == 0
    (out / "mine.txt").unlink()
    same(undisturbed, out)


def test_overwrite_goes_on_with_what_is_begun_of_the_same_job(
    arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)

    def units_done(renames: int, *more: str) -> list[str]:
        assert ended(fork([*arguments, "--overwrite", *more], out, renames)) == -signal.SIGKILL
        return sorted(path.name for path in (out / ".work" / "done").glob("[0-9]*"))

    two, three = ["00000.json", "00001.json"], ["00000.json", "00001.json", "00002.json"]
    assert units_done(4) == two  # after job.json and table.json; nothing of the finished set was taken
    assert units_done(1) == three
    assert units_done(4, "--batch", "4") == two  # another job is begun anew
    assert units_done(4) == two
    (out / ".work" / "job.json").write_bytes(b"")
    assert units_done(4) == two
    assert units_done(1) == three
    assert ended(fork([*arguments, "--overwrite"], out)) == 0
    same(undisturbed, out)


def test_what_an_overwrite_had_begun_to_clear_is_not_gone_on_with(
    arguments: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert ended(fork(arguments, out, 4)) == -signal.SIGKILL

    def dying(folder: Path, overwrite: bool) -> None:
        shutil.rmtree(folder / ".work" / "parts")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "clear_folder", dying)
        with pytest.raises(KeyboardInterrupt):
            main(["encode", *arguments, "--batch", "4", "--workers", "0", "--out", str(out), "--overwrite"])
    assert ended(fork(arguments, out)) == 0
    same(undisturbed, out)


def test_overwrite_is_for_one_process(
    cli: Cli, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = cli("encode", *arguments, "--out", tmp_path / "out", "--overwrite")
    assert (result.code, "--overwrite is for one process, not 2" in result.err) == (2, True)
