"""Tars: WebDataset's of any kind, img2dataset's with its parquet, and what in them can't be used."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.filters import Filters
from data_tools.ingest.items import Found
from data_tools.ingest.options import Options
from data_tools.ingest.prepare import prepare
from data_tools.ingest.tars import find_tars, member_name, tar_names
from data_tools.pictures import Picture, PictureSource
from finetune import UserError
from finetune.data.shards import ShardSet, verify
from finetune.data.shards.images import MAX_PIXELS, decode_rgb
from tests.data_tools.conftest import Result, encoded, smooth_picture

Cli = Callable[..., Result]


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def jpeg(seed: int, height: int = 24, width: int = 32) -> bytes:
    return encoded(smooth_picture(seed, height, width), "JPEG", quality=90)


def samples(root: Path) -> dict[str, dict[str, Any]]:
    shards = ShardSet.open(root, "images")
    rows = {}
    for i in range(len(shards)):
        row = shards.read(i)
        rows[row.pop("__key__")] = {
            name: json.loads(data) if name == "json" and isinstance(data, bytes) else data
            for name, data in row.items()
        }
    return rows


def rejects(root: Path) -> dict[str, str]:
    rows = map(json.loads, (root / "rejects.jsonl").read_text().splitlines())
    return {row["file"]: row["reason"] for row in rows}


def test_captions_that_are_not_utf8_are_set_aside(cli: Cli, tmp_path: Path) -> None:
    texts = {"one": "café".encode("latin-1"), "two": "café".encode("utf-16"), "three": "café".encode()}
    files = {f"{key}.jpg": jpeg(1) for key in texts} | {f"{key}.txt": text for key, text in texts.items()}
    write_tar(tmp_path / "in" / "a.tar", dict(sorted(files.items())))
    assert cli("ingest", "tars", tmp_path / "in", "--out", tmp_path / "out").code == 0
    assert [row["json"]["captions"] for row in samples(tmp_path / "out").values()] == [["café"], ["café"]]
    (reason,) = rejects(tmp_path / "out").values()
    assert reason.startswith("its caption, line 1 is not UTF-8")
    pictures = list(PictureSource.open(tmp_path / "in").read(0))  # as `encode` reads them
    assert [isinstance(picture, Picture) for picture in pictures] == [False, True, True]


def test_a_tar_whose_name_is_not_utf8(cli: Cli, tmp_path: Path) -> None:
    """As one that was unpacked on another system; its rejects are listed, and its pictures kept."""
    source = tmp_path / "in"
    write_tar(source / os.fsdecode(b"caf\xe9.tar"), {"one.jpg": jpeg(1), "two.jpg": b"broken"})
    (source / os.fsdecode(b"d\xe9.tar")).write_bytes(b"no tar at all")
    for command in (
        ("ingest", "tars", source, "--out", tmp_path / "out"),
        ("encode", source, "--vae", "none", "--size", 16, "--workers", 0, "--out", tmp_path / "latents"),
        ("dedupe", source, "--workers", 0),
    ):
        assert cli(*command).code == 0
    assert len(samples(tmp_path / "out")) == 1
    assert os.fsdecode(b"d\xe9.tar") in rejects(tmp_path / "latents")


def test_a_key_that_comes_back_is_set_aside(cli: Cli, tmp_path: Path) -> None:
    """`tar -r` appends; the two would be in different shards, where nobody else would see it."""
    tar = write_tar(tmp_path / "a.tar", {"one.jpg": jpeg(1), "two.jpg": jpeg(2)})
    with tarfile.open(tar, "a") as more:
        info = tarfile.TarInfo("one.jpg")
        info.size = len(jpeg(3))
        more.addfile(info, io.BytesIO(jpeg(3)))
    out = tmp_path / "out"
    assert cli("ingest", "tars", tar, "--shard-samples", 1, "--out", out).code == 0
    assert rejects(out) == {"a.tar: one": "the key was there before; keys must differ"}
    assert {key: row["jpg"] for key, row in samples(out).items()} == {"a_one": jpeg(1), "a_two": jpeg(2)}
    assert cli("verify", out).code == 0


def test_members_become_what_they_mean(cli: Cli, tmp_path: Path) -> None:
    mask, depth = encoded(smooth_picture(1, 24, 32).convert("L")), b"\x93NUMPY and so on"
    write_tar(
        tmp_path / "in" / "a.tar",
        {
            "one.jpg": jpeg(1),
            "one.json": json.dumps({"caption": " a  cat ", "aesthetic": 6.5, "bad": float("nan")}).encode(),
            "one.txt": b"not this one",
            "one.mask.png": mask,
            "one.Depth Map.npy": depth,
            "dir/two.PNG": encoded(smooth_picture(2, 24, 32)),
            "dir/two.txt": "\ufeffa dog\n".encode(),
            "dir/two.cls": b"7\n",
            "three.gif": encoded(smooth_picture(3, 24, 32).quantize(), "GIF"),
            "three.cls": b"tabby cat",
            "four.txt": b"no picture",
            "five.jpg": b"broken",
            "six.jpg": jpeg(6),
            "six.png": encoded(smooth_picture(6, 24, 32)),
            "seven.jpg": jpeg(7),
            "seven.json": b"{",
            "../../eight.jpg": jpeg(8),
        },
    )
    out = tmp_path / "out"
    result = cli("ingest", "tars", tmp_path / "in", "--out", out)
    assert result.code == 0, result.err
    assert "4 pictures in" in result.out
    rows = samples(out)
    keys = list(rows)
    assert keys[0] == "a_one"
    one, two, three, eight = rows.values()
    assert one["jpg"] == jpeg(1)
    assert one["json"] == {"captions": ["a cat"], "original_size": [24, 32], "aesthetic": 6.5}
    assert (one["mask.png"], one["depth-map.npy"]) == (mask, depth)
    assert two["json"] == {"captions": ["a dog"], "original_size": [24, 32], "class": 7}
    assert three["json"] == {"captions": [], "original_size": [24, 32], "class": "tabby cat"}
    want = np.asarray(smooth_picture(3, 24, 32).quantize().convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_rgb(three["png"])), want)
    assert eight["jpg"] == jpeg(8)
    assert rejects(out) == {
        "a.tar: four": "no picture (members: txt)",
        "a.tar: five": "not a picture in a known format",
        "a.tar: six": "several pictures (jpg, png); give --picture",
        "a.tar: seven": rejects(out)["a.tar: seven"],
    }
    assert "json is not JSON" in rejects(out)["a.tar: seven"]
    assert verify(out) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_picture_may_be_chosen(cli: Cli, tmp_path: Path) -> None:
    files = {"a.rgb.png": encoded(smooth_picture(1, 9, 9)), "a.png": b"other", "a.json": b"{}", "b.png": b"x"}
    write_tar(tmp_path / "x.tar", files)
    assert cli("ingest", "tars", tmp_path / "x.tar", "--picture", "rgb.png", "--out", tmp_path / "out").code == 0
    (row,) = samples(tmp_path / "out").values()
    assert (row["png"], row["other.png"]) == (files["a.rgb.png"], b"other")
    assert rejects(tmp_path / "out") == {"x.tar: b": "no rgb.png (members: png)"}


def img2dataset(folder: Path, shard: int, rows: list[dict[str, Any]], lost: int | None = None) -> None:
    """A tar and its parquet as img2dataset leaves them; `lost` is in the parquet alone."""
    import pyarrow
    from pyarrow import parquet

    files = {}
    for number, row in enumerate(rows):
        row.setdefault("key", f"{shard:05d}{number:04d}")
        row.setdefault("status", "success")
        row.update(original_width=640, original_height=480, width=32, height=24, exif="{}")
        if row["status"] == "success" and number != lost:
            files[f"{row['key']}.jpg"] = jpeg(number)
            files[f"{row['key']}.json"] = json.dumps({k: v for k, v in row.items() if k != "score"}).encode()
            files[f"{row['key']}.txt"] = row["caption"].encode()
    write_tar(folder / f"{shard:05d}.tar", files)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    (folder / f"{shard:05d}_stats.json").write_text("{}")


def test_img2dataset_output_is_joined_with_its_parquet(cli: Cli, tmp_path: Path) -> None:
    urls = [{"url": f"https://example.org/{n}.jpg", "caption": f"picture {n}", "score": n / 2} for n in range(6)]
    urls[2]["status"], urls[2]["error_message"] = "failed_to_download", "HTTP Error 404"
    urls[4]["status"] = "failed_to_resize"
    img2dataset(tmp_path / "in", 0, urls[:5], lost=3)
    img2dataset(tmp_path / "in", 1, urls[5:])
    with tarfile.open(tmp_path / "in" / "00001.tar", "a") as tar:
        info = tarfile.TarInfo("stray.jpg")
        info.size = len(jpeg(1))
        tar.addfile(info, io.BytesIO(jpeg(1)))
    result = cli("ingest", "tars", tmp_path / "in", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert (
        "2 rows of img2dataset's parquet have no picture (1 failed_to_download, 1 failed_to_resize)" in result.out
    )
    rows = samples(tmp_path / "out")
    assert list(rows) == ["00000_000000000", "00000_000000001", "00001_000010000"]
    assert rows["00000_000000001"]["json"] == {
        "captions": ["picture 1"],
        "original_size": [480, 640],
        "url": "https://example.org/1.jpg",
        "score": 0.5,
        "width": 32,
        "height": 24,
    }
    assert "txt" not in rows["00000_000000001"]
    assert rejects(tmp_path / "out") == {
        "00000.tar: 000000003": "a success in 00000.parquet, but not in the tar",
        "00001.tar: stray": "no such key in 00001.parquet, or no success there",
    }


def test_a_broken_parquet_and_a_foreign_one(cli: Cli, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    write_tar(tmp_path / "in" / "a.tar", {"0.jpg": jpeg(0)})
    write_tar(tmp_path / "in" / "b.tar", {"0.jpg": jpeg(1)})
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 no more")
    parquet.write_table(pyarrow.table({"other": [1]}), tmp_path / "in" / "b.parquet")
    assert cli("ingest", "tars", tmp_path / "in", "--out", tmp_path / "out").code == 0
    assert len(samples(tmp_path / "out")) == 2
    assert list(rejects(tmp_path / "out")) == ["a.parquet"]


def test_damaged_tars_are_used_up_to_the_damage(cli: Cli, tmp_path: Path) -> None:
    files = {f"{n}.jpg": jpeg(n) for n in range(4)}
    path = write_tar(tmp_path / "in" / "cut.tar", files)
    path.write_bytes(path.read_bytes()[:4000])
    (tmp_path / "in" / "zipped.tgz").write_bytes(
        gzip.compress(write_tar(tmp_path / "x.tar", {"z.jpg": jpeg(9)}).read_bytes())
    )
    (tmp_path / "in" / "junk.tar").write_bytes(b"junk" * 999)
    assert cli("ingest", "tars", tmp_path / "in", "--out", tmp_path / "out").code == 0
    rows = samples(tmp_path / "out")
    assert rows.pop("zipped_z")["jpg"] == jpeg(9)
    assert rows
    for key, row in rows.items():
        assert row["jpg"] == files[f"{key.removeprefix('cut_')}.jpg"]
    assert set(rejects(tmp_path / "out")) == {"cut.tar", "junk.tar"}


def test_size_filters_and_masks(cli: Cli, tmp_path: Path) -> None:
    files: dict[str, bytes] = {"0.mask.png": b"mask"}
    for n, (height, width) in enumerate([(24, 32), (24, 32), (8, 32), (24, 90)]):
        files[f"{n}.jpg"] = jpeg(n, height, width)
        files[f"{n}.json"] = json.dumps({"caption": "a cat", "score": n}).encode()
    write_tar(tmp_path / "a.tar", files)
    args = ("--size", 16, "--min-size", 9, "--max-aspect", 3, "--where", "score < 1")
    result = cli("ingest", "tars", tmp_path / "a.tar", "--out", tmp_path / "out", *args)
    assert result.code == 0
    assert (
        "3 pictures left out by filters: 1 longer than 3:1, 1 not --where score < 1, 1 smaller than 9 px"
        in result.out
    )
    assert "1 pictures have other members" in result.out
    ((_, row),) = samples(tmp_path / "out").items()
    assert decode_rgb(row["png"]).size == (16, 16)
    assert row["json"]["crop"] == [0, 2, 16, 16]
    assert not (tmp_path / "out" / "rejects.jsonl").exists()
    result = cli("ingest", "tars", tmp_path / "a.tar", "--out", tmp_path / "none", "--min-size", 99)
    assert (result.code, "the filters leave none" in result.err) == (2, True)
    assert "4 smaller than 99 px" in result.err


def test_our_own_shards_come_through_unchanged(cli: Cli, photos: Path, tmp_path: Path) -> None:
    cli("ingest", "folder", photos, "--out", tmp_path / "a", "--size", 16)
    cli("ingest", "tars", tmp_path / "a", "--out", tmp_path / "b")
    first, second = samples(tmp_path / "a"), samples(tmp_path / "b")
    for (key, was), (name, row) in zip(first.items(), second.items(), strict=True):
        assert name == f"00000_{key}"
        assert row["png"] == was["png"]
        assert row["json"] == {k: v for k, v in was["json"].items() if k != "file"}
    assert ShardSet.open(tmp_path / "b").bucket_sizes == {(16, 16): 6}


def test_many_pictures_go_through_workers_with_the_same_bytes(cli: Cli, tmp_path: Path) -> None:
    files = {f"{n}.jpg": jpeg(n) if n % 7 else b"broken" for n in range(100)}
    write_tar(tmp_path / "a.tar", files)
    for workers in (0, 2):
        out = tmp_path / str(workers)
        result = cli("ingest", "tars", tmp_path / "a.tar", "--out", out, "--workers", workers, "--format", "webp")
        assert "85 pictures in" in result.out
    names = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert "rejects.jsonl" in names
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_folders_that_were_not_entered_are_told(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/a.tar", "in/closed/b.tar", "elsewhere/c.tar"):
        write_tar(tmp_path / name, {"0.jpg": jpeg(1, 8, 8)})
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    scandir = os.scandir

    def closed(path: str) -> Any:
        if os.path.basename(path) == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    result = cli("ingest", "tars", tmp_path / "in", "--out", tmp_path / "out")
    assert result.code == 0
    assert "1 pictures in" in result.out
    assert rejects(tmp_path / "out") == {
        str(tmp_path / "in" / "closed"): "a folder that can't be read (Permission denied)",
        str(tmp_path / "in" / "linked"): "a link to a folder; give that folder itself",
    }
    (tmp_path / "in" / "a.tar").unlink()
    result = cli("ingest", "tars", tmp_path / "in", "--out", tmp_path / "more")
    assert (result.code, "in/closed is a folder that can't be read" in result.err) == (2, True)


def test_sources(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / name, {}) for name in ("a/00.tar", "a/01.tar", "b/00.tar", "b/c/02.tgz")]
    out = tmp_path / "b" / "out"
    write_tar(out / "00000.tar", {})
    (tmp_path / "a" / ".hidden.tar").touch()
    assert find_tars([str(tmp_path)], out)[0] == paths
    assert tar_names(paths) == ["a/00", "a/01", "b/00", "b/c/02"]
    assert tar_names(paths[:2]) == ["00", "01"]
    assert find_tars([f"{tmp_path}/a/{{00..01}}.tar"], out)[0] == paths[:2]
    assert find_tars([f"{tmp_path}/*/00.tar", f"{tmp_path}/a/00.tar"], out)[0] == [paths[0], paths[2]]
    assert find_tars([str(paths[3]), f"{tmp_path}/a"], out)[0] == [*paths[:2], paths[3]]
    for source, says in [
        (f"{tmp_path}/a/{{00..02}}.tar", "no file"),
        (f"{tmp_path}/x*.tar", "no file"),
        ("s3://bucket/a.tar", "not on this machine"),
        ("t/{0..99999999999999}.tar", "stands for more than"),
        ("t/{0..999}{a..j}{0..999}.tar", "stands for more than"),
    ]:
        with pytest.raises(UserError, match=says):
            find_tars([source], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tars in"):
        find_tars([str(tmp_path / "empty")], out)


def test_keys_of_tars_with_one_name_differ(cli: Cli, tmp_path: Path) -> None:
    for folder in "ab":
        write_tar(tmp_path / folder / "00000.tar", {"0.jpg": jpeg(ord(folder))})
    cli("ingest", "tars", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert len(samples(tmp_path / "out")) == 2
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("tars", "plain"),
    [
        ({"00000.tar": ["000000123"], "00001.tar": ["000000123"]}, ["00000_000000123", "00001_000000123"]),
        ({"laion.00000.tar": ["0", "1"], "laion.00001.tar": ["0", "1"]}, []),
        ({"a.tar": ["1_0", "1/0"], "a_1.tar": ["0", "/0"]}, ["a_1_0"]),
    ],
)
def test_keys_tell_tars_apart(cli: Cli, tmp_path: Path, tars: dict[str, list[str]], plain: list[str]) -> None:
    for name, keys in tars.items():
        write_tar(tmp_path / "in" / name, {f"{key}.jpg": jpeg(1, 8, 8) for key in keys})
    read = [item.key for item in PictureSource.open(tmp_path / "in") if isinstance(item, Picture)]
    assert len(set(read)) == len(read) == sum(map(len, tars.values()))
    assert set(plain) <= set(read)
    assert cli("ingest", "tars", tmp_path / "in", "--out", tmp_path / "out").code == 0
    assert verify(tmp_path / "out") == []
    assert list(samples(tmp_path / "out")) == read


def test_a_parquet_belongs_to_the_tar_of_its_name(cli: Cli, tmp_path: Path) -> None:
    for shard in range(2):
        img2dataset(tmp_path / "in", shard, [{"url": f"{shard}", "caption": "a", "score": shard}])
        for suffix in ("tar", "parquet"):
            (tmp_path / "in" / f"{shard:05d}.{suffix}").rename(tmp_path / "in" / f"laion.{shard}.{suffix}")
    assert cli("ingest", "tars", tmp_path / "in", "--out", tmp_path / "out").code == 0
    assert [row["json"]["score"] for row in samples(tmp_path / "out").values()] == [0, 1]


def test_names_with_dots_do_not_widen_the_index(cli: Cli, tmp_path: Path) -> None:
    files = {}
    for n in range(70):
        files |= {f"{n}.jpg": jpeg(0), f"{n}.{n}.5.npy": b"x"}
    write_tar(tmp_path / "a.tar", files)
    assert cli("ingest", "tars", tmp_path / "a.tar", "--out", tmp_path / "out").code == 0
    assert len(ShardSet.open(tmp_path / "out").manifest.members) == 66
    assert len(rejects(tmp_path / "out")) == 6
    assert "more than 64 kinds of members" in rejects(tmp_path / "out")["a.tar: 69"]


def test_fuzzed_tars_end_in_shards_or_one_line(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for n in range(4):
        record = {"caption": f"a {n}", "score": n}
        files |= {f"{n}.jpg": jpeg(n, 8, 8), f"{n}.json": json.dumps(record).encode(), f"{n}.mask.png": b"mask"}
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    rng = random.Random(0)
    for attempt in range(60):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if attempt % 3 == 0:
            del data[rng.randrange(len(data)) :]
        folder = tmp_path / str(attempt)
        folder.mkdir()
        (folder / "a.tar").write_bytes(data)
        with contextlib.suppress(UserError):  # nothing is left
            assert main(["ingest", "tars", str(folder / "a.tar"), "--out", str(folder / "out")]) == 0
        if (folder / "out" / "manifest.json").exists():
            assert verify(folder / "out") == []
            for key, row in samples(folder / "out").items():
                whole_json = files[f"{key.removeprefix('a_')}.json"]
                if row["json"].get("captions"):  # members are never those of another sample
                    was = json.loads(whole_json)
                    assert (
                        sum(a != b for a, b in zip(row["json"]["captions"][0], was["caption"], strict=False)) <= 3
                    )
        assert {path.name for path in folder.iterdir()} <= {"a.tar", "out"}


def test_records_of_any_json_can_be_written(cli: Cli, tmp_path: Path) -> None:
    deep = b'{"caption": "deep", "nest": ' + b"[" * 500 + b"]" * 500 + b"}"
    records = {
        "a": b'{"caption": "half a face \\ud83d", "k\\udc00": "\\ude00", "whole": "\\ud83d\\ude00"}',
        "b": deep,
        "c": b'{"caption": "' + b"x" * 9 + b'", "nest": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "d": b'{"n": ' + b"9" * 5000 + b"}",
        "e": b'{"caption": 7, "x": [NaN, Infinity, 1e999, {"": null}], "y": 123456789012345678901234567890}',
        "f": b"\xff\xfe",
        "g": b"[]",
    }
    files = {}
    for key, record in records.items():
        files |= {f"{key}.jpg": jpeg(0), f"{key}.json": record}
    write_tar(tmp_path / "a.tar", files)
    assert cli("ingest", "tars", tmp_path / "a.tar", "--out", tmp_path / "out").code == 0
    rows = {key: row["json"] for key, row in samples(tmp_path / "out").items()}
    assert rows["a_a"]["captions"] == ["half a face \ufffd"]
    assert (rows["a_a"]["k\ufffd"], rows["a_a"]["whole"]) == ("\ufffd", "\U0001f600")
    assert rows["a_b"]["captions"] == ["deep"]
    assert rows["a_e"]["x"] == [None, None, None, {"": None}]
    assert (rows["a_e"]["captions"], rows["a_e"]["y"]) == (["7"], 123456789012345678901234567890)
    assert set(rejects(tmp_path / "out")) == {f"a.tar: {key}" for key in "cdfg"}
    assert verify(tmp_path / "out") == []


def test_rejects_are_not_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    from data_tools.rejects import Rejects

    tracemalloc.start()
    with Rejects(tmp_path) as found:
        for n in range(20_000):
            found.add(f"{n}.jpg \udcff", "a reason of some length" * 4)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        found.save()
    tracemalloc.stop()
    assert len(rejects(tmp_path)) == 20_000
    with Rejects(tmp_path) as found:
        found.add("a", "b")
        with pytest.raises(UserError, match="none of 1 pictures in x can be used; the first, a: b"):
            found.require_some_left(0, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["rejects.jsonl"]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("mask.png", "mask.png"), ("png", "other.png"), ("json", "other.json"), ("A b.NPY", "a-b.npy"),
        ("..", "member"), ("ä/\x00", "---"),
    ],
)  # fmt: skip
def test_member_names(name: str, safe: str) -> None:
    from finetune.data.shards.files import MEMBER

    assert member_name(name) == safe
    assert MEMBER.fullmatch(safe)


def test_an_earlier_crop_is_carried_on_at_the_scale_of_the_whole_picture() -> None:
    data = encoded(smooth_picture(0, 640, 960), "JPEG")  # read at a quarter of its size
    record = {"captions": [], "original_size": [1280, 1920], "crop": [100, 200, 640, 960]}
    options = Options("png", 64, 95, (255, 255, 255), MAX_PIXELS, Filters())
    result = prepare(Found("key", "file", data, record), options)
    # Resized to 64 x 96, of which the middle is cut; and the first crop, at a tenth of its size.
    assert result.record["original_size"] == [1280, 1920]
    assert result.record["crop"] == [0 + 10, 16 + 20, 64, 64]


@pytest.mark.parametrize("size", [None, 64])
def test_sizes_that_no_picture_has_are_not_carried_on(size: int | None) -> None:
    record = {"captions": [], "original_size": [0, 960], "crop": [1, 1, 0, 96]}
    options = Options("png" if size else "keep", size, 95, (255, 255, 255), MAX_PIXELS, Filters())
    result = prepare(Found("key", "file", encoded(smooth_picture(0, 64, 96)), record), options)
    assert result.record["original_size"] == [64, 96]
    assert result.record.get("crop") == ([0, 16, 64, 64] if size else None)


def test_maps_and_masks_are_cut_with_their_picture(cli: Cli, tmp_path: Path) -> None:
    """As in shards of our own: maps, masks and names of classes are taken for what they are; others are kept."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "classes.json").write_text('["cat", "dog", "hat"]')
    labels = Image.fromarray((np.arange(48 * 24).reshape(24, 48) % 3).astype(np.uint8))
    files: dict[str, bytes] = {}
    for key, label_map in (("a", encoded(labels)), ("b", b"mine"), ("c", encoded(Image.new("L", (48, 24), 3)))):
        record = {"class": 2, "boxes": [[1, 0.25, 0, 0.75, 1], [0, 0, 0, 0.25, 1]]}
        files |= {f"{key}.png": encoded(smooth_picture(1, 24, 48)), f"{key}.json": json.dumps(record).encode()}
        files |= {f"{key}.map.png": label_map, f"{key}.mask.png": encoded(Image.new("1", (48, 24), 1))}
    write_tar(tmp_path / "in" / "a.tar", files)
    result = cli("ingest", "tars", tmp_path / "in", "--out", tmp_path / "out", "--size", 12)
    assert result.code == 0, result.err
    assert "2 pictures have a map.png or mask.png of another kind" in result.out
    assert "the first, a.tar: b: map.png is no PNG" in result.out
    assert "3 boxes left out: --size leaves less than 25% of each" in result.out
    assert verify(tmp_path / "out") == []
    assert ShardSet.open(tmp_path / "out").classes() == ["cat", "dog", "hat"]
    a, b, c = samples(tmp_path / "out").values()
    assert (a["json"]["boxes"], a["json"]["class"]) == ([[1, 0.0, 0.0, 1.0, 1.0]], 2)
    want = np.asarray(labels.resize((24, 12), Image.Resampling.NEAREST).crop((6, 0, 18, 12)))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(a["map.png"]))), want)
    assert Image.open(io.BytesIO(a["mask.png"])).size == (12, 12)
    assert (b["other.map.png"], "map.png" in b) == (b"mine", False)
    assert (c["other.map.png"], "map.png" in c) == (files["c.map.png"], False)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "classes.json").write_text('["dog"]')
    write_tar(tmp_path / "more" / "b.tar", files)
    result = cli("ingest", "tars", tmp_path / "in", tmp_path / "more", "--out", tmp_path / "two")
    assert (result.code, "name different classes" in result.err) == (2, True)
