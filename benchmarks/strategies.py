"""Images per second, memory and losses of each strategy, ours beside what one would write with plain diffusers.

    python -m benchmarks.strategies --work sd21_512 --out benchmarks/results/strategies.jsonl   # all GPUs there
    python -m benchmarks.strategies --work sdxl_1024 --gpus 2 --variants peer_ddp,ddp,zero2,zero3 --seconds 15
    python -m benchmarks.strategies --work tiny --gpus 2                                        # gloo, on a CPU

Each variant runs in processes of its own, started by torchrun. Peers are a plain loop over a diffusers U-Net:
torch's DDP with bf16 autocast and channels-last, and `deepspeed.initialize` with ZeRO 1 to 3 in bf16 and its
defaults. Ours run `optimizer_step` as `finetune train` does; `one` and `peer_one` take one GPU, `ddp_bf16` sums its
gradients in bf16 (`strategy.reduce_dtype`). A variant may name its layout, as `zero2@nhwc` or `ddp@nchw`, and is
then as with `model.fast=false`; without one it is as a run is by default. `--adapter lora` trains an adapter of
rank 16 instead of all weights.

All see the same random moments, states of captions, noise and timesteps while their first losses are taken; `apart`
is the largest relative distance of those from DDP's (`ddp`, else `peer_ddp`). Then steps are timed in blocks of
four, where peers draw noise as they would. Weights are random, gradients clipped, the optimizer is AdamW. SDXL's
added conditions are fixed tensors. One JSON line each, a table last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import context, record, rounded
from benchmarks.ranks import BLOCK, launch, peak_gib, require_gpus, timed_blocks
from benchmarks.works import (
    LR,
    MAX_GRAD_NORM,
    SEED,
    SPACE,
    batches,
    make_model,
    make_unet,
    schedule,
    stepping,
    trained_of,
    with_added,
)
from finetune import diffusion, distributed, rng
from finetune.distributed import DataParallel, OptimizerSettings, ParamGroup, Strategy, World, ZeRO
from finetune.distributed.graphs import Graphs
from finetune.latents import sample_latents
from finetune.models import fast
from finetune.models.layout import store_channels_last
from finetune.objective import LatentDiffusion

# Images of one rank, and whether activations are computed again in the backward pass.
WORKS: dict[str, tuple[int, bool]] = {"sd21_512": (48, False), "sdxl_1024": (8, True), "tiny": (4, False)}
OURS = ("one", "ddp", "ddp_bf16", "zero1", "zero2", "zero3", "zero3_offload")
PEERS = ("peer_one", "peer_ddp", "peer_zero1", "peer_zero2", "peer_zero3")
LAYOUTS = {"": None, "nchw": False, "nhwc": True}


@dataclass
class Job:
    """What a worker is told, as JSON on its command line."""

    work: str
    variant: str
    batch: int  # of one rank
    adapter: str
    losses: int  # steps whose losses are kept
    seconds: float
    out: str  # rank 0 leaves its result there


def make_module(job: Job, world: World) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The U-Net on the CPU as it is called, and its parameters that are trained, by name."""
    unet = make_unet(job.work, adapter=job.adapter, checkpointing=WORKS[job.work][1])
    module = with_added(unet, job.work, job.batch, world.device)
    return module, trained_of(module)


def wrapped(
    unet: nn.Module, shape: str, batch: int, world: World, kind: str, layout: bool | None = None
) -> tuple[LatentDiffusion, Strategy]:
    """What `finetune train` trains, and its strategy.

    Args:
        unet: on the CPU, as `with_added` gives it; what is trained requires gradients.
        batch: samples of one rank. kind: one of `OURS`. layout: one of the values of `LAYOUTS`.
    """
    trained = trained_of(unet)
    is_fast = layout is None and fast.available(world.device)
    if is_fast:
        fast.make_fast(getattr(unet, "unet", unet))
    model = make_model(unet, shape, world.device)
    groups = [ParamGroup("unet", {f"unet.{name}": p for name, p in trained.items()})]
    common: dict[str, Any] = {"optimizer": OptimizerSettings(), "max_grad_norm": MAX_GRAD_NORM, "precision": "bf16"}
    if not kind.startswith("zero"):
        if layout or is_fast:
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if kind == "ddp_bf16":
            common["reduce_dtype"] = torch.bfloat16
        return model, DataParallel(world, model, groups, **common, graphs=is_fast)
    if layout or is_fast:
        store_channels_last(unet)
    stage, offload = int(kind[4]), kind.endswith("_offload")
    common |= {"stage": stage, "offload": offload, "micro_batch": batch, "accumulation": 1}
    return model, ZeRO(world, model, groups, **common, graphs=is_fast)


