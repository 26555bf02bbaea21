"""A layout is a set of boxes: read exactly, mirrored with its picture, encoded by the paper's equations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from finetune import UserError, tasks
from finetune.batch import Sample
from finetune.conditioning import Conditioner, Given, batch_of
from finetune.latents import LatentSpace
from tests.scenes import draw_scene

GIVEN = Given(16, 4, 4, LatentSpace(1.0), classes=["circle", "square", "triangle"], seed=5)
SMALL = {"boxes": 4, "bins": 9, "layers": 2, "heads": 2}
NONE = [3, 0, 0, 0, 0]
BOXES = [[0, 0.0, 0.0, 0.25, 0.5], [2, 0.5, 0.25, 1.0, 1.0], [1, 0.26, 0.24, 0.5, 0.5]]


def conditioner(given: Given = GIVEN, **options: Any) -> Conditioner:
    return tasks.make("layout_to_image", SMALL | options, given)


def sample(boxes: Any) -> Sample:
    return Sample({"captions": ["x"], "boxes": boxes}, (32, 32))


def context(made: Conditioner, *layouts: Any, drop: list[bool] | None = None) -> torch.Tensor:
    batch = batch_of(made, [sample(boxes) for boxes in layouts])
    return made(made.inputs(batch, torch.tensor(drop or [False] * len(layouts))))["context"]


def test_boxes_are_read_the_largest_first_and_padded() -> None:
    made = conditioner()
    assert made.reads and made.guided and made.asks == ("layout",) and made.channels == 0
    rows = made.read(sample(BOXES))["boxes"]
    assert rows.dtype == np.int64
    assert rows.tolist() == [[2, 4, 2, 8, 8], [0, 0, 0, 2, 4], [1, 2, 2, 4, 4], NONE]
    assert conditioner(boxes=2).read(sample(BOXES))["boxes"].tolist() == [[2, 4, 2, 8, 8], [0, 0, 0, 2, 4]]
    assert made.read(sample([]))["boxes"].tolist() == [NONE] * 4


def test_a_mirrored_layout_is_the_mirrored_one() -> None:
    made = conditioner(bins=65)
    for index in range(60):
        boxes = draw_scene(index, 100)[1]
        rows = made.read(sample(boxes))["boxes"]
        mirrored = made.read(sample([[c, 1 - x1, y0, 1 - x0, y1] for c, x0, y0, x1, y1 in boxes]))["boxes"]
        expected = rows.copy()
        expected[: len(boxes), [1, 3]] = 64 - rows[: len(boxes), [3, 1]]
        assert sorted(mirrored.tolist()) == sorted(expected.tolist())


def test_the_null_layout_is_no_box_and_its_tokens_are_learned() -> None:
    made = conditioner()
    dropped, empty, told = context(made, BOXES, [], BOXES, drop=[True, False, False])
    assert torch.equal(dropped, empty)
    assert (dropped == dropped[0]).all()
    assert not torch.allclose(told[0], dropped[0])
    dropped.sum(dim=0)[0].backward()
    gradient = made.parts()["conditioner"].label.weight.grad
    assert gradient[3].abs().max() > 0
    assert (gradient[:3] == 0).all()


def test_a_layout_is_a_set_whose_boxes_know_of_each_other() -> None:
    made = conditioner()
    boxes = [
        [0, 0.0, 0.0, 0.5, 0.5],
        [1, 0.5, 0.0, 1.0, 0.5],
        [2, 0.0, 0.5, 0.5, 1.0],
    ]  # of one size: kept in order
    with torch.no_grad():
        first, turned, other = context(made, boxes, boxes[::-1], [*boxes[:2], [2, 0.0, 0.5, 0.5, 0.875]])
    assert torch.allclose(first[[2, 1, 0, 3]], turned, atol=1e-5)
    assert not torch.allclose(first[0], other[0], atol=1e-3)


@pytest.mark.parametrize(
    "change", [[1, 0.25, 0.25, 0.75, 0.75], [0, 0.0, 0.25, 0.75, 0.75], [0, 0.25, 0.0, 0.75, 0.75],
               [0, 0.25, 0.25, 1.0, 0.75], [0, 0.25, 0.25, 0.75, 1.0]]
)  # fmt: skip
def test_class_and_each_edge_are_told(change: list[Any]) -> None:
    made = conditioner()
    with torch.no_grad():
        asked, other = context(made, [[0, 0.25, 0.25, 0.75, 0.75]], [change])
    assert (asked[0] - other[0]).abs().max() > 0.1


def test_the_encoder_is_a_pre_norm_transformer_over_the_tokens() -> None:
    """Equations 18 to 21 against torch's own layers."""
    made = conditioner()
    encoder: Any = made.parts()["conditioner"]
    layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    reference = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False).train()
    names = {
        "qkv.weight": "self_attn.in_proj_weight", "qkv.bias": "self_attn.in_proj_bias", "out": "self_attn.out_proj",
        "mlp.0": "linear1", "mlp.2": "linear2",
    }  # fmt: skip
    weights = {key: value for key, value in encoder.state_dict().items() if key.startswith(("blocks.", "norm."))}
    for ours, theirs in names.items():
        weights = {key.replace(f".{ours}", f".{theirs}"): value for key, value in weights.items()}
    reference.load_state_dict({key.replace("blocks.", "layers."): value for key, value in weights.items()})
    rows_N5 = torch.from_numpy(made.read(sample(BOXES))["boxes"])
    edges = [encoder.edge.weight[place * 9 + rows_N5[:, 1 + place]] for place in range(4)]
    tokens = encoder.label.weight[rows_N5[:, 0]] + sum(edges) / 2 * torch.tensor([[1.0], [1], [1], [0]])
    torch.testing.assert_close(context(made, BOXES), reference(tokens[None]))


