"""Gradients summed over ranks while the backward pass goes on, for strategies that split masters over ranks.

DeepSpeed's hooks take a tenth of a millisecond of the host for each parameter. A U-Net has 700 of them and a step
of a third of a second, which the host spends half of on launching kernels: with those hooks the GPU waits for it.
Here a hook counts, and a bucket of many gradients is copied, reduced and added to float32 sums by a few kernels.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.distributed.world import World

# torch 2.13 gave it a new name.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

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


@dataclass
class _Bucket:
    """Parameters, by number, whose gradients are reduced as one; `missing`: those that this pass hasn't come to."""

    numbers: list[int]
    runs: list[_Run]
    missing: int = 0


class Reduction:
    """Sums of gradients over ranks and micro-batches, of which each rank keeps its pieces.

    Buckets are made of gradients in the order in which rank 0's first backward pass comes to them, and are reduced
    in that order on all ranks. A parameter without a gradient counts as zeros.

    Args:
        pieces: for each of `parameters`, which stand in the order in which pieces lie in their keys.
        keys: flat tensors; a sum is shaped like each.
        bucket_elements: of a bucket, unless one parameter has more.
    """

    def __init__(
        self,
        world: World,
        parameters: Sequence[nn.Parameter],
        pieces: Sequence[Piece],
        keys: Sequence[Tensor],
        bucket_elements: int,
    ) -> None:
        self.world, self.bucket_elements = world, bucket_elements
        self.parameters, self.pieces, self.keys = list(parameters), list(pieces), list(keys)
        self.sums: dict[int, Tensor] | None = None  # by id of the key; none between a step and the next pass
        self.buckets: list[_Bucket] = []
        self._bucket_of: list[_Bucket] = []  # of each parameter
        self._gradients: dict[int, Tensor] = {}  # by number of the parameter, in order of arrival
        self._is_on = False
        self._next = 0  # the first bucket that is not reduced yet
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" and world.size > 1 else None
        for number, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(functools.partial(self._came, number=number))

    @contextlib.contextmanager
    def of_a_pass(self) -> Iterator[None]:
        """Within it gradients of a backward pass are reduced and added to the sums. Collective."""
        for bucket in self.buckets:
            bucket.missing = len(bucket.numbers)
        self._gradients.clear()  # of a pass that failed
        self._is_on, self._next = True, 0
        try:
            yield
            for number, parameter in enumerate(self.parameters):
                if parameter.grad is not None:  # of an earlier micro-batch alone
                    self._came(parameter, number=number)
            if not self.buckets:
                self._make_buckets()
            while self._next < len(self.buckets):
                self._reduce_next()
        finally:
            self._is_on = False
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def take(self) -> list[Tensor]:
        """The sums, one for each key, which are given up."""
        sums = self.sums
        assert sums is not None
        self.sums = None
        return [sums[id(key)] for key in self.keys]

    def _came(self, parameter: Tensor, *, number: int) -> None:
        if not self._is_on:
            return  # the gradient stays, and the next is added to it
        assert parameter.grad is not None and number not in self._gradients
        self._gradients[number], parameter.grad = parameter.grad, None
        if self.buckets:
            self._bucket_of[number].missing -= 1
            while self._next < len(self.buckets) and not self.buckets[self._next].missing:
                self._reduce_next()

    def _make_buckets(self) -> None:
        came = list(self._gradients)
        order = self.world.broadcast([*came, *(n for n in range(len(self.parameters)) if n not in self._gradients)])
        groups: list[list[int]] = []
        elements = self.bucket_elements
        for number in order:
            size = self.pieces[number].numel
            if elements + size > self.bucket_elements:
                groups.append([])
                elements = 0
            groups[-1].append(number)
            elements += size
        # Neighbours in the model are neighbours in the sums: few runs.
        self.buckets = [_Bucket(sorted(group), self._runs(sorted(group))) for group in groups]
        of_numbers = {number: bucket for bucket in self.buckets for number in bucket.numbers}
        self._bucket_of = [of_numbers[number] for number in range(len(self.parameters))]

    def _runs(self, numbers: Sequence[int]) -> list[_Run]:
        runs: list[_Run] = []
        at = 0
        for number in numbers:
            piece = self.pieces[number]
            if piece.count:
                first, count, offset = at + self._place(piece), piece.count, piece.offset
                if runs:
                    start, before, key, onto = runs[-1]
                    if key is piece.key and start + before == first and onto + before == offset:
                        runs.pop()
                        first, count, offset = start, before + count, onto
                runs.append((first, count, piece.key, offset))
            at += self._width(piece)
        return runs

    @torch.no_grad()
    def _reduce_next(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        if self.sums is None:
            self.sums = {id(key): torch.zeros_like(key, dtype=torch.float32) for key in self.keys}
        pieces = [self.pieces[number] for number in bucket.numbers]
        flat = self._flat(pieces, [self._gradients.pop(number, None) for number in bucket.numbers])
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            flat.record_stream(self._stream)
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            mine = self._summed(flat)
            for first, count, key, offset in bucket.runs:
                self.sums[id(key)][offset : offset + count].add_(mine[first : first + count])

    def _place(self, piece: Piece) -> int:
        """Where this rank's piece begins among the elements that it gets of the parameter."""
        return piece.start

    def _width(self, piece: Piece) -> int:
        """Of a parameter how many elements a rank gets."""
        return piece.numel

    def _flat(self, pieces: Sequence[Piece], gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients one behind the other."""
        flat = self._empty(sum(piece.numel for piece in pieces))
        parts = flat.split([piece.numel for piece in pieces])
        _fill([part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)], gradients)
        return flat

    def _summed(self, flat: Tensor) -> Tensor:
        """What this rank gets, summed over ranks."""
        return self.world.sum_(flat)

    def _empty(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self.parameters[0].dtype, device=self.world.device)


class ScatteredReduction(Reduction):
    """Where each rank keeps an equal piece of each parameter: it gets those alone."""

    def _place(self, piece: Piece) -> int:
        return 0

    def _width(self, piece: Piece) -> int:
        return piece.each

    def _flat(self, pieces: Sequence[Piece], gradients: Sequence[Tensor | None]) -> Tensor:
        """All pieces of rank 0, then those of rank 1, and so on; a parameter's last ones may be padding."""
        if self.world.size == 1:
            return super()._flat(pieces, gradients)
        ranks = self.world.size
        flat = self._empty(ranks * sum(piece.each for piece in pieces))
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

    def _summed(self, flat: Tensor) -> Tensor:
        if self.world.size == 1:
            return flat
        mine = self._empty(len(flat) // self.world.size)
        reduce_scatter(mine, flat)
        return mine


def _fill(parts: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    have = [one is not None for one in gradients]
    if any(have):
        torch._foreach_copy_(list(itertools.compress(parts, have)), [one for one in gradients if one is not None])
    for part, filled in zip(parts, have, strict=True):
        if not filled:
            part.zero_()
