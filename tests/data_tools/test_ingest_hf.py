"""Hugging Face data sets in each of their forms on disk, and on a hub of our own."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest

from finetune.data.shards import ShardSet, verify
from tests.data_tools.conftest import Result, encoded, smooth_picture

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def picture(n: int, kind: str = "PNG") -> bytes:
    return encoded(smooth_picture(n, 8, 12), kind)


def samples(root: Path) -> list[tuple[dict[str, Any], bytes]]:
    shards = ShardSet.open(root, "images")
    assert verify(root) == []
    rows = []
    for i in range(len(shards)):
        members = shards.read(i)
        data = next(members[name] for name in ("png", "jpg", "webp") if name in members)
        rows.append((shards.read_json(i), data))
    return rows


def rejects(root: Path) -> dict[str, str]:
    rows = map(json.loads, (root / "rejects.jsonl").read_text().splitlines())
    return {row["file"]: row["reason"] for row in rows}


def data_set() -> Any:
    """Five rows: images as bytes in three formats, one damaged, one missing; captions, a class, odd columns."""
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "animal": datasets.ClassLabel(names=["cat", "dog"]),
            "score": datasets.Value("float32"),
            "tags": datasets.List(datasets.Value("string")),
            "thumbnail": datasets.Image(),
            "raw": datasets.Value("binary"),
            "box": {"x": datasets.Value("int32"), "y": datasets.Value("int32")},
        }
    )
    images: list[Any] = [
        {"bytes": picture(0), "path": "a.png"},
        {"bytes": picture(1, "JPEG"), "path": None},
        {"bytes": b"broken", "path": "c.jpg"},
        None,
        {"bytes": picture(4, "WEBP"), "path": "e.webp"},
    ]
    rows = {
        "image": images,
        "text": [f" picture  {n}" for n in range(5)],
        "animal": [0, 1, 0, 1, -1],
        "score": [0.5, None, 1.0, 1.0, 2.0],
        "tags": [["x", "y"], [], ["x"], [], None],
        "thumbnail": [{"bytes": b"never decoded", "path": None}] * 5,
        "raw": [b"raw"] * 5,
        "box": [{"x": n, "y": 2} for n in range(5)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def written(form: str, folder: Path) -> Path:
    import datasets

    match form:
        case "parquet file":
            data_set().to_parquet(folder / "d.parquet")
            return folder / "d.parquet"
        case "parquet folder":
            (folder / "d" / "data").mkdir(parents=True)
            for part in range(2):
                rows = range(part * 3, min(part * 3 + 3, 5))
                data_set().select(rows).to_parquet(folder / "d" / "data" / f"train-{part:05d}-of-00002.parquet")
            return folder / "d"
        case "arrow file":
            data_set().save_to_disk(folder / "d")
            return folder / "d" / "data-00000-of-00001.arrow"
        case "saved":
            data_set().save_to_disk(folder / "d", num_shards=2)
        case "saved with splits":
            splits = {"train": data_set(), "test": data_set().select([1])}
            datasets.DatasetDict(splits).save_to_disk(folder / "d")
    return folder / "d"


@pytest.mark.parametrize(
    "form", ["parquet file", "parquet folder", "arrow file", "saved", "saved with splits", "cached"]
)
def test_every_form_gives_the_same_samples(cli: Cli, tmp_path: Path, form: str) -> None:
    source = written("parquet folder" if form == "cached" else form, tmp_path)
    args = ["--no-streaming"] if form == "cached" else []
    result = cli("ingest", "hf", source, "--image-column", "image", *args, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "columns left out: thumbnail, raw" in result.out
    assert samples(tmp_path / "out") == [
        (
            {"captions": ["picture 0"], "original_size": [8, 12], "score": 0.5, "tags": ["x", "y"],
             "box": {"x": 0, "y": 2}, "animal": 0, "animal_name": "cat"},
            picture(0),
        ),
        (
            {"captions": ["picture 1"], "original_size": [8, 12], "tags": [], "box": {"x": 1, "y": 2},
             "animal": 1, "animal_name": "dog"},
            picture(1, "JPEG"),
        ),
        (
            {"captions": ["picture 4"], "original_size": [8, 12], "score": 2.0, "box": {"x": 4, "y": 2}},
            picture(4, "WEBP"),
        ),
    ]  # fmt: skip
    assert rejects(tmp_path / "out") == {
        "row 2 (c.jpg)": "not a picture in a known format",
        "row 3": "no picture",
    }
    assert not (tmp_path / "out" / "SOURCE.json").exists()


def test_splits_are_chosen_or_named(cli: Cli, tmp_path: Path) -> None:
    source = written("saved with splits", tmp_path)
    args = ("ingest", "hf", source, "--image-column", "image", "--out", tmp_path / "out")
    assert cli(*args, "--split", "test").code == 0
    assert len(samples(tmp_path / "out")) == 1
    result = cli(*args, "--split", "dev")
    assert (result.code, "has no split dev; give --split with one of train, test" in result.err) == (2, True)
    (tmp_path / "p").mkdir()
    for split in ("dev", "test"):
        data_set().to_parquet(tmp_path / "p" / f"{split}.parquet")
    result = cli("ingest", "hf", tmp_path / "p", "--out", tmp_path / "x")
    assert (result.code, "several splits; give --split" in result.err) == (2, True)


def test_a_folder_of_pictures(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "train").mkdir(parents=True)
    for n in range(2):
        (folder / "train" / f"{n}.png").write_bytes(picture(n))
    lines = [{"file_name": f"{n}.png", "text": f"picture {n}", "score": n} for n in range(2)]
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = cli("ingest", "hf", folder, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert samples(tmp_path / "out") == [
        ({"captions": [f"picture {n}"], "original_size": [8, 12], "score": n}, picture(n)) for n in range(2)
    ]


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_plain_parquet(cli: Cli, tmp_path: Path, form: str) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(picture(0))
    images: dict[str, list[Any]] = {
        "bytes": [picture(0), b""],
        "struct": [{"bytes": picture(0), "path": None}, {"bytes": None, "path": "none.png"}],
        "path": ["pictures/0.png", "none.png"],
    }
    table = pyarrow.table({"image": images[form], "captions": [["a", "b"], None]})
    parquet.write_table(table, tmp_path / "d.parquet")
    result = cli("ingest", "hf", tmp_path / "d.parquet", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert samples(tmp_path / "out") == [({"captions": ["a", "b"], "original_size": [8, 12]}, picture(0))]
    assert list(rejects(tmp_path / "out").values()) == ["empty file" if form == "bytes" else "no such file"]


def test_mistakes_are_one_line(cli: Cli, tmp_path: Path) -> None:
    source = written("parquet file", tmp_path)
    out = ("--out", tmp_path / "out")

    def mistake(*args: object) -> str:
        result = cli("ingest", "hf", *args, *out)
        assert result.code == 2
        return result.err

    listed = "image, text, animal, score, tags, thumbnail, raw, box"
    assert f"image and thumbnail may hold the pictures; give --image-column (columns: {listed})" in mistake(source)
    assert "--image-column x: no such column" in mistake(source, "--image-column", "x")
    args = (source, "--image-column", "image", "--caption-column", "x")
    assert f"--caption-column x: no such column (columns: {listed})" in mistake(*args)
    assert "no file or folder" in mistake(tmp_path / "none")
    assert "no file or folder" in mistake("none.parquet")
    (tmp_path / "t.csv").write_text("a\n")
    assert "`ingest table`" in mistake(tmp_path / "t.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    logged = io.StringIO()  # beside our line
    handler = logging.StreamHandler(logged)
    logging.getLogger("datasets").addHandler(handler)
    assert "cannot open the data set" in mistake(tmp_path / "bad.parquet")
    logging.getLogger("datasets").removeHandler(handler)
    assert logged.getvalue() == ""
    (tmp_path / "empty").mkdir()
    assert "cannot open the data set" in mistake(tmp_path / "empty")
    if os.environ.get("HF_HUB_OFFLINE"):
        assert "cannot open the data set some/name" in mistake("some/name")


def test_a_script_is_not_run(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    result = cli("ingest", "hf", folder, "--out", tmp_path / "out")
    assert result.code == 2
    assert not (tmp_path / "ran").exists()


def test_damage_inside_ends_the_command(cli: Cli, tmp_path: Path) -> None:
    source = written("parquet file", tmp_path)
    data = bytearray(source.read_bytes())
    data[4:30] = b"\xff" * 26  # the header of the first page
    source.write_bytes(data)
    result = cli("ingest", "hf", source, "--image-column", "image", "--out", tmp_path / "out")
    assert result.code == 2
    assert "can't be read at row" in result.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_same_source_gives_the_same_bytes(cli: Cli, tmp_path: Path) -> None:
    source = written("saved", tmp_path)
    for out in ("a", "b"):
        cli("ingest", "hf", source, "--image-column", "image", "--out", tmp_path / out)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


# --- the hub, as far as `datasets` asks for it

COMMIT = "a" * 40


class _Hub(http.server.BaseHTTPRequestHandler):
    """One data set, some/name, of a card and a parquet file."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api, files = "/api/datasets/some/name", f"/datasets/some/name/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            self.reply({"id": "some/name", "sha": COMMIT, "cardData": {"license": "mit"}, "siblings": siblings})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            folder = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            self.reply([*self.listed(folder)])
        elif path.startswith(files) and (data := self.files.get(path.removeprefix(files))) is not None:
            asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            begin, end = (int(asked[1]), int(asked[2] or len(data)) + 1) if asked else (0, len(data))
            part = data[begin:end]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.oid(data)}"'}
            if asked:
                headers["Content-Range"] = f"bytes {begin}-{begin + len(part) - 1}/{len(data)}"
            self.reply(part, 206 if asked else 200, headers)
        else:
            self.reply({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def listed(self, folder: str) -> Iterator[dict[str, Any]]:
        for name, data in self.files.items():
            parent = name.rpartition("/")[0]
            if parent == folder:
                yield {"type": "file", "path": name, "size": len(data), "oid": self.oid(data)}
            elif parent and not folder:
                yield {"type": "directory", "path": parent, "size": 0, "oid": "b" * 40}

    @staticmethod
    def oid(data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    def reply(self, body: Any, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
def test_a_data_set_of_the_hub(tmp_path: Path, streaming: str) -> None:
    data_set().to_parquet(tmp_path / "d.parquet")
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "data/train-0.parquet": (tmp_path / "d.parquet").read_bytes(),
    }
    _Hub.files = files
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        done = subprocess.run(
            [sys.executable, "-m", "data_tools", "ingest", "hf", "some/name", "--image-column", "image", streaming]
            + ["--out", str(tmp_path / "out")],
            env={  # read when the hub's client is imported
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert [data for _, data in samples(tmp_path / "out")] == [picture(0), picture(1, "JPEG"), picture(4, "WEBP")]
    assert json.loads((tmp_path / "out" / "SOURCE.json").read_text()) == {
        "dataset": "some/name",
        "config": None,
        "split": "train",
        "revision": COMMIT,
        "license": "mit",
    }
