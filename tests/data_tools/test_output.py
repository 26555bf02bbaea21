"""No command deletes what it is asked to read."""

from __future__ import annotations

import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools import output
from tests.data_tools.conftest import Result

Cli = Callable[..., Result]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_set_is_not_written_over_its_own_source(
    cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path, overwrite: list[str], through_a_link: bool
) -> None:
    source = tmp_path / "foreign"
    source.mkdir()
    shutil.copy(image_shards / "00000.tar", source)
    out = source
    if through_a_link:
        out = tmp_path / "link"
        out.symlink_to(source)
    before = content(source)
    for command in (
        ["ingest", "tars", source / "00000.tar"],
        ["ingest", "hf", source],
        ["ingest", "folder", source],
        ["encode", source, "--vae", vae_folder, "--size", 32],
    ):
        result = cli(*command, "--out", out, *overwrite)
        assert result.code == 2
        assert str(out) in result.err
        assert content(source) == before


def test_the_shards_of_an_image_set_stay(cli: Cli, image_shards: Path, vae_folder: Path) -> None:
    before = content(image_shards)
    result = cli("encode", image_shards, "--vae", vae_folder, "--out", image_shards, "--overwrite")
    assert (result.code, content(image_shards)) == (2, before)
    assert "is where the pictures come from" in result.err


def test_places_that_cannot_be_written(cli: Cli, image_shards: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for command in (
        ["preview", image_shards, "--out", tmp_path / "file" / "sheet.png"],
        ["inspect", image_shards, "--plot", tmp_path / "file" / "plot.png"],
        ["ingest", "folder", photos, "--out", tmp_path / "file" / "shards"],
        ["ingest", "folder", photos, "--out", "/proc/shards"],
    ):
        result = cli(*command)
        assert (result.code, "cannot write" in result.err) == (2, True)
    (tmp_path / "folder.png").mkdir()
    assert cli("preview", image_shards, "--out", tmp_path / "folder.png").code == 2
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png", "images", "photos"}


def test_an_empty_path_is_not_the_current_folder(cli: Cli, monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    """As `$FOLDER` gives where it isn't set."""
    monkeypatch.chdir(photos)
    for command in (
        ["ingest", "folder", "", "--out", "out"],
        ["ingest", "folder", photos, "--out", ""],
        ["ingest", "tars", "", "--out", "out"],
        ["ingest", "hf", "", "--out", "out"],
        ["encode", "", "--vae", "none", "--out", "out"],
        ["encode", photos, "--vae", "", "--out", "out"],
        ["verify", ""],
    ):
        result = cli(*command)
        assert (result.code, "is empty; write . for the current folder" in result.err) == (2, True), result.err


_JOIN = """
import os, sys
from pathlib import Path
from data_tools import output
output._JOIN_SECONDS = 60.0, 0.001
out = Path(sys.argv[1])
def is_there(lock):
    return (out / output.LOCK).exists() and os.path.samestat(os.fstat(lock), (out / output.LOCK).stat())
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    with output.lock_folder(out, shared=True) as lock:
        print("joined", is_there(lock), flush=True)
        sys.argv[2] == "1" and sys.stdin.readline()
        print("leaves", is_there(lock), flush=True)
"""


def joiner(out: Path, times: int) -> subprocess.Popen[str]:
    """A process that joins the folder when it is given a line, so many times; one alone stays for another line."""
    command = [sys.executable, "-c", _JOIN, str(out), str(times)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def test_who_joins_while_the_last_leaves_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = joiner(tmp_path, 1)
    assert child.stdin is not None and child.stdout is not None
    same_file = output._same_file

    def slowly(lock: int, path: Path) -> bool:
        """Between being alone and deleting the file."""
        child.stdin.write("\n")
        child.stdin.flush()
        select.select([child.stdout], [], [], 0.3)  # it must not come in now, if it could
        return same_file(lock, path)

    with output.lock_folder(tmp_path, shared=True):
        monkeypatch.setattr(output, "_same_file", slowly)
    assert child.stdout.readline() == "joined True\n"
    out, _ = child.communicate("\n")
    assert (child.returncode, out) == (0, "leaves True\n")
    assert not (tmp_path / output.LOCK).exists()


def test_many_join_and_leave(tmp_path: Path) -> None:
    """None holds a lock that was deleted under it, and none is turned away."""
    children = [joiner(tmp_path, 400) for _ in range(3)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        out, _ = child.communicate()
        assert (child.returncode, out) == (0, "joined True\nleaves True\n" * 400)
    assert not (tmp_path / output.LOCK).exists()
