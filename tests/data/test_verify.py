"""`verify` on states of captions, on records, and on what a stopped encoder leaves; more is in test_shards.py."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data.shards import (
    EncoderInfo,
    LatentStats,
    Manifest,
    ShardError,
    ShardSet,
    ShardWriter,
    TextInfo,
    json_bytes,
    latent_bytes,
    parse_boxes,
    parse_classes,
    write_classes,
)
from finetune.data.shards.files import npy_bytes
from finetune.data.shards.verify import verify

ENCODER = EncoderInfo("./vae", "ab" * 32, 0.18215, 0.0, "float32", (-1.0, 1.0), 4, 8)
STATS = LatentStats(0.0, 1.0, [0.0] * 4, [1.0] * 4)
TEXT = TextInfo("./text", "cd" * 32, 7, 5, "float32")


def states(rows: int, value: float = 0.5) -> np.ndarray:
    return np.full((rows, TEXT.length, TEXT.width), value, np.float16)


def write_set(root: Path, **changes: Any) -> list[str]:
    """Three latents with states of captions; `changes` are made to the second one's. What `verify` says."""
    with ShardWriter(root, "latents") as writer:
        for number in range(3):
            record = {"captions": ["a"] * number, "original_size": [70, 64], "crop": [3, 0, 64, 64]}
            text: bytes | None = npy_bytes(states(max(number, 1)))
            if number == 1:
                text = changes.pop("text", text)
                record |= changes
            members = {"latent.npy": latent_bytes(np.ones((8, 8, 8))), "json": json_bytes(record)}
            writer.write(f"k{number}", members | ({"text.npy": text} if text is not None else {}), (64, 64))
        shards = writer.close()
    np.save(root / "empty.text.npy", states(1)[0])
    Manifest("latents", ["latent.npy", "json", "text.npy"], shards, ENCODER, STATS, TEXT).save(root)
    return [str(problem) for problem in verify(root)]


def test_a_whole_set_has_no_problems(tmp_path: Path) -> None:
    assert write_set(tmp_path, flipped=True) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": npy_bytes(states(2))}, "text.npy has 2 rows for 1 captions"),
        ({"text": npy_bytes(states(0))}, "text.npy is float16 [0, 7, 5], the text encoder needs"),
        ({"text": npy_bytes(states(1)[0])}, "text.npy is float16 [7, 5], the text encoder needs"),
        ({"text": npy_bytes(states(1).astype(np.float32))}, "text.npy is float32"),
        ({"text": npy_bytes(states(1, np.inf))}, "text.npy has values that are not finite"),
        ({"text": b"\x93NUMPY"}, "text.npy is not a numpy array"),
        ({"text": None}, "no text.npy"),
        ({"flipped": 1}, "flipped is 1, not true or false"),
        ({"crop": [0, -1, 64, 64]}, "crop [0, -1, 64, 64] is impossible"),
        ({"crop": [0, 0, 64, 0]}, "crop [0, 0, 64, 0] is impossible"),
        ({"original_size": [0, 5]}, "original_size [0, 5] is impossible"),
        ({"original_size": [True, 5]}, "original_size is not 2 whole numbers"),
    ],
)
def test_what_is_wrong_with_a_sample(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    (problem,) = write_set(tmp_path, **changes)
    assert problem.startswith("00000.tar: sample k1: ")
    assert says in problem


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (None, "missing"),
        (states(1), "float16 [1, 7, 5], the text encoder needs float16 [7, 5]"),
        (states(1, np.nan)[0], "not finite"),
    ],
)
def test_the_states_of_the_empty_caption(tmp_path: Path, array: np.ndarray | None, says: str) -> None:
    write_set(tmp_path)
    (tmp_path / "empty.text.npy").unlink()
    if array is not None:
        np.save(tmp_path / "empty.text.npy", array)
    (problem,) = verify(tmp_path)
    assert (problem.file, says in problem.what) == ("empty.text.npy", True)


def test_what_a_stopped_encoder_left(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / ".work").mkdir()
    (problem,) = verify(tmp_path)
    assert (problem.file, "run the same `data-tools encode` again" in problem.what) == (".work", True)


