"""Tables of paths and URLs: every kind of file, odd quoting, broken rows, downloads that fail."""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.pictures import Picture, PictureSource
from finetune.data.shards import ShardSet, verify
from tests.data_tools.conftest import Result, encoded, smooth_picture
from tests.data_tools.web import Web, send, web

Cli = Callable[..., Result]


@pytest.fixture
def site() -> Iterator[Web]:
    with web() as site:
        yield site


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 0.png to 4.png."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(5):
        (folder / f"{n}.png").write_bytes(picture(n))
    return folder


def picture(n: int, side: int = 8) -> bytes:
    return encoded(smooth_picture(n, side, side))


def records(root: Path) -> dict[str, dict[str, Any]]:
    shards = ShardSet.open(root, "images")
    return {shards.key(i): shards.read_json(i) for i in range(len(shards))}


def rejects(root: Path) -> dict[str, str]:
    rows = map(json.loads, (root / "rejects.jsonl").read_text().splitlines())
    return {row["file"]: row["reason"] for row in rows}


def parquet_file(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_csv_as_spreadsheets_write_it(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    text = (
        "\ufeffpath , caption,score,id,note\r\n"
        '0.png,"a cat, ""sitting""\r\non two lines",5,007,\r\n'
        "\r\n"
        '1.png,"[""one"", ""two""]",0.25,1e400,"1,5"\r\n'
        "2.png,größe,-3,4,[not a list]\r\n"
        f"{pictures / '3.png'},abs,,,\r\n"
        "9.png,gone,,,\r\n"
        ",no path,,,\r\n"
        "4.png,too,few\r\n"
        '4.png,"bad" quote,,,\r\n'
        "4.png,,,,"
    )
    (pictures / "t.csv").write_bytes(text.encode())
    result = cli("ingest", "table", pictures / "t.csv", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    rows = records(tmp_path / "out")
    size = {"original_size": [8, 8]}
    assert list(rows.values()) == [
        {"captions": ['a cat, "sitting" on two lines'], "file": "0.png", **size, "score": 5, "id": "007"},
        {"captions": ["one", "two"], "file": "1.png", **size, "score": 0.25, "id": "1e400", "note": "1,5"},
        {"captions": ["größe"], "file": "2.png", **size, "score": -3, "id": 4, "note": "[not a list]"},
        {"captions": ["abs"], "file": str(pictures / "3.png"), **size},
        {"captions": [], "file": "4.png", **size},
    ]
    assert list(rows) == [f"{n:09d}" for n in (0, 1, 2, 3, 8)]
    assert rejects(tmp_path / "out") == {
        "9.png (t.csv, line 8)": "no such file",
        "t.csv, line 9": "no path",
        "t.csv, line 10": "3 cells, the header has 5",
        "t.csv, line 11": "not CSV (',' expected after '\"')",
    }
    assert "1 pictures have no caption" in result.out
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["tsv", "csv;", "jsonl", "csv.gz", "jsonl.gz", "parquet"])
def test_kinds_of_tables(cli: Cli, pictures: Path, tmp_path: Path, kind: str) -> None:
    rows = [{"file_name": f"{n}.png", "text": f"picture {n}", "score": n} for n in range(5)]
    path = pictures / f"t.{kind.rstrip(';')}"
    if kind == "parquet":
        parquet_file(path, rows)
    else:
        mark = "\t" if kind == "tsv" else ";" if kind.endswith(";") else ","
        if "jsonl" in kind:
            lines = [json.dumps(row) for row in rows]
        else:
            lines = [mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]
        data = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    assert cli("ingest", "table", path, "--out", tmp_path / "out").code == 0
    assert list(records(tmp_path / "out").values()) == [
        {"captions": [f"picture {n}"], "file": f"{n}.png", "original_size": [8, 8], "score": n} for n in range(5)
    ]


def test_parquet_values_and_several_files(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    tables = tmp_path / "in"
    rows = [
        {"path": f"{n}.png", "captions": [f"a {n}", None, f"b {n}"], "score": [None, float("nan"), 1.5][n % 3],
         "tags": ["x", "y"], "raw": b"bytes", "when": None}
        for n in range(5)
    ]  # fmt: skip
    parquet_file(tables / "b.parquet", rows[3:])
    parquet_file(tables / "a.parquet", rows[:3], row_group_size=2)
    assert cli("ingest", "table", tables, "--out", tmp_path / "out").code == 0
    got = records(tmp_path / "out")
    assert list(got) == [f"{n:09d}" for n in range(5)]
    assert got["000000002"] == {
        "captions": ["a 2", "b 2"],
        "file": "2.png",
        "original_size": [8, 8],
        "score": 1.5,
        "tags": ["x", "y"],
    }
    assert "score" not in got["000000001"]


def test_columns_that_were_not_chosen_are_no_captions(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    rows = [
        {"path": "0.png", "caption": "alt", "text": "more", "long": "a cat"},
        {"path": "1.png", "caption": "alt"},
    ]
    (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = ("--caption-column", "long")
    assert cli("ingest", "table", pictures / "t.jsonl", *chosen, "--out", tmp_path / "out").code == 0
    first, _ = records(tmp_path / "out").values()
    assert (first["captions"], first["caption"], first["text"]) == (["a cat"], "alt", "more")
    read = [item for item in PictureSource.open(tmp_path / "out") if isinstance(item, Picture)]  # as `encode` does
    assert [item.record["captions"] for item in read] == [["a cat"], []]
    assert cli("ingest", "tars", tmp_path / "out", "--out", tmp_path / "again").code == 0
    assert [row["captions"] for row in records(tmp_path / "again").values()] == [["a cat"], []]


def test_that_no_column_has_captions_is_said(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    (pictures / "t.csv").write_text("path,title,score\n0.png,a cat,5\n1.png,a dog,4\n")
    result = cli("ingest", "table", pictures / "t.csv", "--out", tmp_path / "out")
    assert result.code == 0
    assert (
        "note: no captions are taken; name their column with --caption-column (columns: path, title, score"
        in result.out
    )
    named = cli("ingest", "table", pictures / "t.csv", "--out", tmp_path / "named", "--caption-column", "title")
    assert named.code == 0 and "note:" not in named.out


def test_columns_that_cannot_be_labels_are_said(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    """Their names are those of what a record says of the picture; they were left out without a word."""
    (pictures / "t.csv").write_text("path,caption,crop,original_size,score\n0.png,a cat,yes,big,5\n")
    result = cli("ingest", "table", pictures / "t.csv", "--out", tmp_path / "out")
    assert (result.code, "columns left out: crop, original_size\n" in result.out) == (0, True)
    parquet = pa.table({"image": [(pictures / "0.png").read_bytes()], "text": ["a cat"], "file": ["x"], "n": [1]})
    pq.write_table(parquet, tmp_path / "t.parquet")
    result = cli("ingest", "hf", tmp_path / "t.parquet", "--out", tmp_path / "hf")
    assert (result.code, "columns left out: file\n" in result.out) == (0, True)


def test_captions_that_are_missing_are_none(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    cells = [math.nan, -math.inf, [math.nan, "a cat"], True, 7.5]
    lines = [json.dumps({"path": f"{n}.png", "caption": cell}) for n, cell in enumerate(cells)]
    (pictures / "t.jsonl").write_text("\n".join(lines))
    result = cli("ingest", "table", pictures / "t.jsonl", "--out", tmp_path / "out")
    assert "3 pictures have no caption, the first is 0.png" in result.out
    captions = [row["captions"] for row in records(tmp_path / "out").values()]
    assert captions == [[], [], ["a cat"], [], ["7.5"]]


def test_broken_lines_and_rows(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    lines = [b'{"path": "0.png"}', b"{", b"[1]", b'{"path": 3}', b'{"path": "\xff.png"}', b'{"other": 1}', b""]
    (pictures / "t.jsonl").write_bytes(b"\n".join(lines))
    assert cli("ingest", "table", pictures / "t.jsonl", "--out", tmp_path / "out").code == 0
    found = rejects(tmp_path / "out")
    assert found.pop("t.jsonl, line 2").startswith("not JSON")
    assert found == {
        "t.jsonl, line 3": "not an object",
        "t.jsonl, line 4": "no path",
        "t.jsonl, line 5": "not UTF-8",
        "t.jsonl, line 6": "no path",
    }
    (pictures / "t.csv").write_bytes(b"path,caption\n0.png,\xe9t\xe9\n1.png,ok\n")
    assert cli("ingest", "table", pictures / "t.csv", "--out", tmp_path / "csv").code == 0
    assert rejects(tmp_path / "csv") == {"t.csv, line 2": "not UTF-8"}


def test_columns_are_guessed_only_when_it_is_plain(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")

    def mistake(header: str, *args: object) -> str:
        (pictures / "t.csv").write_text(f"{header}\n" + ",".join("0.png" for _ in header.split(",")) + "\n")
        result = cli("ingest", "table", pictures / "t.csv", *out, *args)
        return result.err if result.code == 2 else ""

    says = "path and url may hold the pictures' places; give --url-column or --path-column (columns: path, url)"
    assert mistake("path,url") == f"error: {says}\n"
    assert "text and caption may hold the captions; give --caption-column" in mistake("path,text,caption")
    assert "no column has a known name; give --url-column or --path-column (columns: a, b)" in mistake("a,b")
    assert "--caption-column c: no such column (columns: a, b)" in mistake("a,b", "--caption-column", "c")
    assert "--path-column c: no such column" in mistake("a,b", "--path-column", "c")
    assert "several columns 'a'" in mistake("a,b,a")
    assert "not allowed with" in mistake("a,b", "--path-column", "a", "--url-column", "b")
    assert mistake("a,b,c", "--path-column", "b", "--caption-column", "a", "--caption-column", "c") == ""
    assert records(tmp_path / "out")["000000000"]["captions"] == ["0.png"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", b"", "has no columns"),
        ("t.jsonl", b"[1]\n", "has no columns"),
        ("t.csv", "path\n0.png\n".encode("utf-16"), "is UTF-16; convert it"),
        ("t.csv", b"\x89PNG\r\n", "line 1 is not UTF-8; is it a table?"),
        ("t.xlsx", b"PK", "is no table that can be read"),
        ("t.parquet", b"PAR1 broken", "is no Parquet file"),
        ("t.csv", b"path," + 17_000_000 * b"x", "line 1 names no columns; is it a table?"),
        ("t.csv", b'path,"caption\n0.png,a cat\n', "line 1 names no columns; is it a table?"),
        ("t.csv.gz", b"not gzip", "cannot read"),
        ("t.csv.gz", gzip.compress(b"path\n")[:10] + 99 * b"\xff", "cannot read"),
        ("t.csv.gz", gzip.compress(b"path\n" + bytes(range(256)) * 99)[:-9], "can't be read to its end"),
    ],
)
def test_tables_that_are_none(cli: Cli, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    result = cli("ingest", "table", tmp_path / name, "--out", tmp_path / "out")
    assert (result.code, says in result.err) == (2, True), result.err


def test_folders_of_tables(cli: Cli, tmp_path: Path) -> None:
    result = cli("ingest", "table", tmp_path, "--out", tmp_path / "out")
    assert (result.code, "no tables in" in result.err) == (2, True)
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / name).write_text("path\n")
    result = cli("ingest", "table", tmp_path, "--out", tmp_path / "out")
    assert (result.code, "several kinds (.csv, .jsonl)" in result.err) == (2, True)
    result = cli("ingest", "table", tmp_path / "none.csv", "--out", tmp_path / "out")
    assert (result.code, "no file" in result.err) == (2, True)


def test_a_parquet_that_is_damaged_inside_ends_the_command(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    rows = [{"path": f"{n % 5}.png", "caption": f"caption number {n}"} for n in range(100)]
    path = parquet_file(pictures / "t.parquet", rows, row_group_size=50, write_page_checksum=True)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size - 3] ^= 1
    path.write_bytes(data)
    result = cli("ingest", "table", path, "--out", tmp_path / "out")
    assert result.code == 2
    assert "can't be read after row 50" in result.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_urls(cli: Cli, site: Web, tmp_path: Path) -> None:
    good = {f"/{n}.png": picture(n, 16) for n in range(4)}
    site.pages.update(good)
    site.pages["/page.html"] = b"<!doctype html><html></html>"
    site.pages["/busy.png"] = 503
    site.pages["/once.png"] = lambda handler, n: send(handler, good["/0.png"], 200 if n > 1 else 500)
    site.pages["/cut.png"] = lambda handler, _: send(handler, picture(1)[:60])
    names = ["0.png", "none.png", "1.png", "page.html", "once.png", "busy.png", "2.png", "cut.png", "3.png"]
    places = [f"{site.url}/{name}" for name in names]
    places += ["file:///etc/passwd", "0.png", "gopher://x/y.png", ""]
    rows = [{"URL": place, "TEXT": f"a {n}", "url_hash": n} for n, place in enumerate(places)]
    parquet_file(tmp_path / "t.parquet", rows)
    args = ("ingest", "table", tmp_path / "t.parquet", "--url-column", "URL", "--tries", 2, "--timeout", 5)
    result = cli(*args, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    got = records(tmp_path / "out")
    assert [row["url"].rpartition("/")[2] for row in got.values()] == [
        "0.png",
        "1.png",
        "once.png",
        "2.png",
        "3.png",
    ]
    assert got["000000002"] == {
        "captions": ["a 2"],
        "original_size": [16, 16],
        "url_hash": 2,
        "url": f"{site.url}/1.png",
    }
    shards = ShardSet.open(tmp_path / "out")
    assert shards.read_member(1, "png") == good["/1.png"]
    short = {
        name.rpartition("/")[2].partition(" ")[0]: reason for name, reason in rejects(tmp_path / "out").items()
    }
    assert len(short.pop("cut.png")) > 5
    assert short == {
        "none.png": "HTTP 404",
        "page.html": "a web page, not a picture",
        "busy.png": "HTTP 503 (2 tries)",
        "passwd": "URLs that begin with 'file' are not read",
        "0.png": "not a URL",
        "y.png": "URLs that begin with 'gopher' are not read",
        "t.parquet,": "no URL",
    }
    assert site.asked["/none.png"] == 1
    first = [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())]
    site.asked.clear()
    cli(*args, "--out", tmp_path / "out", "--overwrite", "--downloads", 1)
    assert [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())] == first


def test_large_downloads_leave_nothing_behind(
    cli: Cli, site: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8))
    site.pages["/big.png"] = encoded(noise)
    assert len(site.pages["/big.png"]) > 1 << 20  # type: ignore[arg-type]
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "t.csv").write_text(f"image_url\n{site.url}/big.png\n{site.url}/big.png\n")
    assert cli("ingest", "table", tmp_path / "t.csv", "--out", tmp_path / "out").code == 0
    assert ShardSet.open(tmp_path / "out").read_member(1, "png") == site.pages["/big.png"]
    assert list((tmp_path / "spool").iterdir()) == []


def test_paths_that_are_no_pictures(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    import os

    os.mkfifo(pictures / "pipe.png")
    rows = ["path", "pipe.png", ".", "a\x00b.png", "http://127.0.0.1:1/x.png", "0.png"]
    (pictures / "t.csv").write_text("\n".join(rows))
    assert cli("ingest", "table", pictures / "t.csv", "--path-column", "path", "--out", tmp_path / "out").code == 0
    assert list(rejects(tmp_path / "out").values()) == [
        "not a file",
        "not a file",
        "embedded null byte",
        "a URL, not a path; name its column by --url-column",
    ]


def test_what_ingest_leaves_is_plain_webdataset(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    (pictures / "t.csv").write_text("path\n0.png\n")
    cli("ingest", "table", pictures / "t.csv", "--out", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert tar.getnames() == ["000000000.png", "000000000.json"]
        file = tar.extractfile("000000000.png")
        assert file is not None
        assert io.BytesIO(file.read()).getvalue() == (pictures / "0.png").read_bytes()
