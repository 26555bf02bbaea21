"""Gradients summed over ranks while the backward pass goes on.

DeepSpeed's hooks take a tenth of a millisecond of the host for each parameter, and torch's DDP runs in backward
passes, where no CUDA graph can follow. A U-Net has 700 parameters and a step of a third of a second, which the host
spends half of on launching kernels: with DeepSpeed's hooks the GPU waits for it. Here a hook counts, and a bucket
of many gradients is copied and reduced by a few kernels.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.distributed.world import World

# torch 2.13 gave it a new name.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

BUCKET_ELEMENTS = 50_000_000  # reduced at a time: a U-Net has 10 to 50 such buckets

IN_PLACE_ELEMENTS = 1 << 18  # gradients with fewer travel as one: NCCL would take some microseconds for each

# As many buckets are on their way at a time: memory is bounded, also in a CUDA graph, where torch's own way to keep
# a tensor for another stream (`record_stream`) keeps it to the end.
_FLATS = 4

# (first element in what a rank gets of a bucket, elements, sum that they are added to, first element in that)
_Run = tuple[int, int, Tensor, int]


@dataclass(frozen=True)
class Piece:
    """What this rank keeps of a parameter: elements `start` to `start + count`, in `key` from `offset` on.

    `shape`: of the whole parameter; `each`: elements of a rank's piece with its padding, where all have equal ones.
    """

    shape: tuple[int, ...]
    start: int
    count: int
    key: Tensor
    offset: int
    each: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Reduction(ABC):
    """Sums of gradients over ranks, bucket by bucket, while the backward pass goes on.

    Buckets are made of gradients in the order in which rank 0's first backward pass comes to them, and are reduced
    in that order on all ranks. A parameter without a gradient counts as zeros.

    A CUDA graph leaves gradients without Python's doing. Within `captured` they leave marks in it, by which
    `reduce_left` reduces each bucket while the graph's later kernels run.

    Args:
        sizes: elements of each of `parameters`, which themselves may be in pieces.
        bucket_elements: of a bucket, unless one parameter has more.
        they_come: gradients are whole as soon as autograd has made them; else after the pass.
    """

    def __init__(
        self,
        world: World,
        parameters: Sequence[nn.Parameter],
        sizes: Sequence[int],
        bucket_elements: int,
        they_come: bool = True,
    ) -> None:
        self.world, self.bucket_elements = world, bucket_elements
        self.parameters, self.sizes = list(parameters), list(sizes)
        self.buckets: list[list[int]] = []  # numbers of parameters
        self._bucket_of: list[int] = []  # by number of the parameter
        self._missing: list[int] = []  # by number of the bucket: gradients that this pass hasn't come to
        self._order: dict[int, None] = {}  # numbers of parameters, as the first pass comes to them
        self._gradients: dict[int, Tensor] = {}  # by number of the parameter: to be reduced
        self._taken: set[int] = set()  # numbers of parameters whose gradients were among those in this pass
        self.reduces = True  # this micro-batch's gradients; else they stay where they are, and the next are added
        self._is_on = False
        self._next = 0  # the first bucket that is not reduced yet
        self._marks: list[torch.cuda.Event | None] | None = None  # of a capture
        # Being reduced, each bucket with its end.
        self._flats: deque[tuple[torch.cuda.Event, Sequence[Tensor]]] = deque()
        on_gpu = world.device.type == "cuda" and world.size > 1
        # Peers wait for a rank's collectives: they go before the pass's kernels.
        self._stream = torch.cuda.Stream(world.device, priority=-1) if on_gpu else None
        if they_come:
            for number, parameter in enumerate(self.parameters):
                parameter.register_post_accumulate_grad_hook(functools.partial(self._comes, number=number))

    @abstractmethod
    def _reduce(self, bucket: int, gradients: Sequence[Tensor | None]) -> None:
        """Sum a bucket's gradients, which stand in the order of its numbers, over ranks. Collective."""

    def begin(self, *, reduces: bool) -> None:
        """Before each micro-batch, outside of CUDA graphs: whether its gradients are reduced, with those before."""
        self.reduces = reduces

    @contextlib.contextmanager
    def of_a_pass(self) -> Iterator[None]:
        """Around a forward and backward pass, whose gradients are reduced if they are to be. Collective."""
        self._missing = [len(bucket) for bucket in self.buckets]
        self._gradients.clear()  # of a pass that failed
        self._taken.clear()
        self._is_on, self._next = self.reduces, 0
        try:
            yield
            if not self.buckets:
                self._make_buckets()
            if self.reduces:
                self._reduce_rest()
        finally:
            self._is_on = False
            self._join()

    @contextlib.contextmanager
    def captured(self) -> Iterator[list[torch.cuda.Event | None]]:
        """Around a pass that a CUDA graph is made of: by bucket, what tells in each replay that it is complete."""
        self._missing = [len(bucket) for bucket in self.buckets]
        self._marks = [None] * len(self.buckets)
        try:
            yield self._marks
        finally:
            self._marks = None

    def reduce_left(self, marks: Sequence[torch.cuda.Event | None]) -> None:
        """Reduce what a graph, whose replay has been started, leaves as gradients, if it is to be. Collective."""
        if not self.reduces:
            return
        if self._stream is None or not marks:
            with self.of_a_pass():
                return
        for bucket, mark in enumerate(marks):
            if mark is None:
                self._stream.wait_stream(torch.cuda.current_stream())
            else:
                self._stream.wait_event(mark)
            gradients = []
            for number in self.buckets[bucket]:
                gradients.append(self.parameters[number].grad)
                self.parameters[number].grad = None
            with torch.cuda.stream(self._stream):
                self._reduce(bucket, gradients)
        self._join()

    def _comes(self, parameter: Tensor, *, number: int) -> None:
        if not self.buckets:
            self._order[number] = None
        elif self._marks is not None and self._stream is not None:
            bucket = self._bucket_of[number]
            self._missing[bucket] -= 1
            if not self._missing[bucket]:
                mark = torch.cuda.Event(external=True)  # type: ignore[call-arg]
                mark.record()
                self._marks[bucket] = mark
        if self._is_on:
            self._take(parameter, number)

    def _take(self, parameter: Tensor, number: int) -> None:
        assert parameter.grad is not None and number not in self._taken
        self._gradients[number], parameter.grad = parameter.grad, None
        self._taken.add(number)
        if self.buckets:
            self._missing[self._bucket_of[number]] -= 1
            while self._next < len(self.buckets) and not self._missing[self._next]:
                self._reduce_next()

    def _reduce_rest(self) -> None:
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is not None and number not in self._taken:  # of an earlier micro-batch alone
                self._take(parameter, number)
        while self._next < len(self.buckets):
            self._reduce_next()

    def _reduce_next(self) -> None:
        bucket, self._next = self._next, self._next + 1
        self._reduce(bucket, [self._gradients.pop(number, None) for number in self.buckets[bucket]])

    def _make_buckets(self) -> None:
        every = range(len(self.parameters))
        order = self.world.broadcast([*self._order, *(n for n in every if n not in self._order)])
        groups: list[list[int]] = []
        elements = self.bucket_elements
        for number in order:
            size = self.sizes[number]
            if elements + size > self.bucket_elements:
                groups.append([])
                elements = 0
            groups[-1].append(number)
            elements += size
        # Neighbours in the model are neighbours in the sums: few runs.
        self.buckets = [sorted(group) for group in groups]
        of_numbers = {number: index for index, bucket in enumerate(self.buckets) for number in bucket}
        self._bucket_of = [of_numbers[number] for number in every]
        self._missing = [len(bucket) for bucket in self.buckets]
        for number in self._gradients:  # those that came before there were any
            self._missing[self._bucket_of[number]] -= 1

    @contextlib.contextmanager
    def _beside(self, flats: Sequence[Tensor], *, are_large: bool = True) -> Iterator[None]:
        """On the stream of collectives, once `flats` are filled; they are held meanwhile, of large ones so many."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream()
        if are_large and len(self._flats) == _FLATS:
            current.wait_event(self._flats.popleft()[0])
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
            self._flats.append((self._stream.record_event(), flats))

    def _join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._flats.clear()

    def _empty(self, elements: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(elements, dtype=dtype or self.parameters[0].dtype, device=self.world.device)


class WholeReduction(Reduction):
    """Each rank gets all sums, as its parameters' gradients, where those lie: data parallelism.

    Large gradients are reduced in place; small ones, and those that travel in another type, in one row of copies.

    Args:
        dtype: gradients are rounded to it, summed over ranks in it, and then of their parameters' type again.
    """

    def __init__(
        self,
        world: World,
        parameters: Sequence[nn.Parameter],
        bucket_elements: int,
        *,
        dtype: torch.dtype = torch.float32,
        they_come: bool = True,
    ) -> None:
        super().__init__(world, parameters, [p.numel() for p in parameters], bucket_elements, they_come)
        self.dtype = dtype

    @torch.no_grad()
    def _reduce(self, bucket: int, gradients: Sequence[Tensor | None]) -> None:
        parameters = [self.parameters[number] for number in self.buckets[bucket]]
        whole = [_lying_as(p, gradient) for p, gradient in zip(parameters, gradients, strict=True)]
        rows = [_row_of(gradient) for gradient in whole]
        is_rounded = self.dtype != rows[0].dtype
        copied = [row for row in rows if is_rounded or len(row) < IN_PLACE_ELEMENTS]
        in_place = [] if is_rounded else [row for row in rows if len(row) >= IN_PLACE_ELEMENTS]
        flat = self._empty(sum(map(len, copied)), self.dtype)
        parts = flat.split([len(row) for row in copied])
        if copied:
            torch._foreach_copy_(parts, copied)
        # Those in place are held by their parameters meanwhile.
        with self._beside([flat], are_large=is_rounded):
            self.world.sum_all_([*in_place, flat] if copied else in_place)
            if copied:
                torch._foreach_copy_(copied, parts)
        for parameter, gradient in zip(parameters, whole, strict=True):
            parameter.grad = gradient


def _lying_as(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """A gradient in the order of the parameter in memory, which all ranks share: channels-last, say."""
    if gradient is None:
        return torch.zeros_like(parameter)
    places = zip(parameter.size(), parameter.stride(), gradient.stride(), strict=True)
    if all(size == 1 or one == other for size, one, other in places):  # as autograd leaves them
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _row_of(gradient: Tensor) -> Tensor:
    """A gradient as a row, in the order in which it lies in memory."""
    return gradient.as_strided((gradient.numel(),), (1,))


class SplitReduction(Reduction):
    """Each rank keeps its pieces of the sums over ranks and micro-batches.

    Args:
        pieces: for each of `parameters`, which stand in the order in which pieces lie in their keys.
        keys: flat tensors; a sum is shaped like each.
    """

    def __init__(
        self,
        world: World,
        parameters: Sequence[nn.Parameter],
        pieces: Sequence[Piece],
        keys: Sequence[Tensor],
        bucket_elements: int,
    ) -> None:
        super().__init__(world, parameters, [piece.numel for piece in pieces], bucket_elements)
        self.pieces, self.keys = list(pieces), list(keys)
        self.sums: dict[int, Tensor] | None = None  # by id of the key; none between a step and the next pass
        self.keeps_sums = False  # they lie where they are for the next step: a CUDA graph adds to them there
        self._kept: dict[int, Tensor] = {}

    def begin(self, *, reduces: bool) -> None:
        super().begin(reduces=reduces)
        if not reduces or self.sums is not None:
            return
        if self._kept:
            self.sums = self._kept
            torch._foreach_zero_(list(self.sums.values()))
        else:
            self.sums = {id(key): torch.zeros_like(key, dtype=torch.float32) for key in self.keys}

    def take(self) -> list[Tensor]:
        """The sums, one for each key, which are given up."""
        sums = self.sums
        assert sums is not None
        self.sums = None
        if self.keeps_sums:
            self._kept = sums
        return [sums[id(key)] for key in self.keys]

    def _runs(self, places: Iterable[tuple[Piece, int]]) -> list[_Run]:
        """Of pieces, each with its first element's place in one tensor: what can be added as one."""
        runs: list[_Run] = []
        for piece, first in places:
            if not piece.count:
                continue
            count, offset = piece.count, piece.offset
            if runs:
                start, before, key, onto = runs[-1]
                if key is piece.key and start + before == first and onto + before == offset:
                    runs.pop()
                    first, count, offset = start, before + count, onto
            runs.append((first, count, piece.key, offset))
        return runs

    def _add(self, mine: Tensor, runs: Sequence[_Run]) -> None:
        assert self.sums is not None
        for first, count, key, offset in runs:
            self.sums[id(key)][offset : offset + count].add_(mine[first : first + count])


