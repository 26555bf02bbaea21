"""A label becomes one learned token, the null class where it is left out, and nothing else passes for a label."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from finetune import UserError, tasks
from finetune.batch import Sample
from finetune.conditioning import Conditioner, Given, batch_of
from finetune.latents import LatentSpace

GIVEN = Given(12, 4, 4, LatentSpace(1.0), classes=["circle", "square", "triangle"], seed=5)


def conditioner(given: Given = GIVEN, **options: Any) -> Conditioner:
    return tasks.make("class_to_image", options, given)


def sample(**record: Any) -> Sample:
    return Sample({"captions": ["x"], **record}, (32, 32))


def context(made: Conditioner, labels: list[int], drop: list[bool]) -> torch.Tensor:
    batch = batch_of(made, [sample(**{"class": label}) for label in labels])
    return made(made.inputs(batch, torch.tensor(drop)))["context"]


def test_each_label_has_one_token_of_its_own_and_the_null_class_another() -> None:
    made = conditioner()
    (table,) = made.parts()["conditioner"].parameters()
    assert table.shape == (4, 12)
    told = context(made, [2, 0, 1, 1], [False, False, False, True])
    assert torch.equal(told, table[[2, 0, 1, 3]].unsqueeze(1))
    told.sum().backward()
    assert torch.equal(table.grad, torch.ones_like(table))


def test_it_reads_an_integer_and_asks_for_a_label() -> None:
    made = conditioner()
    assert made.reads and made.guided and made.asks == ("label",) and made.channels == 0
    read = made.read(sample(**{"class": 1}))
    assert {name: (array.dtype, array.shape) for name, array in read.items()} == {"label": (np.dtype(np.int64), ())}


def test_initial_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = conditioner().parts()["conditioner"].weight
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(conditioner().parts()["conditioner"].weight, first)
    other = replace(GIVEN, seed=6)
    assert not torch.equal(conditioner(other).parts()["conditioner"].weight, first)


def test_classes_may_be_more_than_are_named() -> None:
    assert conditioner(classes=7).read(sample(**{"class": 6}))["label"] == 6
    nameless = replace(GIVEN, classes=[])
    assert conditioner(nameless, classes=2).read(sample(**{"class": 1}))["label"] == 1


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "a sample has no class: task=class_to_image needs shards whose records have one"),
        ({"class": 3}, "a sample's class is 3, and labels are integers from 0 to 2"),
        ({"class": -1}, "a sample's class is -1, and"),
        ({"class": "circle"}, "a sample's class is 'circle', and"),
        ({"class": True}, "a sample's class is True, and"),
        ({"class": 1.0}, "a sample's class is 1.0, and"),
    ],
)
def test_what_is_no_label_is_refused(record: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        conditioner().read(sample(**record))
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"classes": []}, {}, "no classes.json is beside the shards: set task.options.classes=N"),
        ({}, {"classes": 0}, "task.options.classes=0 must be at least 1"),
        ({"width": None}, {}, "this U-Net attends to nothing: choose a model with a cross_attention_dim"),
        ({}, {"clases": 3}, "unknown key task.options.clases: did you mean classes?"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        conditioner(replace(GIVEN, **changes), **options)
    assert says in str(caught.value)
