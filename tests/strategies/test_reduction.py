"""Gradients reduced in buckets: each rank's sums are its pieces of the gradients, however those come.

Ranks are played one after the other here; real ones are compared with each other in test_parity.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.distributed import World, reduction
from finetune.distributed.reduction import OwnedReduction, Piece, ScatteredReduction, WholeReduction

SHAPES = [(5, 3), (7,), (4, 2, 3), (1,), (6, 6), (11,)]


def split_as_one(ranks: int, rank: int) -> tuple[list[Piece], list[Tensor]]:
    """As stages 1 and 2: all parameters one behind the other, a rank's share cut from it, in two groups."""
    pieces, keys = [], []
    for group in (SHAPES[:4], SHAPES[4:]):
        share = -(-sum(math.prod(shape) for shape in group) // ranks)
        keys.append(torch.zeros(share))
        at = 0
        for shape in group:
            begins, ends = max(at, rank * share), min(at + math.prod(shape), (rank + 1) * share)
            count = max(0, ends - begins)
            pieces.append(Piece(shape, begins - at if count else 0, count, keys[-1], begins - rank * share))
            at += math.prod(shape)
    return pieces, keys


def split_each(ranks: int, rank: int) -> tuple[list[Piece], list[Tensor]]:
    """As stage 3: each parameter is cut in equal pieces, the last of which may be padding."""
    eaches = [-(-math.prod(shape) // ranks) for shape in SHAPES]
    key, pieces, offset = torch.zeros(sum(eaches)), [], 0
    for shape, each in zip(SHAPES, eaches, strict=True):
        start = min(rank * each, math.prod(shape))
        pieces.append(Piece(shape, start, min(each, math.prod(shape) - start), key, offset, each))
        offset += each
    return pieces, [key]


class Played:
    """One rank's reduction; what it would get from the others is what they are made of: the same gradients."""

    def __init__(self, kind, split, ranks: int, rank: int, bucket_elements: int) -> None:
        self.pieces, self.keys = split(ranks, rank)
        self.parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        self.ranks, self.rank, self.split = ranks, rank, split
        world = World(rank, ranks, rank, torch.device("cpu"))
        self.reduction = kind(world, self.parameters, self.pieces, self.keys, bucket_elements)
        self.collectives: list[int] = []

    def scatter(self, mine: Tensor, flat: Tensor) -> None:
        self.collectives.append(len(flat))
        mine.copy_((flat * self.ranks).view(self.ranks, -1)[self.rank])  # all ranks have equal gradients

    def sum_at(self, parts: Iterable[tuple[int, Tensor]]) -> None:
        parts = list(parts)
        self.collectives.append(sum(len(part) for _, part in parts))
        for rank, part in parts:
            part.mul_(self.ranks if rank == self.rank else math.nan)

    def gather(self, value: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Where each rank's pieces are."""
        of_ranks = [self.split(self.ranks, rank)[0] for rank in range(self.ranks)]
        gathered = [[(piece.start, piece.count) for piece in pieces] for pieces in of_ranks]
        assert gathered[self.rank] == value
        return gathered

    def run(self, order: list[int], gradients: list[Tensor]) -> None:
        """A backward pass that comes to these parameters in this order."""
        self.reduction.begin(reduces=True)
        with self.reduction.of_a_pass():
            for number in order:
                (self.parameters[number] * gradients[number]).sum().backward()
                assert self.parameters[number].grad is None

    def check(self, wanted: list[Tensor]) -> None:
        sums = dict(zip(map(id, self.keys), self.reduction.take(), strict=True))
        covered = {id(key): torch.zeros(len(key), dtype=torch.bool) for key in self.keys}
        for piece, gradient in zip(self.pieces, wanted, strict=True):
            found = sums[id(piece.key)][piece.offset : piece.offset + piece.count]
            assert torch.equal(found, gradient.reshape(-1)[piece.start : piece.start + piece.count])
            covered[id(piece.key)][piece.offset : piece.offset + piece.count] = True
        for key, total in sums.items():
            assert not total[~covered[key]].any()  # padding


@pytest.fixture
def played(monkeypatch):
    def make(kind, split, ranks: int, rank: int, bucket_elements: int = 40) -> Played:
        one = Played(kind, split, ranks, rank, bucket_elements)
        monkeypatch.setattr(World, "broadcast", lambda self, value: value)
        monkeypatch.setattr(World, "gather", lambda self, value: one.gather(value))
        monkeypatch.setattr(World, "sum_at_", lambda self, parts: one.sum_at(parts))
        monkeypatch.setattr(reduction, "reduce_scatter", one.scatter)
        return one

    return make


KINDS = [(OwnedReduction, split_as_one), (ScatteredReduction, split_each)]


@pytest.mark.parametrize(("kind", "split"), KINDS, ids=["as_one", "each"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("in_place", [12, 1 << 18])
def test_sums_are_the_pieces_of_all_gradients(played, monkeypatch, kind, split, ranks, in_place):
    monkeypatch.setattr(reduction, "IN_PLACE_ELEMENTS", in_place)
    draws = torch.Generator().manual_seed(ranks)
    for rank in range(ranks):
        one = played(kind, split, ranks, rank)
        for _ in range(3):
            wanted = [torch.zeros(shape) for shape in SHAPES]
            for _ in range(2):  # micro-batches of a step, which come in different orders
                order = torch.randperm(len(SHAPES), generator=draws).tolist()
                gradients = [torch.randint(-9, 9, shape, generator=draws).float() for shape in SHAPES]
                one.run(order, gradients)
                wanted = [total + ranks * gradient for total, gradient in zip(wanted, gradients, strict=True)]
            one.check(wanted)


@pytest.mark.parametrize(("kind", "split"), KINDS, ids=["as_one", "each"])
def test_a_parameter_without_a_gradient_counts_as_zeros(played, kind, split):
    for rank, missing in itertools.product(range(2), range(len(SHAPES))):
        one = played(kind, split, 2, rank)
        gradients = [torch.ones(shape) for shape in SHAPES]
        for absent in (missing, None, missing):  # known in the first pass, or not
            order = [number for number in range(len(SHAPES)) if number != absent]
            one.run(order, gradients)
            one.check([2 * g * (number != absent) for number, g in enumerate(gradients)])


def test_buckets_follow_the_first_pass_and_keep_its_order(played):
    one = played(OwnedReduction, split_as_one, 2, 0)
    gradients = [torch.ones(shape) for shape in SHAPES]
    first = [5, 4, 3, 2, 1, 0]
    one.run(first, gradients)
    sizes = list(one.collectives)
    assert one.reduction.buckets == [[5], [3, 4], [1, 2], [0]]
    one.collectives.clear()
    one.run([0, 1, 2, 3, 4, 5], gradients)  # a rank whose gradients come otherwise reduces as the others do
    assert one.collectives == sizes


def test_buckets_are_reduced_while_gradients_still_come(played):
    one = played(OwnedReduction, split_as_one, 2, 0)
    gradients = [torch.ones(shape) for shape in SHAPES]
    order = [5, 4, 3, 2, 1, 0]
    one.run(order, gradients)
    one.reduction.take()
    one.collectives.clear()
    one.reduction.begin(reduces=True)
    with one.reduction.of_a_pass():
        done = []
        for number in order:
            (one.parameters[number] * gradients[number]).sum().backward()
            done.append(len(one.collectives))
    assert done == [1, 1, 2, 2, 3, 4]


def test_outside_of_a_pass_gradients_add_up_where_they_are(played):
    """As those of stage 1 before a step's last micro-batch."""
    one = played(OwnedReduction, split_as_one, 2, 1)
    gradients = [torch.full(shape, 2.0) for shape in SHAPES]
    for number, gradient in enumerate(gradients):
        (one.parameters[number] * gradient).sum().backward()
    assert not one.collectives
    one.run(list(range(len(SHAPES))), gradients)
    one.check([4.0 * gradient for gradient in gradients])


def test_gradients_that_only_an_earlier_micro_batch_came_to_are_reduced_as_well(played):
    one = played(OwnedReduction, split_as_one, 2, 0)
    gradients = [torch.full(shape, 2.0) for shape in SHAPES]
    for _ in range(2):  # before buckets are known, and after
        (one.parameters[3] * gradients[3]).sum().backward()
        one.run([5, 4, 1, 0], gradients)
        assert one.parameters[3].grad is None
        one.check([2.0 * gradient * (number != 2) for number, gradient in enumerate(gradients)])


def test_neighbours_are_added_at_once(played):
    one = played(OwnedReduction, split_as_one, 1, 0, 10_000)
    one.run([3, 0, 5, 1, 4, 2], [torch.ones(shape) for shape in SHAPES])
    [[row]] = one.reduction.rows
    assert len(row.runs) == 2  # one for each key


def test_large_gradients_are_reduced_where_they_lie(played, monkeypatch):
    """Each part of them by the rank that keeps it; small ones in one row."""
    monkeypatch.setattr(reduction, "IN_PLACE_ELEMENTS", 12)
    one = played(OwnedReduction, split_as_one, 2, 1)  # rank 0 keeps 24 of 47 elements, and 24 of 47
    one.run([5, 4, 3, 2, 1, 0], [torch.ones(shape) for shape in SHAPES])
    assert one.reduction.buckets == [[5], [3, 4], [1, 2], [0]]
    told = [[(row.numbers, row.parts) for row in rows] for rows in one.reduction.rows]
    assert told == [
        [([5], [(1, 0, 11)])],
        [([4], [(0, 0, 24), (1, 24, 36)]), ([3], [(1, 0, 1)])],
        [([2], [(0, 0, 2), (1, 2, 24)]), ([1], [(0, 0, 7)])],
        [([0], [(0, 0, 15)])],
    ]
    reduced: list[int] = []
    monkeypatch.setattr(World, "sum_at_", lambda self, parts: reduced.extend(part.data_ptr() for _, part in parts))
    gradients = [torch.ones(shape) for shape in SHAPES]
    for parameter, gradient in zip(one.parameters, gradients, strict=True):
        parameter.grad = gradient
    one.reduction.begin(reduces=True)
    with one.reduction.of_a_pass():
        pass
    assert all((gradient.data_ptr() in reduced) is (gradient.numel() >= 12) for gradient in gradients)


# --- whole sums -------------------------------------------------------------------------------------


@pytest.fixture
def whole(monkeypatch):
    """A reduction of two ranks with equal gradients, and the sizes of its collectives."""
    monkeypatch.setattr(World, "broadcast", lambda self, value: value)
    sizes: list[int] = []

    def doubled(self: World, flats: list[Tensor]) -> None:
        sizes.append(sum(map(len, flats)))
        for flat in flats:
            flat.mul_(2)

    monkeypatch.setattr(World, "sum_all_", doubled)
    monkeypatch.setattr(reduction, "IN_PLACE_ELEMENTS", 12)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    parameters[2].data = torch.zeros(2, 3, 4).permute(2, 0, 1)  # stored otherwise than it is indexed

    def make(**settings: Any) -> WholeReduction:
        return WholeReduction(World(0, 2, 0, torch.device("cpu")), parameters, 40, **settings)

    return make, parameters, sizes


@pytest.mark.parametrize("they_come", [True, False])
def test_every_rank_gets_whole_sums_as_gradients(whole, they_come):
    make, parameters, sizes = whole
    reduction, draws = make(they_come=they_come), torch.Generator().manual_seed(0)
    for _ in range(3):
        wanted = [torch.zeros(shape) for shape in SHAPES]
        for last in (False, True):  # micro-batches, of which the last is reduced with those before it
            gradients = [torch.randint(-9, 9, shape, generator=draws).float() for shape in SHAPES]
            before = len(sizes)
            reduction.begin(reduces=last)
            with reduction.of_a_pass():
                for number in torch.randperm(len(SHAPES), generator=draws).tolist():
                    (parameters[number] * gradients[number]).sum().backward()
            assert (len(sizes) > before) is last
            wanted = [total + gradient for total, gradient in zip(wanted, gradients, strict=True)]
        for parameter, total in zip(parameters, wanted, strict=True):
            assert parameter.grad.stride() == parameter.stride()  # as autograd's own, and an optimizer's moments
            assert torch.equal(parameter.grad, 2 * total)
            parameter.grad = None
    assert len(reduction.buckets) > 1 and len(sizes) == 3 * len(reduction.buckets)


def test_sums_can_travel_as_bf16(whole, monkeypatch):
    make, parameters, _ = whole
    reduction, types = make(dtype=torch.bfloat16), set()
    real = World.sum_all_
    monkeypatch.setattr(
        World, "sum_all_", lambda self, flats: types.update(flat.dtype for flat in flats) or real(self, flats)
    )
    draws = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=draws) for shape in SHAPES]
    with reduction.of_a_pass():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            (parameter * gradient).sum().backward()
    assert types == {torch.bfloat16}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, 2 * gradient.bfloat16().float())


def test_small_gradients_travel_as_one(whole, monkeypatch):
    make, parameters, _ = whole
    reduction, travelled = make(), []
    real = World.sum_all_
    monkeypatch.setattr(
        World, "sum_all_", lambda self, flats: travelled.append([len(flat) for flat in flats]) or real(self, flats)
    )
    with reduction.of_a_pass():
        for parameter in parameters:
            parameter.sum().backward()
    assert reduction.buckets == [[0, 1], [2, 3], [4], [5]]
    assert travelled == [[15, 7], [24, 1], [36], [11]]  # in place, then those of fewer than 12 in one row
    assert all(bool((parameter.grad == 2).all()) for parameter in parameters)


def test_gradients_travel_in_the_order_of_their_parameters(whole):
    """Else ranks, whose kernels may leave them otherwise, would add up elements that don't belong together."""
    make, parameters, _ = whole
    reduction = make()
    gradient = torch.arange(24.0).reshape(4, 2, 3)
    parameters[2].grad = gradient.clone()
    assert parameters[2].grad.stride() != parameters[2].stride()
    with reduction.of_a_pass():
        pass
    assert parameters[2].grad.stride() == parameters[2].stride()
    assert torch.equal(parameters[2].grad, 2 * gradient)
    assert not parameters[0].grad.any()  # it had none


def test_a_pass_that_failed_is_forgotten(whole):
    make, parameters, _ = whole
    reduction = make()
    for fails in (False, True, False):
        try:
            with reduction.of_a_pass():
                for parameter in parameters[3:]:
                    parameter.sum().backward()
                if fails:
                    raise RuntimeError
                for parameter in parameters[:3]:
                    parameter.sum().backward()
        except RuntimeError:
            pass
        else:
            assert all(bool((parameter.grad == 2).all()) for parameter in parameters)
        for parameter in parameters:
            parameter.grad = None


# --- beside a CUDA graph ----------------------------------------------------------------------------


class Streams:
    """Plays `torch.cuda`'s streams and events, and writes down who waits for what."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.now = Stream("passes", self)


class Event:
    def __init__(self, streams: Streams, external: bool = False) -> None:
        self.streams, self.external, self.name = streams, external, ""

    def record(self) -> None:
        assert self.external and self.streams.now.name == "passes"
        self.name = f"mark {sum(told.startswith('record') for told in self.streams.told)}"
        self.streams.told.append(f"record {self.name}")


class Stream:
    def __init__(self, name: str, streams: Streams) -> None:
        self.name, self.streams = name, streams

    def wait_stream(self, other: Stream) -> None:
        if other is not self:
            self.streams.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.streams.told.append(f"{self.name} waits for {event.name}")

    def record_event(self) -> Event:
        return Event(self.streams)


@pytest.fixture
def streams(monkeypatch):
    made = Streams()

    @contextlib.contextmanager
    def on(stream: Stream):
        before, made.now = made.now, stream
        yield
        made.now = before

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made.now)
    monkeypatch.setattr(torch.cuda, "Event", lambda external: Event(made, external))
    return made


def test_buckets_of_a_graph_are_reduced_as_they_become_complete(whole, streams):
    """In each replay a bucket waits for its own mark; one without, for all of the graph."""
    make, parameters, sizes = whole
    reduction = make()
    with reduction.of_a_pass():
        for parameter in parameters:
            parameter.sum().backward()
    assert reduction.buckets == [[0, 1], [2, 3], [4], [5]]
    reduction._stream = Stream("collectives", streams)
    for parameter in parameters:
        parameter.grad = None
    missing = reduction.buckets[1][0]
    with reduction.captured() as marks:
        for number, parameter in enumerate(parameters):
            if number != missing:
                parameter.sum().backward()
    assert [mark is None for mark in marks] == [False, True, False, False]
    assert streams.told == ["record mark 0", "record mark 1", "record mark 2"]
    sizes.clear()
    for _ in range(2):
        streams.told.clear()
        held = [torch.ones_like(parameter) for parameter in parameters]  # the graph's own memory
        for number, parameter in enumerate(parameters):
            parameter.grad = None if number == missing else held[number]
        reduction.reduce_left(marks)
        assert streams.told == [
            "collectives waits for mark 0",
            "collectives waits for passes",
            "collectives waits for mark 1",
            "collectives waits for mark 2",
            "passes waits for collectives",
        ]
        for number, parameter in enumerate(parameters):
            assert bool((parameter.grad == (0 if number == missing else 2)).all())
            if number != missing:
                assert parameter.grad is held[number]  # reduced where it lies
    assert len(sizes) == 8


def test_what_is_on_its_way_is_bounded(whole, streams):
    """Passes wait for the oldest bucket once four are being reduced."""
    make, parameters, _ = whole
    reduction = make(dtype=torch.bfloat16)
    reduction.bucket_elements = 1
    reduction._stream = Stream("collectives", streams)
    for _ in range(2):
        streams.told.clear()
        with reduction.of_a_pass():
            for parameter in parameters:
                parameter.sum().backward()
        assert streams.told.count("collectives waits for passes") == len(parameters) == 6
        assert streams.told.count("passes waits for ") == 2
        assert streams.told[-1] == "passes waits for collectives" and not reduction._flats


def test_sums_can_stay_where_they_are(played):
    """A graph adds to them there."""
    one = played(OwnedReduction, split_as_one, 2, 0)
    one.reduction.keeps_sums = True
    order, places = [5, 4, 3, 2, 1, 0], set()
    for factor in (1.0, 3.0):
        gradients = [torch.full(shape, factor) for shape in SHAPES]
        one.run(order, gradients)
        places.add(tuple(total.data_ptr() for total in one.reduction.sums.values()))
        one.check([2 * gradient for gradient in gradients])
    assert len(places) == 1