def ours(job: Job, world: World, kind: str, layout: bool | None) -> tuple[Callable[[int], Tensor], Graphs | None]:
    """`finetune train`'s step, which returns this rank's sum of losses; and its CUDA graphs."""
    unet, _ = make_module(job, world)
    model, strategy = wrapped(unet, job.work, job.batch, world, kind, layout)
    source = batches(job.work, job.batch, world.device, rank=world.rank, ranks=world.size)
    step = stepping(strategy, model, source, job.batch * world.size)
    return lambda _: step().loss_sum, strategy.graphs


def peer(job: Job, world: World, kind: str, layout: bool | None) -> tuple[Callable[[int], Tensor], None]:
    """A plain loop over a diffusers U-Net, whose step returns this rank's sum of losses."""
    unet, trained = make_module(job, world)
    device, batch = world.device, job.batch
    optimizer = torch.optim.AdamW(trained.values(), lr=LR)
    engine: Any = None
    dtype = torch.bfloat16
    if kind in ("one", "ddp"):
        # What is measured beside is plain diffusers: a single GPU as the examples leave it, DDP at its best known.
        channels_last = kind == "ddp" if layout is None else layout
        memory_format = torch.channels_last if channels_last else torch.preserve_format
        unet.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        if kind == "ddp" and world.size > 1:
            ids = [device] if device.type == "cuda" else None
            unet = nn.parallel.DistributedDataParallel(unet, device_ids=ids)
    else:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": batch,
            "gradient_clipping": MAX_GRAD_NORM,
            "zero_optimization": {"stage": int(kind[4])},
            "bf16": {"enabled": True},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 62,
        }
        engine, *_ = deepspeed.initialize(model=unet, optimizer=optimizer, config=config, dist_init_required=False)
    levels = schedule(device)
    source = batches(job.work, job.batch, world.device, rank=world.rank, ranks=world.size)

    def step(index: int) -> Tensor:
        one = next(source)
        moments = one.moments.to(device, non_blocking=True).float()
        clock = one.clock.to(device, non_blocking=True)
        assert one.text_states is not None
        states = one.text_states.to(device, non_blocking=True)
        shape = tuple(moments[0, :4].shape)
        if index < job.losses:  # the draws that ours makes
            timesteps = rng.integers(SEED, "timestep", clock, len(levels))
            posterior, noise = (rng.normal(SEED, name, clock, shape) for name in ("posterior", "noise"))
        else:
            timesteps = torch.randint(0, len(levels), (batch,), device=device)
            posterior, noise = (torch.randn(batch, *shape, device=device) for _ in range(2))
        z = sample_latents(moments, posterior, SPACE)
        noised = diffusion.mix(z, noise, *levels.at(timesteps))
        if engine is not None:
            predicted = engine(noised.to(dtype), timesteps, states.to(dtype), return_dict=False)[0]
        else:
            with torch.autocast(device.type, dtype):
                predicted = unet(noised, timesteps, states, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), noise)
        if engine is not None:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach() * batch

    return step, None


def worker(job: Job) -> None:
    """One process of a variant."""
    variant, _, layout_name = job.variant.partition("@")
    world = distributed.start("auto", uses_deepspeed="zero" in variant)
    on_gpu = world.device.type == "cuda"
    started = time.perf_counter()
    make = peer if variant.startswith("peer_") else ours
    step, graphs = make(job, world, variant.removeprefix("peer_"), LAYOUTS[layout_name])
    sums = [step(index).double() for index in range(job.losses)]
    losses = world.sum_(torch.stack(sums)) / (job.batch * world.size)
    setup = time.perf_counter() - started
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    index = itertools.count(job.losses)
    seconds = timed_blocks(world, lambda: step(next(index)), job.seconds)
    peak, reserved = peak_gib(world)
    if world.is_main:
        result = {
            "images_per_s_gpu": BLOCK * job.batch / statistics.median(seconds),
            "peak_gib": peak,
            "reserved_gib": reserved,
            "steps_timed": len(seconds) * BLOCK,
            "setup_s": setup,
            "graphs": 0 if graphs is None else graphs.count,  # none: launched kernel by kernel
            "losses": losses.tolist(),
        }
        Path(job.out).write_text(json.dumps(result))
    world.barrier()
    distributed.stop()


