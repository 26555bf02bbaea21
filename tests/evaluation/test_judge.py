"""The judge of drawn pictures learns classes of real ones, and is the same when it is read again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune import UserError
from finetune.evaluation.judge import Judge, top, train_judge, varied
from tests.scenes import COLOURS, draw_scene

NAMES = list(COLOURS)


def single_shapes(numbers: range) -> tuple[np.ndarray, list[int]]:
    """Pictures of one shape, uint8 [N, 32, 32, 3], and the numbers of its colour."""
    scenes = [scene for number in numbers if len((scene := draw_scene(number, 32))[1]) == 1]
    return np.stack([scene[0] for scene in scenes]), [NAMES.index(scene[3].split()[1]) for scene in scenes]


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    pixels, labels = single_shapes(range(900))
    return train_judge(Judge(NAMES, width=8), pixels, labels, epochs=12, seed=0, lr=1e-2)


def test_it_knows_pictures_that_it_has_not_seen(judge: Judge) -> None:
    pixels, labels = single_shapes(range(20_000, 20_300))
    logits = judge.logits(pixels, batch=7)
    assert logits.shape == (len(labels), len(NAMES))
    assert top(logits, labels) >= 0.9
    assert top(logits, [(label + 1) % len(NAMES) for label in labels]) <= 0.1
    assert top(logits, labels, k=len(NAMES)) == 1.0


def test_it_is_the_same_when_it_is_read_again(judge: Judge, tmp_path) -> None:
    judge.save(tmp_path / "judge.safetensors")
    again = Judge.load(tmp_path / "judge.safetensors")
    assert (again.classes, again.width, again.places) == (judge.classes, judge.width, judge.places)
    pixels, _ = single_shapes(range(50))
    torch.testing.assert_close(again.logits(pixels), judge.logits(pixels), rtol=0.02, atol=0.05)


def test_copies_are_drawn_by_the_generator_alone() -> None:
    image = torch.rand(4, 3, 16, 16) * 2 - 1
    one, again, other = (varied(image, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == image.shape


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_what_is_no_judge_is_refused(tmp_path, content) -> None:
    path = tmp_path / "judge.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="is no judge of pictures"):
        Judge.load(path)