def test_initial_weights_depend_on_the_seed_alone_and_near_places_are_alike() -> None:
    state = torch.get_rng_state()
    first = conditioner(bins=33).parts()["conditioner"].state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = conditioner(bins=33).parts()["conditioner"].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = conditioner(replace(GIVEN, seed=6), bins=33).parts()["conditioner"].state_dict()
    assert not torch.equal(first["edge.weight"], other["edge.weight"])
    left, top, *_ = conditioner(replace(GIVEN, width=256), bins=33).parts()["conditioner"].edge.weight.split(33)
    near, far = (torch.cosine_similarity(left[:-8], left[by : len(left) - 8 + by]).mean() for by in (1, 8))
    assert near > 0.5 > far
    assert torch.cosine_similarity(left, top).abs().max() < 0.4  # 256 features: chance is 0.06
    assert 0.7 < left.std() < 1.3


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        (None, "a sample has no boxes: task=layout_to_image needs shards whose records have them"),
        ([[3, 0, 0, 1, 1]], "a box's class is 3, and labels are integers from 0 to 2"),
        ([["circle", 0, 0, 1, 1]], "a box's class is 'circle', and"),
        ([[0, 0, 0, 1]], "a box is [0, 0, 0, 1]: it must be [class, x0, y0, x1, y1]"),
        (["box"], "a box is 'box': it must be"),
        (
            [[0, 0, 0, 32, 32]],
            "edges must be fractions of the picture, 0 to 1, x0 below x1 and y0 below y1",
        ),
        ([[0, 0.5, 0, 0.5, 1]], "edges must be fractions"),
        ([[0, 0, 0.6, 1, 0.5]], "edges must be fractions"),
        ([[0, -0.1, 0, 1, 1]], "edges must be fractions"),
        ([[0, 0, 0, float("nan"), 1]], "edges must be fractions"),
        ([[0, 0, 0, "1", 1]], "its edges must be numbers"),
        ({"boxes": []}, "boxes are"),
    ],
)
def test_what_is_no_layout_is_refused(boxes: Any, says: str) -> None:
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        conditioner().read(sample(boxes))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"classes": []}, {}, "no classes.json is beside the shards: set task.options.classes=N"),
        ({"width": None}, {}, "this U-Net attends to nothing: choose a model with a cross_attention_dim"),
        ({}, {"boxes": 0}, "task.options.boxes=0 must be at least 1"),
        ({}, {"bins": 1}, "task.options.bins=1 must be at least 2"),
        ({}, {"layers": -1}, "task.options.layers=-1 must be at least 0"),
        ({}, {"heads": 3}, "task.options.heads=3 must divide the U-Net's cross_attention_dim, which is 16"),
        ({}, {"boxs": 3}, "unknown key task.options.boxs: did you mean boxes?"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        conditioner(replace(GIVEN, **changes), **options)
    assert says in str(caught.value)
