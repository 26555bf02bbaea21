"""What all ranks must act on in the same step, told without waiting."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from finetune.distributed.world import World


@dataclass(frozen=True)
class Facts:
    """What one rank knows, or the largest of what all ranks know.

    `stop`: number of the signal that asked to stop, 0 for none; `saving`: a checkpoint is being written.
    """

    stop: int = 0
    saving: int = 0


class Control:
    """One small all-reduce a step over a gloo group of its own.

    It runs while the step does: its result is used a step later, so nobody waits for it, and every rank decides by
    the same facts at the same step. Alone, a rank knows its facts at once.
    """

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo", timeout=world.timeout) if world.size > 1 else None
        self._work: dist.Work | None = None
        self._told = torch.zeros(0, dtype=torch.int64)

    def exchange(self, facts: Facts) -> Facts:
        """Tell this rank's facts; get the largest of all ranks' from the call before (none the first time)."""
        if self._group is None:
            return facts
        agreed = self.last()
        self._told = torch.tensor([int(fact) for fact in astuple(facts)])
        self._work = dist.all_reduce(self._told, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def last(self) -> Facts:
        """Wait for what the last call told. Each rank must make as many calls as the others."""
        if self._work is None:
            return Facts()
        self._work.wait()
        self._work = None
        return Facts(*self._told.tolist())
