"""Folders of pictures: every form of caption, original bytes, damage set aside."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.labels import read_map
from data_tools.rejects import Rejects
from finetune.data.shards import MAP, ShardError, ShardSet, verify
from finetune.data.shards.images import decode_rgb
from tests.data_tools.conftest import Result, encoded, smooth_picture

Cli = Callable[..., Result]


def records(root: Path) -> dict[str, dict[str, Any]]:
    shards = ShardSet.open(root, "images")
    rows = [shards.read_json(i) for i in range(len(shards))]
    return {row["file"]: row for row in rows}


def rejects(root: Path) -> dict[str, str]:
    rows = map(json.loads, (root / "rejects.jsonl").read_text().splitlines())
    return {row["file"]: row["reason"] for row in rows}


def test_sidecars_and_original_bytes(cli: Cli, photos: Path, tmp_path: Path) -> None:
    result = cli("ingest", "folder", photos, "--out", tmp_path / "out")
    assert result.code == 0
    assert "6 pictures in" in result.out
    shards = ShardSet.open(tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert shards.bucket_sizes == {(32, 32): 6}
    for sample_id in range(6):
        row = shards.read_json(sample_id)
        assert row["captions"] == [f"picture {Path(row['file']).stem[1:]}"]
        assert row["original_size"] == [32, 32]
        assert shards.read_member(sample_id, "png") == (photos / row["file"]).read_bytes()
    assert list(records(tmp_path / "out")) == sorted(records(tmp_path / "out"))


def test_sidecars_in_capitals_and_of_no_picture(cli: Cli, photos: Path, tmp_path: Path) -> None:
    (photos / "p0.txt").rename(photos / "p0.TXT")
    (photos / "more" / "p1.txt").rename(photos / "more" / "p1.Txt")
    (photos / "p2.TXT").write_text("gives way to p2.txt")
    (photos / "p4.txt").rename(photos / "p4.png.txt")
    (photos / "more" / "README.TXT").write_text("of no picture")
    (photos / "a.heic").write_bytes(b"")
    (photos / "a.txt").write_text("of a picture that can't be read")
    result = cli("ingest", "folder", photos, "--out", tmp_path / "out")
    assert "1 pictures have no caption, the first is p4.png" in result.out
    assert "3 other files were not looked at (3 .txt)" in result.out
    captions = {name: row["captions"] for name, row in records(tmp_path / "out").items()}
    assert [captions[name] for name in ("p0.png", "more/p1.png", "p2.png")] == [
        ["picture 0"],
        ["picture 1"],
        ["picture 2"],
    ]


METADATA = {
    "jsonl": (
        "metadata.jsonl",
        '{"file_name": "a.png", "text": "one  cat", "class": 3}\n\n{"file_name": "sub/b.png", '
        '"captions": ["two", "deux", "two"]}\n{"file_name": "a.png", "caption": "a cat"}\n',
    ),
    "csv": (
        "metadata.csv",
        'file_name,text,class,captions\na.png,"one  cat",3,\nsub/b.png,,,"[""two"", ""deux""]"\na.png,a cat,3,\n',
    ),
}


@pytest.mark.parametrize("form", sorted(METADATA))
def test_metadata_files(cli: Cli, tmp_path: Path, form: str) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "c.png"):
        (tmp_path / "in" / name).write_bytes(encoded(smooth_picture(0, 8, 8)))
    (tmp_path / "in" / "a.txt").write_text("the sidecar gives way")
    name, text = METADATA[form]
    (tmp_path / "in" / name).write_text("\ufeff" + text, encoding="utf-8")
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "out")
    assert "1 pictures have no caption, the first is c.png" in result.out
    rows = records(tmp_path / "out")
    assert rows["a.png"]["captions"] == ["one cat", "a cat"]
    assert str(rows["a.png"]["class"]) == "3"
    assert rows["sub/b.png"]["captions"] == ["two", "deux"]
    assert rows["c.png"]["captions"] == []


def test_metadata_in_a_subfolder_names_pictures_beside_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "a.png").write_bytes(encoded(smooth_picture(0, 8, 8)))
    (tmp_path / "in" / "sub" / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a"}\n{"file_name": "gone.png", "text": "b"}'
    )
    cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "out")
    assert records(tmp_path / "out")["sub/a.png"]["captions"] == ["a"]
    assert rejects(tmp_path / "out") == {"sub/gone.png": "named in sub/metadata.jsonl, but no such picture"}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name"', "metadata.jsonl, line 2 is not JSON"),
        ("metadata.jsonl", '{"name": "a.png"}', "line 1 has no file_name"),
        ("metadata.jsonl", '["a.png"]', "line 1 is not an object"),
        ("metadata.csv", "name,text\na.png,cat\n", "line 2 has no file_name"),
        ("metadata.csv", "file_name,text\na.png,a cat, sitting\n", "line 2 does not have the 2 columns"),
        (
            "metadata.csv",
            'file_name,text\na.png,"a cat\nb.png,a dog\n',
            "line 2 is not CSV (unexpected end of data)",
        ),
        ("metadata.csv", 'file_name,text\na.png,"a "cat""\n', "line 2 is not CSV (',' expected after '\"')"),
        ("metadata.csv", f'file_name,text\na.png,"{"a cat" * 9**5}\n', "line 2 is not CSV (unexpected end"),
        ("metadata.csv", f"file_name,captions\na.png,{'[' * 9**5}\n", "line 2: captions is not a JSON list"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ' + "[" * 9**5, "line 1 is not JSON (maximum recursion"),
    ],
)
def test_broken_metadata_is_named_by_line(cli: Cli, tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(smooth_picture(0, 8, 8)))
    (tmp_path / "in" / name).write_text(text)
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "out")
    assert result.code == 2
    assert says in result.err
    assert not (tmp_path / "out").exists()


def test_captions_that_are_not_utf8_are_set_aside(cli: Cli, photos: Path, tmp_path: Path) -> None:
    (photos / "p0.txt").write_bytes("un café".encode("utf-16"))
    (photos / "p2.txt").write_bytes("one\nun café".encode("latin-1"))
    (photos / "p4.txt").write_bytes("un café".encode("utf-16-le"))  # without its mark: ASCII and NULs
    assert cli("ingest", "folder", photos, "--out", tmp_path / "out").code == 0
    assert records(tmp_path / "out")["p0.png"]["captions"] == ["un café"]
    reasons = rejects(tmp_path / "out")
    assert set(reasons) == {"p2.png", "p4.png"}
    assert reasons["p2.png"].startswith("p2.txt: line 2 is not UTF-8; convert it")
    for encoding in ("utf-16", "latin-1"):
        (photos / "metadata.csv").write_bytes("file_name,text\np4.png,un thé\n".encode(encoding))
        result = cli("ingest", "folder", photos, "--out", tmp_path / "more", "--overwrite")
        if encoding == "utf-16":
            assert records(tmp_path / "more")["p4.png"]["captions"] == ["un thé"]
        else:
            assert (result.code, "metadata.csv, line 2 is not UTF-8" in result.err) == (2, True)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_the_locale_cannot_read_are_set_aside(photos: Path, tmp_path: Path, encoding: str) -> None:
    os.rename(photos / "p0.png", os.path.join(os.fsencode(photos), b"caf\xe9.png"))
    (photos / "p2.png").rename(photos / "pü.png")
    out = os.path.join(os.fsencode(tmp_path), b"out\xe9")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = {**os.environ, **(plain if encoding == "ascii" else {"PYTHONUTF8": "1"})}
    command = [sys.executable, "-m", "data_tools", "ingest", "folder", photos, "--out", out]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    unread = 1 if encoding == "utf-8" else 2
    assert b"%d pictures in " % (6 - unread) in done.stdout
    reasons = rejects(Path(os.fsdecode(out)))
    assert len(reasons) == unread
    assert reasons["caf\udce9.png"].startswith(f"its name is not {encoding}; rename it")


def test_corrupt_pictures_are_set_aside(cli: Cli, photos: Path, tmp_path: Path) -> None:
    (photos / "p0.png").write_bytes((photos / "p0.png").read_bytes()[:120])
    (photos / "zz.jpg").write_bytes(b"this is no picture")
    result = cli("ingest", "folder", photos, "--out", tmp_path / "out")
    assert result.code == 0
    assert "5 pictures" in result.out
    assert "2 set aside" in result.out
    assert set(rejects(tmp_path / "out")) == {"p0.png", "zz.jpg"}
    assert rejects(tmp_path / "out")["zz.jpg"] == "not a picture in a known format"
    assert "p0.png" not in records(tmp_path / "out")
    assert verify(tmp_path / "out") == []


def test_nothing_left_is_an_error(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "out")
    assert (result.code, "no pictures in" in result.err) == (2, True)
    (tmp_path / "in" / "a.png").write_bytes(b"")
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "out")
    assert (result.code, "a.png: empty file" in result.err) == (2, True)
    with pytest.raises(ShardError):
        ShardSet.open(tmp_path / "out")


def test_size_and_format(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = smooth_picture(3, 30, 60)
    (tmp_path / "in" / "a.bmp").write_bytes(encoded(image, "BMP"))
    cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "kept")
    shards = ShardSet.open(tmp_path / "kept")  # a format that shards don't hold becomes png, losslessly
    np.testing.assert_array_equal(np.asarray(decode_rgb(shards.read_member(0, "png"))), np.asarray(image))
    cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "sized", "--size", 16)
    shards = ShardSet.open(tmp_path / "sized")
    want = image.resize((32, 16), Image.Resampling.LANCZOS).crop((8, 0, 24, 16))
    np.testing.assert_array_equal(np.asarray(decode_rgb(shards.read_member(0, "png"))), np.asarray(want))
    record = shards.read_json(0)
    assert (record["original_size"], record["crop"]) == ([30, 60], [0, 8, 16, 16])
    assert shards.bucket_sizes == {(16, 16): 1}
    cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "webp", "--size", 16, "--format", "webp")
    assert decode_rgb(ShardSet.open(tmp_path / "webp").read_member(0, "webp")).size == (16, 16)
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "x", "--size", 16, "--format", "keep")
    assert (result.code, "contradict" in result.err) == (2, True)


def test_what_is_no_readable_picture_is_told(cli: Cli, photos: Path, tmp_path: Path) -> None:
    for name in ("a.HEIC", "more/b.dng", "film.mp4", "two.mp4", "bare", ".hidden.heic"):
        (photos / name).write_bytes(b"II*\0")
    (tmp_path / "elsewhere").mkdir()
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "metadata.jsonl").write_text('{"file_name": "a.HEIC", "text": "a"}\n')
    out = photos / "shards"
    for again in ([], ["--overwrite"]):  # its own shards are not among what it tells
        result = cli("ingest", "folder", photos, "--out", out, *again)
        assert result.code == 0
        assert "3 other files were not looked at (2 .mp4, 1 without suffix)" in result.out
        assert "6 pictures in" in result.out
        rows = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
        assert [row["file"] for row in rows] == ["a.HEIC", "linked", "more/b.dng"]
        assert rows[1]["reason"] == "a link to a folder; give that folder itself"
        assert rows[2]["reason"] == ".dng files can't be read; convert them to JPEG or PNG"


def test_pictures_of_several_sizes_have_no_bucket(cli: Cli, photos: Path, tmp_path: Path) -> None:
    (photos / "wide.jpg").write_bytes(encoded(smooth_picture(9, 16, 48), "JPEG"))
    cli("ingest", "folder", photos, "--out", tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    assert {shard.bucket for shard in shards.manifest.shards} == {None}
    assert set(shards.manifest.members) == {"png", "jpg", "json"}
    assert verify(tmp_path / "out") == []


def test_same_folder_same_bytes(cli: Cli, photos: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        cli("ingest", "folder", photos, "--out", tmp_path / out, "--shard-samples", 4)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "00001.tar" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_output_folder_is_respected(cli: Cli, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    (out / ".00000.tar.tmp").write_bytes(b"")  # as a kill leaves it
    result = cli("ingest", "folder", photos, "--out", out)
    assert (result.code, "a set that was never finished" in result.err) == (2, True)
    (out / ".00000.tar.tmp").unlink()
    result = cli("ingest", "folder", photos, "--out", out)
    assert (result.code, "is not empty (notes.md)" in result.err) == (2, True)
    assert cli("ingest", "folder", photos, "--out", out, "--overwrite").code == 0
    result = cli("ingest", "folder", photos, "--out", out)
    assert (result.code, "already holds a finished set of 6 samples" in result.err) == (2, True)
    (photos / "p0.png").unlink()
    assert cli("ingest", "folder", photos, "--out", out, "--overwrite").code == 0
    assert len(ShardSet.open(out)) == 5
    assert (out / "notes.md").read_text() == "mine"
    hold = "import sys; from data_tools.output import lock_folder; from pathlib import Path\n"
    hold += "with lock_folder(Path(sys.argv[1]), shared=False): print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        result = cli("ingest", "folder", photos, "--out", out, "--overwrite")
        assert (result.code, "in use by another process" in result.err) == (2, True)
    assert len(ShardSet.open(out)) == 5
    result = cli("ingest", "folder", photos, "--out", photos / "p2.txt")
    assert result.code == 2


def test_maps_of_pictures_that_are_read_at_a_reduced_scale(cli: Cli, tmp_path: Path) -> None:
    for folder, data in (
        ("in", encoded(smooth_picture(0, 64, 96), "JPEG")),
        ("maps", encoded(Image.fromarray(np.repeat(np.arange(96, dtype=np.uint8), 64).reshape(96, 64).T))),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"a.{'jpg' if folder == 'in' else 'png'}").write_bytes(data)
    command = ("ingest", "folder", tmp_path / "in", "--maps", tmp_path / "maps", "--out", tmp_path / "out")
    assert cli(*command, "--max-pixels", 2000, "--format", "png").code == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.bucket_sizes == {(32, 48): 1}
    labels_HW = np.asarray(read_map(shards.read_member(0, MAP), (32, 48)))
    np.testing.assert_array_equal(labels_HW, np.tile(np.arange(1, 96, 2), (32, 1)))


def test_metadata_that_spells_accents_in_another_form(cli: Cli, tmp_path: Path) -> None:
    """As a folder from macOS with a table from elsewhere: the same name in other code points."""
    (tmp_path / "in").mkdir()
    for name in ("e\u0301.png", "\u00e8.png", "e\u0300.png"):
        (tmp_path / "in" / name).write_bytes(encoded(smooth_picture(0, 8, 8)))
    rows = {"\u00e9.png": "acute", "\u00e8.png": "grave"}
    (tmp_path / "in" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in rows.items()), encoding="utf-8"
    )
    assert cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "out").code == 0
    captions = {name: row["captions"] for name, row in records(tmp_path / "out").items()}
    assert captions == {"e\u0301.png": ["acute"], "\u00e8.png": ["grave"], "e\u0300.png": []}
    assert not (tmp_path / "out" / "rejects.jsonl").exists()


def test_names_of_classes_that_are_not_utf8(cli: Cli, tmp_path: Path) -> None:
    for folder in ("cat", os.fsdecode(b"caf\xe9")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "a.png").write_bytes(encoded(smooth_picture(0, 8, 8)))
    assert cli("ingest", "folder", tmp_path / "in", "--classes", "--out", tmp_path / "out").code == 0
    assert ShardSet.open(tmp_path / "out").classes() == ["cat"]
    (reason,) = rejects(tmp_path / "out").values()
    assert reason.startswith("its name is not utf-8")
    # Half a character, as JSON may spell it.
    (tmp_path / "in" / "classes.json").write_text('["cat", "\\ud83d"]')
    assert cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "named").code == 0
    assert ShardSet.open(tmp_path / "named").classes() == ["cat", "\ufffd"]


def test_names_that_would_write_to_the_terminal(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "-a\x1b[31m\nb.png").write_bytes(encoded(smooth_picture(0, 8, 8)))
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "out")
    assert "1 pictures have no caption, the first is -a?[31m?b.png\n" in result.out
    assert list(records(tmp_path / "out")) == ["-a\x1b[31m\nb.png"]


def test_a_full_disk_is_one_line(cli: Cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = cli("ingest", "folder", photos, "--out", tmp_path / "out")
    assert result.code == 2
    assert "no space left on device while writing" in result.err
    with pytest.raises(ShardError, match="never finished"):
        ShardSet.open(tmp_path / "out")


def test_rejects_on_a_full_disk_leave_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with Rejects(tmp_path) as rows, Path("/dev/full").open("w") as full:
            rows.add("a.png", "broken")
            assert rows._file is not None
            os.dup2(full.fileno(), rows._file.fileno())
            rows.save()

    with pytest.raises(OSError, match=re.escape(str(tmp_path / "rejects.jsonl"))):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.ESTALE, 74, "Stale file handle; start the same command again"),
        (errno.EACCES, 2, "Permission denied; choose another place or mend its permissions"),
        (errno.EMFILE, 2, "Too many open files; end other programs or raise the limit"),
    ],
)
def test_a_picture_that_the_machine_cannot_read_now_is_not_set_aside(
    cli: Cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, says: str
) -> None:
    read_bytes = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "p2.png":
            raise OSError(number, os.strerror(number))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    result = cli("ingest", "folder", photos, "--out", tmp_path / "out")
    assert (result.code, f"{photos / 'p2.png'}: {says}" in result.err) == (code, True), result.err
    with pytest.raises(ShardError, match="never finished"):
        ShardSet.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--quality", "0"], "--quality 0 is outside"),
        (["--background", "nocolour"], "no colour 'nocolour'"),
        (["--size", "-3"], "'-3' is not a whole number"),
        (["--size", "99999999"], "99999999 is too large a side"),
        (["--format", "gif"], "invalid choice"),
    ],
)
def test_wrong_arguments(cli: Cli, photos: Path, tmp_path: Path, extra: list[str], says: str) -> None:
    result = cli("ingest", "folder", photos, "--out", tmp_path / "out", *extra)
    assert (result.code, says in result.err) == (2, True)
    assert cli("ingest", "folder", photos / "nowhere", "--out", tmp_path / "out").code == 2
