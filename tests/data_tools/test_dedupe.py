"""Duplicates are found, listed, and nothing else is."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_tools.dedupe import fingerprints
from data_tools.dedupe.fingerprints import ROW, Item, Part, fingerprint
from data_tools.dedupe.table import Table, find_duplicates
from data_tools.encode.excluded import Excluded
from data_tools.pictures import Picture, PictureSource
from data_tools.workers import Workers
from finetune import UserError
from finetune.data.shards import ShardSet, ShardWriter
from tests.data_tools.conftest import Result, encoded

Cli = Callable[..., Result]


def scene(seed: int, side: int = 96) -> Image.Image:
    """A picture with detail at all scales, as photographs have."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    f[0, 0] = 1 / side
    field = np.stack([np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) / f).real for _ in range(3)], axis=-1)
    field = field[..., :1] + 0.4 * field
    return Image.fromarray((field / field.std() * 45 + rng.uniform(100, 150, 3)).clip(0, 255).astype(np.uint8))


def write_set(root: Path, pictures: dict[str, bytes], per_shard: int = 3) -> Path:
    with ShardWriter(root, "images", max_samples=per_shard) as writer:
        for key, data in pictures.items():
            member = {b"\x89P": "png", b"\xff\xd8": "jpg", b"RI": "webp"}[data[:2]]
            writer.write(key, {member: data, "txt": key.encode()}, None)
        writer.finish()
    return root