@pytest.mark.parametrize("name", ["../00000.tar", "/etc/passwd", "a/b.tar", "..", "00000.zip"])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write_set(tmp_path / "set")
    data = json.loads((tmp_path / "set" / "manifest.json").read_text())
    data["shards"][0]["name"] = name
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(data))
    (problem,) = verify(tmp_path / "set")
    assert (problem.file, "is not that of a tar in this folder" in problem.what) == ("manifest.json", True)


@pytest.mark.parametrize("place", [[1 << 40, 10], [512, 1 << 62], [-(1 << 62), 3], [3, 5]])
def test_an_index_that_points_outside_is_named(tmp_path: Path, place: list[int]) -> None:
    write_set(tmp_path)
    index = np.load(tmp_path / "00000.index.npy")
    index[1, 0] = place
    np.save(tmp_path / "00000.index.npy", index)
    (problem,) = verify(tmp_path)
    assert (problem.file, problem.sample) == ("00000.index.npy", "k1")


def test_an_index_of_absurd_size_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    header = (tmp_path / "00000.index.npy").read_bytes()[:128].replace(b"(3, 3, 2)", b"(1099511627776, 3, 2)")
    (tmp_path / "00000.index.npy").write_bytes(header)
    (problem,) = verify(tmp_path)
    assert (problem.file, problem.what) == ("00000.index.npy", "not a numpy array")


# --- classes, boxes, maps and masks


def png(shape: tuple[int, ...], dtype: type = np.uint8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(shape, dtype)).save(buffer, "PNG")
    return buffer.getvalue()


def moments(holes: int, value: float = 0.5) -> np.ndarray:
    return np.full((holes, 8, 8, 8), value, np.float16)


WHOLE: dict[str, Any] = {
    "map.png": png((64, 64)),
    "mask.png": png((64, 64)),
    "lowres.png": png((16, 16, 3)),
    "hole.npy": npy_bytes(np.ones((2, 8, 8), np.uint8)),
    "masked.npy": npy_bytes(moments(2)),
    "class": 2,
    "boxes": [[0, 0.0, 0.25, 1, 0.5], [2, 0.1, 0.1, 0.2, 0.2]],
}


def write_labelled(root: Path, names: list[str] | None, **changes: Any) -> list[str]:
    """Three latents, the second with all optional members, but for `changes` (None: left out)."""
    given = {name: value for name, value in {**WHOLE, **changes}.items() if value is not None}
    with ShardWriter(root, "latents") as writer:
        for number in range(3):
            record: dict[str, Any] = {"captions": [], "original_size": [64, 64], "crop": [0, 0, 64, 64]}
            members = {"latent.npy": latent_bytes(np.ones((8, 8, 8)))}
            if number == 1:
                record |= {name: value for name, value in given.items() if "." not in name}
            members["json"] = json_bytes(record)
            if number == 1:
                members |= {name: value for name, value in given.items() if "." in name}
            writer.write(f"k{number}", members, (64, 64))
        shards = writer.close()
    sha256 = None if names is None else write_classes(root, names)
    Manifest("latents", writer.members, shards, ENCODER, STATS, classes=sha256).save(root)
    return [str(problem) for problem in verify(root)]


