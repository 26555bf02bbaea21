"""What each strategy holds between steps.

    torchrun --nproc_per_node N tests/strategies/holding.py

Prints a JSON line: bytes a weight on each rank, by strategy.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor, nn

from finetune import distributed
from tests.strategies import skipping

KINDS = ("ddp", "zero1", "zero2", "zero3")


class Net(nn.Module):
    """Large enough for scalars and padding to count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 1024), nn.Linear(1024, 128)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BF = x_BCHW.flatten(1).to(self.first.weight.dtype)
        return self.second(self.first(x_BF)).float().square().mean(1)


def storages() -> dict[int, int]:
    """Bytes by address, of all tensors that there are."""
    gc.collect()
    # Some objects answer `isinstance` with an error.
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.device.type == "cpu"]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


def main() -> None:
    world = distributed.start("cpu", uses_deepspeed=True)
    skipping.Net = Net
    weights = sum(p.numel() for p in Net().parameters())
    held = {}
    for kind in ("zero1", *KINDS):  # the first also leaves what a process has but once
        before = storages()
        strategy, given = skipping.make(world, kind, "bf16")
        del given
        for number in range(2):
            skipping.step(strategy, number)
        held[kind] = sum(size for place, size in storages().items() if place not in before) / weights
        del strategy
    of_ranks = world.gather(held)
    if world.is_main:
        print(json.dumps({kind: [each[kind] for each in of_ranks] for kind in KINDS}))
    distributed.stop()


if __name__ == "__main__":
    main()
