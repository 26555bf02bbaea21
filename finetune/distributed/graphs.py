"""Forward and backward passes of a micro-batch as one CUDA graph, where launching kernels takes longer than they.

With small micro-batches a GPU waits for the host, which has thousands of kernels to launch. A graph launches them
all at once (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). It computes the same with the same
kernels; its activations lie in memory of its own.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from finetune import first_line

_WARM_UP = 3  # calls of one shape that compile and choose kernels
# Launching takes this share of the kernels' time, or more. Kernels of a U-Net's deepest levels wait for the host
# long before the whole does: at three quarters of the time, for 3% of it.
BOUND = 0.5


@dataclass
class _Shape:
    """What is known of the calls of one shape."""

    calls: int = 0
    is_bound: bool | None = None
    # By whether it adds to gradients that were there before: (graph, its inputs, its output).
    graphs: dict[bool, tuple[torch.cuda.CUDAGraph, list[Any], Tensor]] = field(default_factory=dict)


class Graphs:
    """Calls `passes`, through a graph where that is faster.

    Args:
        passes: forward and backward of one micro-batch: takes tensors in any nesting, adds to the gradients of
            `parameters`, and returns a tensor. It must not wait for the device or depend on values on the host.
        parameters: those that it leaves gradients in.
        plain: called in its place where there is no graph; it may do more, such as take gradients away.
        bound: a graph is made where launching takes that share of the time, or more.
    """

    def __init__(
        self,
        passes: Callable[..., Tensor],
        parameters: Iterable[nn.Parameter],
        plain: Callable[..., Tensor] | None = None,
        bound: float = BOUND,
    ) -> None:
        self.passes, self.plain, self.parameters, self.bound = passes, plain or passes, list(parameters), bound
        self.shapes: dict[Any, _Shape] = {}
        self.pool: Any = None
        self.gradients: list[Tensor | None] = []  # where graphs leave them; none before there is one

    def __call__(self, *args: Any) -> Tensor:
        leaves, spec = pytree.tree_flatten(args)
        key = (spec, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        shape = self.shapes.setdefault(key, _Shape())
        shape.calls += 1
        if shape.calls <= _WARM_UP or shape.is_bound is False:
            return self.plain(*args)
        if shape.is_bound is None:
            return self._timed(shape, args)
        adds = any(p.grad is not None for p in self.parameters)
        if adds and not self._are_held():
            return self.plain(*args)  # a step that began without a graph goes on so
        if not adds and self.gradients and False not in shape.graphs:
            # Gradients have one memory for all shapes: the first shape's graph sets it, graphs of others add to it.
            torch._foreach_zero_([gradient for gradient in self.gradients if gradient is not None])
            self._hold()
            adds = True
        if adds not in shape.graphs:
            try:
                shape.graphs[adds] = self._captured(leaves, spec)
            except RuntimeError as error:
                # There is no memory for it beside what is there, or the passes wait for the device.
                shape.is_bound = False
                warnings.warn(f"this micro-batch gets no CUDA graph: {first_line(error)}", stacklevel=2)
                torch.cuda.empty_cache()
                return self.plain(*args)
        graph, inputs, output = shape.graphs[adds]
        for held, given in zip(inputs, leaves, strict=True):
            if isinstance(held, Tensor):
                held.copy_(given, non_blocking=True)
        graph.replay()
        self._hold()
        return output.clone()

    def _are_held(self) -> bool:
        """Whether gradients so far lie where graphs leave them."""
        return bool(self.gradients) and all(
            p.grad is held for p, held in zip(self.parameters, self.gradients, strict=True)
        )

    def _hold(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def _timed(self, shape: _Shape, args: tuple[Any, ...]) -> Tensor:
        """Find out whether the host or the device is waited for."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        began = time.perf_counter()
        output = self.plain(*args)
        launched_s = time.perf_counter() - began
        end.record()
        end.synchronize()
        shape.is_bound = launched_s > self.bound * start.elapsed_time(end) / 1e3
        return output

    def _captured(self, leaves: list[Any], spec: Any) -> Any:
        inputs = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args = pytree.tree_unflatten(inputs, spec)
        before = [p.grad for p in self.parameters]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what earlier calls took is the graph's now
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may take page-locked memory meanwhile: the loader, a checkpoint.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = self.passes(*args)
            after = [p.grad for p in self.parameters]
            if self.gradients and any(one is not held for one, held in zip(after, self.gradients, strict=True)):
                raise RuntimeError("gradients of this shape are not of the parameters that others' are")
        except BaseException:
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient
            raise
        self.pool = graph.pool()
        self.gradients = after
        return graph, inputs, output