@dataclass(frozen=True)
class _Row:
    """Gradients that are reduced as one tensor: a large one where it lies, small ones one behind the other.

    `numbers`: of their parameters; `parts`: (rank that keeps it, first element, end); `runs`: what this rank keeps.
    """

    numbers: list[int]
    parts: list[tuple[int, int, int]]
    runs: list[_Run]


class OwnedReduction(SplitReduction):
    """Each sum goes to the ranks that keep it, and to no other: ZeRO 1 and 2.

    On N ranks an all-reduce, DeepSpeed's default, moves 2 (N - 1) / N times as much.
    """

    rows: list[list[_Row]]  # of each bucket

    def _make_buckets(self) -> None:
        super()._make_buckets()
        self.rows = [self._rows(bucket, self.kept) for bucket in self.buckets]

    @functools.cached_property
    def kept(self) -> list[list[tuple[int, int]]]:
        """By rank, for each parameter: first element and number of elements. Collective at the first use."""
        return self.world.gather([(piece.start, piece.count) for piece in self.pieces])

    def is_large(self, number: int) -> bool:
        """Whether a parameter travels by itself."""
        return self.sizes[number] >= IN_PLACE_ELEMENTS

    def _rows(self, numbers: Sequence[int], kept: Sequence[Sequence[tuple[int, int]]]) -> list[_Row]:
        large = [number for number in numbers if self.is_large(number)]
        small = [number for number in numbers if not self.is_large(number)]
        return [self._row(row, kept) for row in ([*([number] for number in large), small]) if row]

    def _row(self, numbers: Sequence[int], kept: Sequence[Sequence[tuple[int, int]]]) -> _Row:
        begins = itertools.accumulate((self.sizes[number] for number in numbers), initial=0)
        at = dict(zip(numbers, begins, strict=False))
        parts: list[tuple[int, int, int]] = []
        for number, (rank, of_rank) in itertools.product(numbers, enumerate(kept)):
            start, count = of_rank[number]
            if count:
                first = at[number] + start
                if parts and parts[-1][0] == rank and parts[-1][2] == first:
                    first = parts.pop()[1]
                parts.append((rank, first, at[number] + start + count))
        pieces = [self.pieces[number] for number in numbers]
        places = [at[number] + piece.start for number, piece in zip(numbers, pieces, strict=True)]
        return _Row(list(numbers), parts, self._runs(zip(pieces, places, strict=True)))

    @torch.no_grad()
    def _reduce(self, bucket: int, gradients: Sequence[Tensor | None]) -> None:
        of_numbers = dict(zip(self.buckets[bucket], gradients, strict=True))
        rows = self.rows[bucket]
        flats = [self._flat(row.numbers, [of_numbers[number] for number in row.numbers]) for row in rows]
        with self._beside(flats):
            self.world.sum_at_(
                (rank, flat[first:end])
                for row, flat in zip(rows, flats, strict=True)
                for rank, first, end in row.parts
            )
            for row, flat in zip(rows, flats, strict=True):
                self._add(flat, row.runs)

    def _flat(self, numbers: Sequence[int], gradients: Sequence[Tensor | None]) -> Tensor:
        parameters = [self.parameters[number] for number in numbers]
        if self.is_large(numbers[0]):
            return _row_of(_lying_as(parameters[0], gradients[0]))
        flat = self._empty(sum(self.sizes[number] for number in numbers))
        parts = flat.split([self.sizes[number] for number in numbers])
        _fill([part.view(p.shape) for part, p in zip(parts, parameters, strict=True)], gradients)
        return flat


