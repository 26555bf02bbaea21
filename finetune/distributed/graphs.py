"""Forward and backward passes of a micro-batch as one CUDA graph, where launching kernels takes longer than they.

With small micro-batches a GPU waits for the host, which has thousands of kernels to launch. A graph launches them
all at once (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). It computes the same with the same
kernels; its activations lie in memory of its own.
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from finetune import UserError, first_line
from finetune.distributed.world import World, release_at_stop

_WARM_UP = 3  # calls of one shape that compile and choose kernels
# Launching takes this share of the kernels' time, or more. Kernels of a U-Net's deepest levels wait for the host
# long before the whole does: at three quarters of the time, for 3% of it.
BOUND = 0.5


@dataclass
class _Shape:
    """What is known of the calls of one shape."""

    calls: int = 0
    is_bound: bool | None = None
    # By whether it adds to gradients that were there before: (graph, its inputs, its output, what `captured` gave).
    graphs: dict[bool, tuple[torch.cuda.CUDAGraph, list[Any], Tensor, Any]] = field(default_factory=dict)


class Graphs:
    """Calls `passes`, through a graph where that is faster.

    Args:
        passes: forward and backward of one micro-batch: takes tensors in any nesting, adds to the gradients of
            `parameters`, and returns a tensor. It must not wait for the device or depend on values on the host.
        parameters: those that it leaves gradients in.
        plain: called in its place where there is no graph; it may do more, such as take gradients away.
        captured: around a capture. What it gives is given to `left` with each replay, once that has been started:
            there gradients may be taken away.
        world: passes hold collectives of these ranks, which must be captured, and replayed, by all of them or none.
    """

    def __init__(
        self,
        passes: Callable[..., Tensor],
        parameters: Iterable[nn.Parameter],
        plain: Callable[..., Tensor] | None = None,
        captured: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        left: Callable[[Any], None] = lambda _: None,
        world: World | None = None,
    ) -> None:
        self.passes, self.plain, self.parameters = passes, plain or passes, list(parameters)
        self.captured, self.left = captured, left
        self.world = None if world is None or world.size == 1 else world
        if self.world is not None:
            release_at_stop(self)
        self.shapes: dict[Any, _Shape] = {}
        self.pool: Any = None
        self.idle_bytes = 0  # of the pool: what activations take while a graph runs, and nothing else can use
        self.gradients: list[Tensor | None] = []  # where graphs leave them; none before there is one
        self.is_off = False  # there was no memory for one

    def __call__(self, *args: Any) -> Tensor:
        leaves, spec = pytree.tree_flatten(args)
        key = (spec, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        if self.world is not None and not self.world.is_same(repr(key)):
            return self._plainly(_Shape(), *args)
        shape = self.shapes.setdefault(key, _Shape())
        shape.calls += 1
        if self.is_off or shape.calls <= _WARM_UP or shape.is_bound is False:
            return self._plainly(shape, *args)
        if shape.is_bound is None:
            return self._timed(shape, args)
        adds = any(p.grad is not None for p in self.parameters)
        if adds and not self._are_held():
            return self._plainly(shape, *args)  # a step that began without a graph goes on so
        if not adds and self.gradients and False not in shape.graphs:
            # Gradients have one memory for all shapes: the first shape's graph sets it, graphs of others add to it.
            torch._foreach_zero_([gradient for gradient in self.gradients if gradient is not None])
            self._put_back(self.gradients)
            adds = True
        if adds not in shape.graphs and not self._capture(shape, adds, leaves, spec):
            return self._plainly(shape, *args)
        graph, inputs, output, given = shape.graphs[adds]
        for held, leaf in zip(inputs, leaves, strict=True):
            if isinstance(held, Tensor):
                held.copy_(leaf, non_blocking=True)
        graph.replay()
        self._put_back(self.gradients)
        self.left(given)
        return output.clone()

    @property
    def count(self) -> int:
        """How many graphs there are now."""
        return sum(len(shape.graphs) for shape in self.shapes.values())

    def step_aside(self) -> None:
        """Give graphs up unless half of the device's memory is free, for what comes beside micro-batches.

        They are captured anew, which takes about as long as launching a micro-batch.
        """
        if self.pool is not None and self._any(self._free_bytes() < torch.cuda.mem_get_info()[1] / 2):
            self.release()

    def _plainly(self, shape: _Shape, *args: Any) -> Tensor:
        # It takes about as much memory as a graph's activations, whose own it can't use.
        if self.pool is not None and self._any(self._free_bytes() < self.idle_bytes):
            self.release()
            self.is_off = shape.is_bound is False  # both would make room for each other in turns
        return self.plain(*args)

    def _free_bytes(self) -> int:
        """Of the device's memory what others than graphs can take."""
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - self.idle_bytes
        return torch.cuda.mem_get_info()[0] + unused

    def _any(self, here: bool) -> bool:
        """Whether it is so on any rank that has to do the same."""
        return here if self.world is None else any(self.world.gather(here))

    def release(self) -> None:
        """Give all graphs up."""
        for shape in self.shapes.values():
            shape.graphs.clear()
        self.pool, self.idle_bytes, self.gradients = None, 0, []
        _give_back()

    def _are_held(self) -> bool:
        """Whether gradients so far lie where graphs leave them."""
        return bool(self.gradients) and all(
            p.grad is held for p, held in zip(self.parameters, self.gradients, strict=True)
        )

    def _timed(self, shape: _Shape, args: tuple[Any, ...]) -> Tensor:
        """Find out whether the host or the device is waited for."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        began = time.perf_counter()
        output = self._plainly(shape, *args)
        launched_s = time.perf_counter() - began
        end.record()
        end.synchronize()
        shape.is_bound = self._any(launched_s > BOUND * start.elapsed_time(end) / 1e3)
        return output

    def _capture(self, shape: _Shape, adds: bool, leaves: list[Any], spec: Any) -> bool:
        """Make a shape's graph, or find out that there can be none.

        Raises:
            UserError: passes do what a graph can't hold. torch does not get over that: its allocator, and its
                generators of random numbers, would go on as in a capture.
        """
        inputs = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args = pytree.tree_unflatten(inputs, spec)
        before = [p.grad for p in self.parameters]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what earlier calls took is the graph's now
        idle_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        graph, output, failure = torch.cuda.CUDAGraph(), None, None
        try:
            # Other threads may take page-locked memory meanwhile: the loader, a checkpoint.
            with (
                self.captured() as given,
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                try:
                    output = self.passes(*args)
                except RuntimeError as error:
                    failure = first_line(error)  # alone: the error holds activations
                    self.is_off = isinstance(error, torch.OutOfMemoryError)
            after = [p.grad for p in self.parameters]
        except RuntimeError as error:
            raise UserError(
                f"no CUDA graph can be made of these passes ({failure or first_line(error)}): start the same "
                "command again with model.graphs=false"
            ) from None
        finally:
            if output is None:
                self._put_back(before)
        if output is not None and self.gradients and not self._are_held():
            self._put_back(before)
            output, failure = None, "it has gradients of other parameters than the first shape"
        if self._any(output is None):
            self.is_off = self._any(self.is_off)
            output, failure = None, failure or "another rank can make none"
            shape.is_bound = False
            told = "micro-batches get no CUDA graphs" if self.is_off else "this micro-batch gets no CUDA graph"
            warnings.warn(f"{told}: {failure}", stacklevel=3)
            del graph, after, inputs, args
            if self.is_off:
                self.release()
            else:
                _give_back()
            return False
        assert output is not None
        self.pool = graph.pool()
        self.idle_bytes += torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - idle_bytes
        self.gradients = after
        shape.graphs[adds] = graph, inputs, output, given
        return True

    def _put_back(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def _give_back() -> None:
    """Let the device have what nobody holds any more."""
    gc.collect()
    torch.cuda.empty_cache()
