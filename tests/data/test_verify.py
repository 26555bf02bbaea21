"""`verify` on states of captions, on records, and on what a stopped encoder leaves; more is in test_shards.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.shards import EncoderInfo, LatentStats, Manifest, ShardWriter, TextInfo, json_bytes, latent_bytes
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