class ScatteredReduction(SplitReduction):
    """Each rank keeps an equal piece of each parameter, and gets those alone: ZeRO 3."""

    def _make_buckets(self) -> None:
        super()._make_buckets()
        self.runs = []
        for bucket in self.buckets:
            pieces = [self.pieces[number] for number in bucket]
            places = itertools.accumulate((self._width(piece) for piece in pieces), initial=0)
            self.runs.append(self._runs(zip(pieces, places, strict=False)))

    def _width(self, piece: Piece) -> int:
        """Of a parameter how many elements a rank gets."""
        return piece.numel if self.world.size == 1 else piece.each

    @torch.no_grad()
    def _reduce(self, bucket: int, gradients: Sequence[Tensor | None]) -> None:
        flat = self._flat([self.pieces[number] for number in self.buckets[bucket]], gradients)
        with self._beside([flat]):
            mine = flat
            if self.world.size > 1:
                mine = self._empty(len(flat) // self.world.size)
                reduce_scatter(mine, flat)
            self._add(mine, self.runs[bucket])

    def _flat(self, pieces: Sequence[Piece], gradients: Sequence[Tensor | None]) -> Tensor:
        """All pieces of rank 0, then those of rank 1, and so on; a parameter's last ones may be padding."""
        ranks = self.world.size
        flat = self._empty(ranks * sum(self._width(piece) for piece in pieces))
        if ranks == 1:
            parts = flat.split([piece.numel for piece in pieces])
            _fill([part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)], gradients)
            return flat
        at = 0
        for piece, gradient in zip(pieces, gradients, strict=True):
            to_RE = flat.view(ranks, -1)[:, at : at + piece.each]
            at += piece.each
            whole, rest = divmod(0 if gradient is None else piece.numel, piece.each)
            if gradient is not None:
                row = gradient.reshape(-1)
                to_RE[:whole].copy_(row[: whole * piece.each].view(whole, piece.each))
                if rest:
                    to_RE[whole, :rest].copy_(row[whole * piece.each :])
            if whole < ranks:
                to_RE[whole, rest:].zero_()
                to_RE[whole + 1 :].zero_()
        return flat


def _fill(parts: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    have = [one is not None for one in gradients]
    if any(have):
        torch._foreach_copy_(list(itertools.compress(parts, have)), [one for one in gradients if one is not None])
    for part, filled in zip(parts, have, strict=True):
        if not filled:
            part.zero_()