def test_labels_of_every_kind_have_no_problems(tmp_path: Path) -> None:
    names = ["cat", "dög", "a \u2028 name"]
    assert write_labelled(tmp_path, names) == []
    shards = ShardSet.open(tmp_path)
    assert shards.classes() == names
    assert Manifest.load(tmp_path) == shards.manifest


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"class": 3}, "class is 3, classes.json has 0 to 2"),
        ({"class": "cat"}, "class is 'cat', classes.json has 0 to 2"),
        ({"class": True}, "class is True"),
        ({"boxes": [[3, 0, 0, 1, 1]]}, "a box has class 3"),
        ({"boxes": [[0, 0, 0, 1, 1.5]]}, "boxes are not [class, x0, y0, x1, y1]"),
        ({"map.png": png((64, 32))}, "map.png is 64x32, its bucket is 64x64"),
        ({"map.png": png((64, 64, 3))}, "map.png is not 8-bit grey"),
        ({"map.png": png((64, 64), np.uint16)}, "map.png is not 8-bit grey"),
        ({"mask.png": b"\x89PNG"}, "mask.png is no PNG"),
        ({"lowres.png": png((16, 16))}, "lowres.png is not 8-bit RGB"),
        ({"lowres.png": png((24, 24, 3))}, "lowres.png is 24x24, its bucket is 64x64"),
        ({"lowres.png": png((16, 32, 3))}, "lowres.png is 16x32"),
        (
            {"hole.npy": npy_bytes(np.ones((2, 8, 4), np.uint8))},
            "hole.npy is uint8 [2, 8, 4], its bucket needs uint8",
        ),
        ({"hole.npy": npy_bytes(np.full((2, 8, 8), 2, np.uint8))}, "hole.npy has values other than 0 and 1"),
        ({"hole.npy": None}, "masked.npy without hole.npy"),
        ({"masked.npy": None}, "hole.npy without masked.npy"),
        ({"masked.npy": npy_bytes(moments(2, np.inf))}, "masked.npy has values that are not finite"),
        ({"masked.npy": npy_bytes(-moments(2))}, "masked.npy has negative standard deviations"),
        (
            {"masked.npy": npy_bytes(moments(0))},
            "masked.npy is float16 [0, 8, 8, 8], its bucket needs float16 [holes",
        ),
        ({"masked.npy": b""}, "masked.npy is not a numpy array"),
    ],
)
def test_what_is_wrong_with_a_label(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    (problem,) = write_labelled(tmp_path, ["cat", "dog", "hat"], **changes)
    assert problem.startswith("00000.tar: sample k1: ")
    assert says in problem


def test_without_names_class_and_boxes_are_anybodys_labels(tmp_path: Path) -> None:
    assert write_labelled(tmp_path, None, **{"class": "cat", "boxes": "three of them"}) == []
    assert ShardSet.open(tmp_path).classes() == []
    assert '"classes"' not in (tmp_path / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "missing"),
        (b'["cat", "dog", "bat"]', "is not the one that these shards were made with"),
        (b"[", "is not the one that these shards were made with"),
    ],
)
def test_classes_that_are_not_those_of_the_manifest(tmp_path: Path, content: bytes | None, says: str) -> None:
    write_labelled(tmp_path, ["cat", "dog", "hat"])
    (tmp_path / "classes.json").unlink()
    if content is not None:
        (tmp_path / "classes.json").write_bytes(content)
    assert {problem.file for problem in verify(tmp_path)} == {"classes.json"}
    with pytest.raises(ShardError, match=says):
        ShardSet.open(tmp_path).classes()


@pytest.mark.parametrize(
    ("names", "says"),
    [([], "is no list of names"), (["a", "b", "a"], "has the name 'a' twice"), (["a", ""], "is no list of names")],
)
def test_names_that_are_refused(tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(ShardError, match=says):
        write_classes(tmp_path, names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sha256", ["ab", 7, "z" * 64, ["ab" * 32]])
def test_a_manifest_with_odd_classes_is_refused(tmp_path: Path, sha256: object) -> None:
    write_labelled(tmp_path, ["a", "b", "c"])
    data = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**data, "classes": sha256}))
    with pytest.raises(ShardError, match=r"classes is .*, not the sha256 of classes.json"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ([], True),
        ([[3, 0, 0.5, 1, 1.0]], True),
        ([[3, 0, 0.5, 0, 1.0]], False),  # of no width
        ([[-1, 0, 0, 1, 1]], False),
        ([[1.0, 0, 0, 1, 1]], False),
        ([[True, 0, 0, 1, 1]], False),
        ([[1, 0, 0, 1]], False),
        ([[1, float("nan"), 0, 1, 1]], False),
        ([[1, 0, 0, 64, 64]], False),  # in pixels
        ({"a": 1}, False),
        (None, False),
    ],
)
def test_the_form_of_boxes(value: object, good: bool) -> None:
    assert parse_boxes(value) == (value if good else None)


def test_a_class_that_is_there_twice_is_found_among_many() -> None:
    """A walk over all earlier names for each took hours."""
    names = [*map(str, range(300_000)), "299999"]
    with pytest.raises(ShardError, match="has the name '299999' twice; names must differ"):
        parse_classes(json.dumps(names).encode())