def rows(root: Path) -> dict[str, dict[str, object]]:
    _, *lines = (root / "duplicates.jsonl").read_text().splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def test_exact_and_near_duplicates(cli: Cli, tmp_path: Path) -> None:
    first, second = scene(1), scene(2)
    half = second.resize((48, 48), Image.Resampling.LANCZOS)
    root = write_set(
        tmp_path / "set",
        {
            "a": encoded(first),
            "b": encoded(half),
            "c": encoded(first, compress_level=0),  # other bytes, the same pixels
            "d": encoded(second),
            "e": encoded(first, "JPEG", quality=80),
            "f": encoded(scene(3)),
            "g": encoded(second.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
            "h": encoded(ImageEnhance.Color(first).enhance(0)),
        },
    )
    result = cli("dedupe", root, "--workers", 1)
    assert result.code == 0, result.err
    assert "8 pictures, 1 exact and 2 near duplicates" in result.out
    found = rows(root)
    assert list(found) == ["b", "c", "e"]
    assert found["c"] == {"key": "c", "duplicate_of": "a", "distance": 0, "exact": True}
    assert (found["e"]["duplicate_of"], found["e"]["exact"]) == ("a", False)
    assert found["b"]["duplicate_of"] == "d"  # the one with more pixels stays, though it comes later
    assert cli("dedupe", root, "--workers", 1, "--exact").code == 0
    assert list(rows(root)) == ["c"]
    assert cli("verify", root).code == 0


def test_across_sets_and_foreign_tars(cli: Cli, tmp_path: Path) -> None:
    ours = write_set(tmp_path / "ours", {f"k{n}": encoded(scene(n)) for n in range(4)}, per_shard=2)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with tarfile.open(foreign / "00.tar", "w") as tar:
        for name, data in (
            ("x.jpg", encoded(scene(2), "JPEG", quality=90)),
            ("bad.png", b"no picture"),
            ("y.png", encoded(scene(9))),
            ("z.png", encoded(scene(3).resize((192, 192), Image.Resampling.LANCZOS))),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    result = cli("dedupe", ours, foreign)
    assert result.code == 0, result.err
    keys = {picture.key: picture for picture in PictureSource.open(foreign) if isinstance(picture, Picture)}
    x, _, _, z = keys
    assert rows(foreign) == {
        x: {
            "key": x,
            "duplicate_of": "k2",
            "set": "../ours",
            "distance": rows(foreign)[x]["distance"],
            "exact": False,
        }
    }
    assert [(row["key"], row["duplicate_of"], row["set"]) for row in rows(ours).values()] == [
        ("k3", z, "../foreign")
    ]
    assert "can't be read" in result.out


def test_what_is_known_is_kept_and_renewed(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_set(tmp_path / "set", {f"k{n}": encoded(scene(n % 5)) for n in range(7)})
    assert cli("dedupe", root).code == 0
    first = (root / "duplicates.jsonl").read_bytes()
    assert [row["key"] for row in rows(root).values()] == ["k5", "k6"]
    known = sorted((root / ".dedupe").iterdir())
    assert [path.name for path in known] == ["00000.tar.known", "00001.tar.known", "00002.tar.known"]

    looked: list[int] = []

    def spy(item: Item) -> bytes | None:
        looked.append(item[1])
        return fingerprint(item)

    monkeypatch.setattr(fingerprints, "fingerprint", spy)
    monkeypatch.setattr(fingerprints, "Workers", lambda count: _Inline())
    # Half a file, another file, none: only these shards are read again, and the list is the same.
    whole = known[0].read_bytes()
    for damage, unit in (
        (lambda: known[0].write_bytes(whole[:-1]), 0),
        (lambda: known[1].write_bytes(whole), 1),
        (lambda: known[2].unlink(), 2),
    ):
        looked.clear()
        damage()
        assert cli("dedupe", root).code == 0
        assert set(looked) == {unit}
        assert (root / "duplicates.jsonl").read_bytes() == first
    looked.clear()
    assert cli("dedupe", root, "--distance", 3).code == 0
    assert looked == []


def test_a_set_is_for_one_at_a_time(cli: Cli, tmp_path: Path) -> None:
    """Two would write the same temporary files."""
    one, two = (write_set(tmp_path / name, {"a": encoded(scene(1))}) for name in ("one", "two"))
    hold = "import sys; from pathlib import Path; from data_tools.output import lock_folder\n"
    hold += "with lock_folder(Path(sys.argv[1]), shared=False): print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(two / ".dedupe")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        result = cli("dedupe", one, two)
        assert (result.code, f"{two / '.dedupe'} is in use by another process" in result.err) == (2, True)
    assert cli("dedupe", one, two).code == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a map of a file without blocks of its own would be a bus error."""
    root = write_set(tmp_path / "set", {"a": encoded(scene(1)), "b": encoded(scene(1))})
    killed = root / ".dedupe" / "sort-killed"
    killed.mkdir(parents=True)
    (killed / "hashes").write_bytes(b"of a run that was killed")

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        result = cli("dedupe", root)
    assert (result.code, "no space left on device while writing" in result.err) == (2, True)
    assert not list((root / ".dedupe").glob("sort-*"))
    assert cli("dedupe", root).code == 0 and len(rows(root)) == 1


def test_lists_of_several_sets_change_together(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (write_set(tmp_path / name, {name: encoded(scene(1))}) for name in ("one", "two"))
    assert cli("dedupe", one, two).code == 0
    lists = [root / "duplicates.jsonl" for root in (one, two)]
    before = [path.read_bytes() for path in lists]
    calls = itertools.count(1)

    def full(fd: int) -> None:
        if next(calls) == 2:  # of the second list
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = cli("dedupe", two, one)
    assert (result.code, f"while writing {lists[0]};" in result.err) == (2, True)
    assert [path.read_bytes() for path in lists] == before
    assert cli("dedupe", two, one).code == 0
    assert ([*rows(two)], [*rows(one)]) == ([], ["one"])


class _Inline:
    """`Workers(0)`, which sees what a test puts in the place of a function."""

    def __enter__(self) -> Workers:
        return Workers(0)

    def __exit__(self, *_: object) -> None:
        pass


def test_the_same_list_whatever_the_workers(cli: Cli, tmp_path: Path) -> None:
    pictures = {f"k{n}": encoded(scene(n % 7), "JPEG", quality=60 + n) for n in range(20)}
    lists = []
    for workers in (1, 3):
        root = write_set(tmp_path / f"set{workers}", pictures)
        assert cli("dedupe", root, "--workers", workers).code == 0
        lists.append((root / "duplicates.jsonl").read_bytes())
    assert lists[0] == lists[1]
    assert lists[0].count(b"\n") == 1 + 13


def test_dry_run_and_report(cli: Cli, tmp_path: Path) -> None:
    root = write_set(
        tmp_path / "set", {"a": encoded(scene(1)), "b": encoded(scene(1), "JPEG"), "c": encoded(scene(2))}
    )
    result = cli("dedupe", root, "--dry-run", "--report", tmp_path / "new" / "pairs.png")
    assert result.code == 0, result.err
    assert "1 near duplicates; nothing written" in result.out
    assert not (root / "duplicates.jsonl").exists()
    sheet = np.asarray(Image.open(tmp_path / "new" / "pairs.png")).astype(int)
    left, right = sheet[2:98, 2 + 16 : 2 + 112], sheet[2:98, 2 + 128 + 16 : 2 + 128 + 112]
    shift = [np.abs(np.roll(left, s, axis=0)[30:60] - np.roll(right, s, axis=0)[30:60]).mean() for s in (0,)]
    assert min(shift) < 12


def test_nothing_found_replaces_the_old_list(cli: Cli, tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", {"a": encoded(scene(1)), "b": encoded(scene(2))})
    (root / "duplicates.jsonl").write_text('{"key": "b"}\n')
    assert cli("dedupe", root).code == 0
    assert rows(root) == {}


def test_a_list_goes_with_its_pictures(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    """Keys of folders are running numbers: in a set made anew they are other pictures'."""
    for name, seeds in (("first", (1, 1, 2)), ("second", (3, 4, 5))):
        (tmp_path / name).mkdir()
        for number, seed in enumerate(seeds):
            (tmp_path / name / f"{number}.png").write_bytes(encoded(scene(seed)))
    root = tmp_path / "set"
    encode = ("encode", root, "--vae", vae_folder, "--size", 32, "--workers", 0)
    ingest = ("ingest", "folder", tmp_path / "second", "--out", root, "--overwrite")
    assert cli("ingest", "folder", tmp_path / "first", "--out", root).code == 0
    assert cli("dedupe", root).code == 0
    old = (root / "duplicates.jsonl").read_bytes()
    assert list(rows(root)) == [ShardSet.open(root).key(1)]
    assert cli(*encode, "--out", tmp_path / "a").code == 0
    assert len(ShardSet.open(tmp_path / "a")) == 2

    assert cli(*ingest).code == 0
    assert not (root / "duplicates.jsonl").exists()
    assert not (root / ".dedupe").exists()
    (root / "duplicates.jsonl").write_bytes(old)  # by whatever way it came back
    result = cli(*encode, "--out", tmp_path / "b")
    assert (result.code, "of pictures that are no longer in" in result.err) == (2, True)
    assert cli(*encode, "--out", tmp_path / "b", "--keep-duplicates").code == 0
    assert len(ShardSet.open(tmp_path / "b")) == 3
    (tmp_path / "list").write_bytes(old)  # who names a list means it
    (root / "duplicates.jsonl").unlink()
    assert cli(*encode, "--out", tmp_path / "c", "--exclude", tmp_path / "list").code == 0
    assert len(ShardSet.open(tmp_path / "c")) == 2


def test_each_list_says_of_which_set_it_is(cli: Cli, tmp_path: Path) -> None:
    roots = [write_set(tmp_path / name, {f"{name}{n}": encoded(scene(n)) for n in range(2)}) for name in "ab"]
    assert cli("dedupe", *roots).code == 0
    said = [json.loads((root / "duplicates.jsonl").read_text().splitlines()[0]) for root in roots]
    a, b = (PictureSource.open(root).identity() for root in roots)
    assert said == [{"pictures": a, "sets": {"../b": b}}, {"pictures": b, "sets": {"../a": a}}]
    sources = [PictureSource.open(root) for root in roots]
    left_out = [Excluded.load(source, None, keep_duplicates=False) for source in sources]
    assert [[f"{name}{n}" in each for n in range(2)] for name, each in zip("ab", left_out)] == [
        [False] * 2,
        [True] * 2,
    ]

    write_set(tmp_path / "new", {f"a{n}": encoded(scene(5 + n)) for n in range(2)})
    shutil.rmtree(roots[0])
    assert Excluded.load(sources[1], None, keep_duplicates=False)  # its originals are elsewhere, or encoded by now
    (tmp_path / "new").rename(roots[0])
    with pytest.raises(
        UserError, match="leaves out copies of pictures that are no longer in ../a; run `data-tools"
    ):
        Excluded.load(sources[1], None, keep_duplicates=False)
    for own, count in (("", 0), ("b0\n", 1), ('{"key": "b1"}\nb0', 2)):  # of somebody who says nothing more
        (roots[1] / "duplicates.jsonl").write_text(own)
        assert len(Excluded.load(sources[1], None, keep_duplicates=False).digests) == count


def test_mistakes(cli: Cli, tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", {"a": encoded(scene(1))})
    for options, message in (
        ((root, root / "."), "is given twice"),
        ((root, "--distance", 99), "--distance 99 is outside 0 to 32"),
        ((root, "--colour", -1), "--colour -1 is outside"),
        ((root, "--report", "pairs.txt"), "should end in .png"),
        ((tmp_path / "nowhere",), "no folder"),
    ):
        result = cli("dedupe", *options)
        assert (result.code, message in result.err) == (2, True), result.err


def test_emoji_are_all_different(cli: Cli, tmp_path: Path) -> None:
    """300 of the bundled ones: flat pictures on white, alike in shape, some in colour alone."""
    shards = ShardSet.open("fluent-emoji")
    chosen = {sample["__key__"]: sample["webp"] for sample in map(shards.read, range(0, 1200, 4))}
    hearts = [key for key in (shards.key(n) for n in range(1200)) if key.endswith("-heart")]
    assert len(hearts) > 5  # red, blue, green, ...
    chosen |= {shards.key(n): shards.read(n)["webp"] for n in range(1200) if shards.key(n) in hearts}
    root = write_set(tmp_path / "set", chosen, per_shard=500)
    assert cli("dedupe", root, "--workers", 2).code == 0
    assert rows(root) == {}


def test_blank_pictures_of_any_size_are_alike_by_colour(cli: Cli, tmp_path: Path) -> None:
    pictures = {}
    for number, colour in enumerate(["white", "red", "#fdfdfd", "white", "black", "#ff0202"]):
        pictures[f"k{number}"] = encoded(Image.new("RGB", (40 - number, 40), colour))
    root = write_set(tmp_path / "set", pictures)
    assert cli("dedupe", root).code == 0
    assert {key: row["duplicate_of"] for key, row in rows(root).items()} == {"k2": "k0", "k3": "k0", "k5": "k1"}


def test_a_chain_keeps_its_ends(tmp_path: Path) -> None:
    """Each is near the next: the first goes with the second, the third stays, being near none that stays."""
    levels = [100, 106, 112, 118, 124]
    rows_ = [np.zeros((), ROW) for _ in levels]
    for number, (row, level) in enumerate(zip(rows_, levels)):
        row["cells"], row["digest"] = level, number
    known = tmp_path / "part"
    fingerprints._save(known, {}, [row.tobytes() for row in rows_], [f"k{n}" for n in range(5)], 0)
    start = known.read_bytes().index(b"\n") + 1
    part = Part(PictureSource(tmp_path, None, None), 0, known, start, 5, 0)
    (tmp_path / "work").mkdir()
    table = Table.gather([part], tmp_path / "work")
    assert [table.key(place) for place in range(5)] == ["k0", "k1", "k2", "k3", "k4"]
    assert find_duplicates(table, 10, 8).kept.tolist() == [0, 0, 2, 2, 4]
    assert find_duplicates(table, 10, 5).kept.tolist() == [0, 1, 2, 3, 4]
    assert find_duplicates(table, None, 8).kept.tolist() == [0, 1, 2, 3, 4]