def largest_distance(losses: list[float], reference: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(losses, reference, strict=True))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(Job(**json.loads(sys.argv[2])))
        return
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS, default="sd21_512" if on_gpu else "tiny")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 1, help="processes, one a GPU")
    parser.add_argument("--batch", type=int, help="samples of one GPU (default: 48, 8 for sdxl_1024)")
    parser.add_argument("--adapter", choices=("full", "lora"), default="full")
    parser.add_argument(
        "--variants", default=",".join([*PEERS, *OURS]), help="comma-separated, NAME or NAME@LAYOUT"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="measured time of each variant")
    parser.add_argument("--losses", type=int, default=20, help="steps whose losses are compared")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a variant is ended")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well")
    arguments = parser.parse_args()
    variants = arguments.variants.split(",")
    for variant in variants:
        name, _, layout = variant.partition("@")
        if name not in (*PEERS, *OURS) or layout not in LAYOUTS:
            parser.error(f"{variant} is no variant: {', '.join([*PEERS, *OURS])}, with @nchw or @nhwc behind it")
    require_gpus(parser, [arguments.gpus])
    batch = arguments.batch or WORKS[arguments.work][0]
    # DDP before what is compared with it; one GPU and the peers first.
    order = [name for name in (*PEERS, *OURS) for _ in range(variants.count(name))]
    variants = order + [name for name in variants if "@" in name]
    rows: dict[str, dict[str, Any]] = {}
    measured_on = context()
    for variant in variants:
        processes = 1 if variant.partition("@")[0] in ("one", "peer_one") else arguments.gpus
        told = {"work": arguments.work, "variant": variant, "batch": batch, "adapter": arguments.adapter}
        told |= {"losses": arguments.losses, "seconds": arguments.seconds}
        result = launch("benchmarks.strategies", told, processes, arguments.limit)
        row: dict[str, Any] = {"work": arguments.work, "variant": variant, "processes": processes, "batch": batch}
        row |= {"adapter": arguments.adapter, "precision": "bf16"} | result
        rows[variant] = row
        compare(row, rows)
        record(arguments.out, {key: rounded(value) for key, value in row.items()} | measured_on)
    table(rows)


def compare(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Add to a row how it stands to those before it: to its peer, to one GPU, to DDP's losses."""
    name = row["variant"].partition("@")[0]

    def measured(*names: str) -> dict[str, Any] | None:
        return next((rows[n] for n in names if n in rows and "error" not in rows[n]), None)

    if "error" in row:
        return
    for key, other in (
        ("to_peer", measured(f"peer_{name.removeprefix('peer_').removesuffix('_offload')}")),
        ("to_one_gpu", measured("one") if not name.startswith("peer_") else measured("peer_one")),
        ("to_ddp", measured("ddp") if not name.startswith("peer_") else measured("peer_ddp")),
    ):
        if other is not None:
            row[key] = row["images_per_s_gpu"] / other["images_per_s_gpu"]
    reference = measured("ddp", "peer_ddp")
    if reference is not None and reference["processes"] == row["processes"]:
        row["apart"] = largest_distance(row["losses"], reference["losses"])


def table(rows: dict[str, dict[str, Any]]) -> None:
    columns = ("images_per_s_gpu", "to_peer", "to_one_gpu", "to_ddp", "peak_gib", "host_gib", "apart", "graphs")
    print(f"{'variant':<18}" + "".join(f"{name:>18}" for name in columns))
    for row in rows.values():
        if "error" in row:
            print(f"{row['variant']:<18}  {row['error']}")
            continue
        cells = [f"{row[name]:.4g}" if name in row else "-" for name in columns]
        print(f"{row['variant']:<18}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
