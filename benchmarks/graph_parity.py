"""Do micro-batches by CUDA graphs train what plain ones do? Under each strategy, on all GPUs there.

    python -m benchmarks.graph_parity --out benchmarks/results/gpu_parity.jsonl
    NCCL_MULTI_RANK_GPU_ENABLE=1 python -m benchmarks.graph_parity --share 2    # ranks of one GPU, by NCCL 2.31
    python -m benchmarks.graph_parity --gpus 2                                  # on a CPU: gloo, and no graphs

A tiny U-Net, gradients in many buckets, eight steps of one and of two micro-batches. `losses`: the largest relative
distance of a step's loss or gradient norm from that of plain passes; `weights`: of this rank's masters at the end;
`graphs`: how many there were. One JSON line for each strategy and number of micro-batches.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import context, record
from benchmarks.ranks import launch, require_gpus
from benchmarks.strategies import wrapped
from benchmarks.works import batches, make_unet, stepping
from finetune import distributed
from finetune.distributed import World, data_parallel, graphs, reduction, zero

STRATEGIES = ("ddp", "ddp_bf16", "zero1", "zero2", "zero3")
SHAPE, BATCH, STEPS, LR = "tiny", 4, 8, 1e-3
BUCKET_ELEMENTS, IN_PLACE_ELEMENTS = 60_000, 4_000


@dataclass
class Trained:
    """`numbers`: loss and gradient norm of each step; `masters`: of this rank, one behind the other."""

    numbers: list[float]
    masters: Tensor
    graphs: int


def train(world: World, kind: str, micro_batches: int, *, by_graphs: bool) -> Trained:
    model, strategy = wrapped(make_unet(SHAPE), SHAPE, BATCH, world, kind)
    if not by_graphs:
        strategy.graphs = None
    source = batches(SHAPE, BATCH, world.device, rank=world.rank, ranks=world.size)
    global_batch = BATCH * world.size * micro_batches
    step = stepping(strategy, model, source, global_batch, lr=LR, micro_batches=micro_batches)
    numbers: list[float] = []
    for _ in range(STEPS):
        done = step()
        numbers += [float(world.sum_(done.loss_sum.double())) / global_batch, float(done.grad_norm)]
    masters = torch.cat([shard.master.detach().float().flatten() for shard in strategy.shards])
    count = 0
    if strategy.graphs is not None:
        count = strategy.graphs.count
        strategy.graphs.release()
    return Trained(numbers, masters, count)


def worker(out: str, share: bool) -> None:
    """One process."""
    if share:
        os.environ["LOCAL_RANK"] = "0"
    world = distributed.start("auto", uses_deepspeed=True)
    graphs.BOUND = -1.0  # however long launching takes
    zero.BUCKET_ELEMENTS = data_parallel.BUCKET_ELEMENTS = BUCKET_ELEMENTS
    reduction.IN_PLACE_ELEMENTS = IN_PLACE_ELEMENTS
    rows = []
    for kind in STRATEGIES:
        for micro_batches in (1, 2):
            plain, ours = (train(world, kind, micro_batches, by_graphs=one) for one in (False, True))
            gc.collect()
            apart = max(abs(a - b) / abs(b) for a, b in zip(ours.numbers, plain.numbers, strict=True))
            weights = float((ours.masters - plain.masters).norm() / plain.masters.norm())
            row: dict[str, Any] = {"work": "graphs", "variant": kind, "micro_batches": micro_batches}
            row |= {"losses": apart, "weights": max(world.gather(weights)), "graphs": ours.graphs}
            rows.append(row)
    if world.is_main:
        Path(out).write_text(json.dumps({"rows": rows}))
    world.barrier()
    distributed.stop()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        told = json.loads(sys.argv[2])
        worker(told["out"], told["share"])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 1, help="processes, one a GPU")
    parser.add_argument("--share", type=int, metavar="RANKS", help="as many processes on one GPU")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which it is ended")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well")
    arguments = parser.parse_args()
    require_gpus(parser, [arguments.gpus])
    if arguments.share is not None and arguments.share < 1:
        parser.error(f"--share {arguments.share}: take at least 1")
    processes = arguments.share or arguments.gpus
    told = {"share": arguments.share is not None}
    result = launch("benchmarks.graph_parity", told, processes, arguments.limit)
    if "error" in result:
        sys.exit(result["error"])
    gpus = min(torch.cuda.device_count(), 1 if arguments.share else arguments.gpus)
    where = {"processes": processes, "gpus": gpus}
    for row in result["rows"]:
        record(arguments.out, row | where | context())


if __name__ == "__main__":
    main()
