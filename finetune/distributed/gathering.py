"""ZeRO-3's weights, whole while they are computed with: gathered block by block, the next one beside.

DeepSpeed does this too, with a hundred thousand calls of Python a step: they take longer than a GPU takes for a
step of a U-Net.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.distributed.world import World

# torch 2.13 gave it a new name.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_KEPT_ELEMENTS = 4096  # parameters of up to so many, norms and biases, stay whole


class Gathering:
    """Brings together what DeepSpeed has taken to pieces (`ds_tensor` of each parameter, equal ones on all ranks).

    A block's weights are whole from its forward pass, or its part of the backward pass, until the next block's
    begins: of two blocks, the one that is computed and the one that is coming, there is memory for both. What
    autograd keeps of weights for the backward pass, which may be views of them, is taken anew from them there.

    Args:
        module: whose parameters are DeepSpeed's, and in pieces.
        is_block: blocks whose weights are gathered as one; of what is in none of these, layer by layer.
    """

    def __init__(self, world: World, module: nn.Module, is_block: Callable[[nn.Module], bool]) -> None:
        self.world = world
        self.blocks: list[list[Any]] = []  # parameters of each
        self._whole: dict[int, torch.cuda.Event | None] = {}  # by number of the block: when its weights are there
        self._at: dict[int, Any] = {}  # by the address of memory that was gathered: the parameter that has it
        self._after: dict[tuple[bool, int], int] = {}  # (in a backward pass, block): the block after it
        self._last: tuple[bool, int] | None = None
        self._backward = False
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" and world.size > 1 else None
        # The first block's inputs need no gradients, its weights do.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        self._nothing = {p.dtype: p.data.new_empty(0) for p in module.parameters()}
        blocks = [(block, dict.fromkeys(block.parameters())) for block in blocks_of(module, is_block)]
        held = Counter(id(p) for _, parameters in blocks for p in parameters)
        for block, parameters in blocks:
            # Those that several blocks have stay whole as well.
            found: list[Any] = [p for p in parameters if held[id(p)] == 1 and p.ds_numel > _KEPT_ELEMENTS]  # type: ignore[attr-defined]
            if found:
                number = len(self.blocks)
                block.register_forward_pre_hook(functools.partial(self._enter, number=number))
                block.register_full_backward_pre_hook(functools.partial(self._enter_backward, number=number))
                self.blocks.append(found)
        gathered = {id(p) for block in self.blocks for p in block}
        self._are_kept = False
        self.kept: list[Any] = [p for p in module.parameters() if id(p) not in gathered]
        for number in range(len(self.blocks)):
            self._release(number)

    @contextlib.contextmanager
    def of_a_pass(self) -> Iterator[None]:
        """Around forward passes, or a forward and a backward one. Collective."""
        self._last, self._backward = None, False
        hooks: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.world.size > 1:  # else a block's weights are its pieces, and stay
            hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        try:
            with hooks:
                yield
        finally:
            for number in list(self._whole):
                self._release(number)
            if self._stream is not None:  # a block that came for nothing
                torch.cuda.current_stream().wait_stream(self._stream)

    def _pack(self, saved: Tensor) -> Any:
        """In place of a weight, or a view of one, where it lies in the parameter: its memory is given back."""
        parameter = self._at.get(saved.untyped_storage().data_ptr())
        return saved if parameter is None else (parameter, saved.size(), saved.stride(), saved.storage_offset())

    @torch.no_grad()
    def renew(self) -> None:
        """Gather what is kept anew, where it lies: its pieces have changed. Collective."""
        if self._are_kept and self.kept and self.world.size > 1:
            torch._foreach_copy_([p.data for p in self.kept], self._whole_of(self.kept))
        else:
            self._gather(self.kept)
        self._are_kept = True

    def _enter_backward(self, *_: Any, number: int) -> None:
        self._backward = True
        self._enter(number=number)

    @torch.no_grad()
    def _enter(self, *_: Any, number: int) -> None:
        before, self._last = self._last, (self._backward, number)
        if before == self._last and number in self._whole:
            return
        if before is not None and before[0] == self._backward and before[1] != number:
            self._after[before] = number
        coming = self._after.get(self._last)
        for other in [other for other in self._whole if other not in (number, coming)]:
            self._release(other)
        if number not in self._whole:
            self._fetch(number)
        event = self._whole[number]
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        if self.world.size > 1 and coming is not None and coming not in self._whole:
            self._fetch(coming)

    def _fetch(self, number: int) -> None:
        block = self.blocks[number]
        if self._stream is None:
            self._gather(block)
            self._whole[number] = None
        else:
            # What it takes may be memory of a block that was released: the one before this one is still computed.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._gather(block)
                self._whole[number] = self._stream.record_event()
        self._at |= {p.untyped_storage().data_ptr(): p for p in block}

    def _gather(self, parameters: Sequence[Any]) -> None:
        """Give the parameters their whole data, on the current stream."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for p, data in zip(parameters, self._whole_of(parameters), strict=True):
            p.data = data
            p.ds_status = ZeroParamStatus.AVAILABLE

    def _whole_of(self, parameters: Sequence[Any]) -> list[Tensor]:
        whole = self._joined([p.ds_tensor.data for p in parameters])
        return [data[: p.ds_numel].view(p.ds_shape) for p, data in zip(parameters, whole, strict=True)]

    def _joined(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """All ranks' pieces of each parameter, one behind the other; of a single rank the pieces themselves."""
        ranks = self.world.size
        if ranks == 1 or not pieces:
            return list(pieces)
        sizes = [piece.numel() for piece in pieces]
        flat = torch.cat([piece.view(-1) for piece in pieces])
        every_RP = flat.new_empty(ranks, len(flat))
        all_gather(every_RP.view(-1), flat)
        return [part_RE.reshape(-1) for part_RE in every_RP.split(sizes, dim=1)]

    def _release(self, number: int) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self._whole.pop(number, None)
        for parameter in self.blocks[number]:
            self._at.pop(parameter.untyped_storage().data_ptr(), None)
            parameter.data = self._nothing[parameter.dtype]
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    parameter, size, stride, offset = packed
    return parameter.detach().as_strided(size, stride, offset)


def blocks_of(module: nn.Module, is_block: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """The blocks in a module, and where there are none its layers: what has no weights further inside."""
    if is_block(module) or not any(True for _ in itertools.chain(*(c.parameters() for c in module.children()))):
        yield module
        return
    for child in module.children():
        yield from blocks_of(child, is_block)
