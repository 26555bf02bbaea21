"""Updated weights sent to all ranks beside the next pass; real ranks are in test_parity.py and test_graphs.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.distributed import World, reduction, renewal
from finetune.distributed.reduction import OwnedReduction
from finetune.distributed.renewal import Renewal
from tests.strategies.test_reduction import SHAPES, split_as_one

RANKS = 3


class Layer(nn.Module):
    """Holds one of the parameters, and notes that it is called."""

    def __init__(self, parameter: nn.Parameter, number: int, called: list[str]) -> None:
        super().__init__()
        self.weight, self.number, self.called = parameter, number, called

    def forward(self) -> None:
        self.called.append(f"layer {self.number}")


class Model(nn.Module):
    def __init__(self, parameters: list[nn.Parameter], called: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(p, number, called) for number, p in enumerate(parameters))

    def forward(self) -> None:
        for layer in self.layers:
            layer()


class Sent:
    """One rank of three, whose weights lie in one flat tensor as DeepSpeed's do; the others have `truth`."""

    def __init__(self, rank: int, patch: pytest.MonkeyPatch) -> None:
        self.truth = torch.arange(1.0, 1 + sum(map(math.prod, SHAPES)))
        self.flat = torch.full_like(self.truth, math.nan)
        parts = self.flat.split([math.prod(shape) for shape in SHAPES])
        parameters = [nn.Parameter(part.view(shape)) for part, shape in zip(parts, SHAPES, strict=True)]
        self.told: list[str] = []  # what is sent, called and waited for
        self.order: list[list[int]] = []  # places of what is sent by itself
        held = [[(piece.start, piece.count) for piece in split_as_one(RANKS, r)[0]] for r in range(RANKS)]
        patch.setattr(World, "gather", lambda self, value: held)
        patch.setattr(World, "spread_", lambda _, parts: self.spread(parts))
        patch.setattr(renewal, "all_gather", self.all_gather)
        pieces, keys = split_as_one(RANKS, rank)
        world = World(rank, RANKS, rank, torch.device("cpu"))
        self.reduction = OwnedReduction(world, parameters, pieces, keys, 40)
        self.model = Model(parameters, self.told)
        self.renewal = Renewal(world, self.model, self.reduction, lambda _: False)
        for parameter, piece in zip(parameters, pieces, strict=True):  # what this rank has updated
            mine = parameter.data.view(-1)[piece.start : piece.start + piece.count]
            mine.copy_(self.true(mine))

    def true(self, part: Tensor) -> Tensor:
        return self.truth[part.storage_offset() : part.storage_offset() + len(part)]

    def spread(self, parts: list[tuple[int, Tensor]]) -> None:
        self.told.append("bucket")
        self.order.append([part.storage_offset() for _, part in parts])
        for rank, part in parts:
            if rank == self.renewal.world.rank:
                assert torch.equal(part, self.true(part))  # it is sent by who has it
            part.copy_(self.true(part))

    def all_gather(self, every: Tensor, mine: Tensor) -> None:
        self.told.append("small")
        rows = every.view(RANKS, -1)
        for row, pieces in zip(rows, self.renewal._small, strict=True):
            whole = torch.cat([self.true(piece) for piece in pieces])
            row[: len(whole)] = whole
        own = sum(map(len, self.renewal._small[self.renewal.world.rank]))
        assert torch.equal(mine[:own], rows[self.renewal.world.rank, :own])


@pytest.fixture
def sent(monkeypatch) -> Callable[[int], Sent]:
    monkeypatch.setattr(reduction, "IN_PLACE_ELEMENTS", 12)
    return lambda rank: Sent(rank, monkeypatch)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("is_known", [False, True])
def test_all_weights_come_from_those_who_have_them(sent, rank, is_known):
    one = sent(rank)
    if is_known:
        one.reduction.buckets = [[5], [3, 4], [1, 2], [0]]
    one.renewal.start()
    assert torch.equal(one.flat, one.truth)
    assert one.told == (["small", "bucket", "bucket", "bucket"] if is_known else ["small", "bucket"])


def test_weights_come_in_the_order_of_a_forward_pass(sent):
    """Before the first pass nobody knows it."""
    one = sent(0)
    one.renewal.start()
    one.reduction.buckets = [[5], [3, 4], [0], [1, 2]]  # gradients of a model that begins with parameters 1 and 2
    one.order.clear()
    one.renewal.start()
    starts = [0]
    for shape in SHAPES:
        starts.append(starts[-1] + math.prod(shape))
    firsts = [places[0] for places in one.order]
    assert firsts == [starts[2], starts[0], starts[4]]  # of 12 elements or more


class Event:
    def __init__(self, told: list[str], **_: Any) -> None:
        self.told, self.name = told, ""

    def record(self) -> None:
        self.told.append("recorded")

    def wait(self) -> None:
        self.told.append(f"waits for {self.name}")


def test_what_is_in_no_layer_is_waited_for_at_once(sent, monkeypatch):
    """A parameter of a module that has layers too."""
    one = sent(0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **settings: Event(one.told, **settings))
    del one.model.layers[4]
    one.model.own = one.reduction.parameters[4]
    again = Renewal(one.renewal.world, one.model, one.reduction, lambda _: False)
    again._stream = object()
    one.reduction.buckets = [[5], [3, 4], [1, 2], [0]]
    with again.captured():
        for name, event in zip(["small", "0", "1 and 2", "3 and 4"], again._there, strict=True):
            event.name = name
        one.told.clear()
        one.model()
    assert one.told[:5] == ["waits for small", "waits for 0", "waits for 1 and 2", "waits for 3 and 4", "layer 0"]


def test_a_graph_waits_for_each_bucket_where_it_is_needed_first(sent, monkeypatch):
    one = sent(0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **settings: Event(one.told, **settings))
    one.renewal._stream = object()
    one.reduction.buckets = [[5], [3, 4], [1, 2], [0]]
    one.model()
    assert not any("waits" in told for told in one.told)
    with one.renewal.captured():
        for name, event in zip(["small", "0", "1 and 2", "3 and 4"], one.renewal._there, strict=True):
            event.name = name
        one.told.clear()
        one.model()
        one.model()  # recomputed, say
    layers = [f"layer {number}" for number in range(len(SHAPES))]
    assert one.told == [
        "waits for small",
        "waits for 0",
        "layer 0",
        "layer 1",
        "waits for 1 and 2",
        "layer 2",
        "layer 3",
        "waits for 3 and 4",
        "layer 4",
        "layer 5",
        *layers,
    ]
    there = one.renewal._there
    with one.renewal.captured():
        pass
    assert one.renewal._there is there  # graphs wait for these
