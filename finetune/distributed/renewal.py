"""Updated weights from the ranks that hold their masters to all, beside the next forward pass: ZeRO 1 and 2.

DeepSpeed gathers all weights after an update, and training waits for it: 5 ms of 281 on four GPUs of a host, far
longer over a network. Here they come bucket by bucket in the order in which a forward pass needs them, and a CUDA
graph of a pass waits for each where it is first used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from finetune.distributed.gathering import all_gather, blocks_of
from finetune.distributed.reduction import OwnedReduction
from finetune.distributed.world import World


class Renewal:
    """Sends what this rank has updated of the weights, which are whole on each rank, to all others.

    Args:
        module: whose passes are waited in.
        reduction: it knows whose pieces are whose, and in which order gradients, the other way round, become whole.
        is_block: blocks that read their weights by themselves; all else is read layer by layer. Small weights,
            which others may read as well, come first; what is in neither block nor layer is waited for at once.
    """

    def __init__(
        self, world: World, module: nn.Module, reduction: OwnedReduction, is_block: Callable[[nn.Module], bool]
    ) -> None:
        self.world, self.reduction = world, reduction
        self._small: list[list[Tensor]] = []  # by rank: its pieces of small weights, which travel as one
        self._buckets: list[list[tuple[int, Tensor]]] = []  # (rank, its piece) of each
        self._is_ordered = False
        self._bucket_of: dict[int, int] = {}  # by id of the parameter
        self._there: list[torch.cuda.Event] = []  # small weights, then each bucket
        on_gpu = world.device.type == "cuda" and world.size > 1
        self._stream = torch.cuda.Stream(world.device, priority=-1) if on_gpu else None
        self._waited = 0  # events that a capture has waited for
        self._is_captured = False
        large = {id(p) for number, p in enumerate(reduction.parameters) if reduction.is_large(number)}
        needs_of = {
            block: [id(p) for p in block.parameters() if id(p) in large] for block in blocks_of(module, is_block)
        }
        in_none = large.difference(*needs_of.values())
        needs_of[module] = [*needs_of.get(module, []), *in_none]
        for block, needs in needs_of.items():
            if needs or block is module:
                block.register_forward_pre_hook(functools.partial(self._enter, needs=needs))

    @torch.no_grad()
    def start(self) -> None:
        """Send what was updated. Collective; on a GPU it goes on beside what comes: see `wait`."""
        if self.world.size == 1:
            return
        self._make_buckets()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._send_small()
            if self._stream is not None:
                self._there[0].record()
            for number, parts in enumerate(self._buckets, start=1):
                self.world.spread_(parts)
                if self._stream is not None:
                    self._there[number].record()

    def wait(self) -> None:
        """Let the device wait until all have come: before anything but `captured` passes reads or changes them."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """Around passes that a CUDA graph is made of: its replays wait for each bucket where it is needed first."""
        if self.world.size > 1:
            self._make_buckets()
        self._waited, self._is_captured = 0, True
        try:
            yield
        finally:
            self._is_captured = False

    def _enter(self, *_: object, needs: Sequence[int]) -> None:
        if self._is_captured and self._stream is not None:
            last = max((self._bucket_of[one] for one in needs), default=0)
            for event in self._there[self._waited : last + 1]:
                event.wait()
            self._waited = max(self._waited, last + 1)

    def _send_small(self) -> None:
        counts = [sum(map(len, pieces)) for pieces in self._small]
        mine, most = self._small[self.world.rank], max(counts)
        if not most:
            return
        every_RP = self.reduction.parameters[0].new_empty(len(counts), most)
        if mine:
            torch._foreach_copy_(_split(every_RP[self.world.rank], mine), mine)
        all_gather(every_RP.view(-1), every_RP[self.world.rank].clone())
        for rank, pieces in enumerate(self._small):
            if pieces and rank != self.world.rank:
                torch._foreach_copy_(pieces, _split(every_RP[rank], pieces))

    def _make_buckets(self) -> None:
        if self._is_ordered:
            return
        # Before the first pass nobody knows its order.
        self._is_ordered = bool(self.reduction.buckets)
        parameters, is_large = self.reduction.parameters, self.reduction.is_large
        every = range(len(parameters))
        self._small = [
            [_piece(parameters[n], *of_rank[n]) for n in every if of_rank[n][1] and not is_large(n)]
            for of_rank in self.reduction.kept
        ]
        buckets = [list(filter(is_large, bucket)) for bucket in reversed(self.reduction.buckets or [[*every]])]
        buckets = list(filter(None, buckets))
        self._bucket_of = {id(parameters[n]): at for at, bucket in enumerate(buckets, start=1) for n in bucket}
        ranks = list(enumerate(self.reduction.kept))
        self._buckets = [
            [(rank, _piece(parameters[n], *held[n])) for n in bucket for rank, held in ranks if held[n][1]]
            for bucket in buckets
        ]
        if self._stream is not None:
            self._there = [torch.cuda.Event(external=True) for _ in range(len(buckets) + 1)]  # type: ignore[call-arg]
            for event in self._there:  # there is nothing to wait for yet
                event.record()


def _piece(parameter: nn.Parameter, start: int, count: int) -> Tensor:
    return parameter.data.view(-1)[start : start + count]


def _split(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The row's beginning, in pieces of these sizes."""
    sizes = [len(piece) for piece in like]
    return list(row[: sum(sizes)].split(sizes))
