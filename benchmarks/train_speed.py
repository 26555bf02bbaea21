"""Images per second of training on one GPU: the stock loop, ours plain and ours fast, in the same run.

    python -m benchmarks.train_speed                                  # every work of the table
    python -m benchmarks.train_speed --works sd21_full,sd15_lora --variants stock,ours --seconds 60
    python -m benchmarks.train_speed --works tiny --seconds 1         # on a CPU

Latents and states of captions are given (random); the optimizer is AdamW, gradients are clipped, weights are
float32 under bf16 autocast. Each variant runs in a process of its own.

stock       the loop of diffusers' examples: eager, torch's default AdamW and memory layout
compiled    the same with channels-last, fused AdamW and `torch.compile` of the whole U-Net
eager       `optimizer_step` as `finetune train model.fast=false` runs it
ours        as `finetune train` runs it on a GPU
ours_ema    with an average of the weights

`of_peak`: of the rate of a bf16 product of 8192^3 in the same run, by the floating-point operations of forward and
backward passes as `torch.utils.flop_counter` counts them in diffusers' model, without what is computed twice under
gradient checkpointing. `warm_s`: from the first call to the end of the step after which none is slower than twice
the median; `start_s`: to there from the start of the process. Name a variant twice to see it with and without code
on disk. One JSON line each, a table last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import works
from benchmarks.common import context, record
from benchmarks.ranks import BLOCK, waiter
from benchmarks.works import (
    LR,
    MAX_GRAD_NORM,
    SHAPES,
    SPACE,
    batches,
    channels_of,
    make_model,
    make_unet,
    schedule,
    trained_of,
    with_added,
)
from finetune import diffusion
from finetune.distributed import DataParallel, OptimizerSettings, ParamGroup, World
from finetune.ema import Average, HalfLife
from finetune.latents import sample_latents
from finetune.models import fast
from finetune.models.unet import build_unet
from finetune.objective import LatentDiffusion


@dataclass(frozen=True)
class Work:
    """`batch`: of a pass; `accumulation`: passes of one step; `eager_batch`: of eager passes, which keep more.

    `reach`, `stretch`: images/s that we aim for on one H100.
    """

    shape: str
    batch: int
    accumulation: int = 1
    eager_batch: int | None = None
    adapter: str = "full"
    checkpointing: bool = False
    reach: float | None = None
    stretch: float | None = None


class Trained(NamedTuple):
    model: LatentDiffusion
    strategy: DataParallel
    averages: list[Average]


WORKS = {
    "sd21_full": Work("sd21_512", 64, eager_batch=32, reach=165, stretch=185),
    "sd15_full": Work("sd15_512", 64, eager_batch=32, reach=150, stretch=170),
    "sd15_lora": Work("sd15_512", 64, eager_batch=32, adapter="lora", reach=210, stretch=240),
    "sdxl_lora": Work("sdxl_1024", 8, adapter="lora", reach=24, stretch=30),
    "sdxl_full": Work("sdxl_1024", 8, checkpointing=True, reach=17, stretch=20),
    "sd21_micro4": Work("sd21_512", 4, reach=110, stretch=140),
    "sd21_micro4_of_64": Work("sd21_512", 4, accumulation=16, reach=110, stretch=140),
    "tiny": Work("tiny", 4),
    "tiny_of_8": Work("tiny", 4, accumulation=2),
    "tiny_lora": Work("tiny", 4, adapter="lora"),
}


def stock(work: Work, device: torch.device, *, compiled: bool) -> Callable[[], Tensor]:
    """diffusers' training loop; a call makes one step and returns its loss."""
    unet = make_unet(work.shape, adapter=work.adapter, checkpointing=work.checkpointing).to(device)
    optimizer = torch.optim.AdamW(trained_of(unet).values(), lr=LR, fused=compiled)
    if compiled:
        unet.to(memory_format=torch.channels_last)
        unet.compile()
    called = with_added(unet, work.shape, work.batch, device)
    levels = schedule(device)
    source = batches(work.shape, work.batch, device)

    def passes() -> Tensor:
        one = next(source)
        assert one.text_states is not None
        moments = one.moments.to(device, non_blocking=True).float()
        states = one.text_states.to(device, non_blocking=True)
        posterior, noise = (torch.randn_like(moments.chunk(2, dim=1)[0]) for _ in range(2))
        timesteps = torch.randint(0, len(levels), (work.batch,), device=device)
        z = sample_latents(moments, posterior, SPACE)
        noised = diffusion.mix(z, noise, *levels.at(timesteps))
        with torch.autocast(device.type, torch.bfloat16):
            predicted = called(noised, timesteps, states, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), noise) / work.accumulation
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        losses = [passes() for _ in range(work.accumulation)]
        nn.utils.clip_grad_norm_(trained_of(unet).values(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum()

    return step


def trained(work: Work, device: torch.device, *, is_fast: bool, ema: bool, precision: str = "bf16") -> Trained:
    """What `finetune train` trains."""
    unet = make_unet(work.shape, adapter=work.adapter, checkpointing=work.checkpointing)
    if is_fast or device.type == "cpu":  # as `model.channels_last` is by default
        unet.to(memory_format=torch.channels_last)
    if is_fast:
        fast.make_fast(unet)
    module = with_added(unet, work.shape, work.batch, device)
    model = make_model(module, work.shape, device)
    group = ParamGroup("unet", {f"unet.{name}": p for name, p in trained_of(module).items()})
    strategy = DataParallel(
        World(0, 1, 0, device),
        model,
        [group],
        optimizer=OptimizerSettings(),
        max_grad_norm=MAX_GRAD_NORM,
        precision=precision,
        graphs=is_fast,
        casts_once=is_fast and work.accumulation > 1 and work.adapter == "full",
    )
    averages = []
    if ema:
        averages = [Average.starting_at([s.master for s in strategy.shards], HalfLife(500_000, 0.05))]
    return Trained(model, strategy, averages)


def ours(work: Work, device: torch.device, *, is_fast: bool = True, ema: bool = False) -> Callable[[], Tensor]:
    """`finetune train`'s step; a call makes one and returns its loss."""
    return stepping(work, device, trained(work, device, is_fast=is_fast, ema=ema))


def stepping(work: Work, device: torch.device, what: Trained) -> Callable[[], Tensor]:
    source = batches(work.shape, work.batch, device)
    images = work.batch * work.accumulation
    step = works.stepping(what.strategy, what.model, source, images, what.averages, micro_batches=work.accumulation)
    return lambda: step().loss_sum / images


MAKERS: dict[str, Callable[[Work, torch.device], Callable[[], Tensor]]] = {
    "stock": partial(stock, compiled=False),
    "compiled": partial(stock, compiled=True),
    "eager": partial(ours, is_fast=False),
    "ours": ours,
    "ours_ema": partial(ours, ema=True),
}


def measure(make: Callable[[], Callable[[], Tensor]], seconds: float, device: torch.device) -> dict[str, Any]:
    """Seconds a step (median of blocks), seconds until steps are quick (None: never), GiB, and the first losses."""
    wait, step = waiter(device), make()
    wait()
    started = time.perf_counter()
    ends, losses = [], []
    for _ in range(8):
        losses.append(step())
        wait()
        ends.append(time.perf_counter() - started)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    blocks: list[float] = []
    began = time.perf_counter()
    while not blocks or time.perf_counter() < began + seconds:
        before = time.perf_counter()
        for _ in range(BLOCK):
            step()
        wait()
        blocks.append((time.perf_counter() - before) / BLOCK)
    median = statistics.median(blocks)
    each = [after - before for before, after in itertools.pairwise([0.0, *ends])]
    slow = max((index for index, one in enumerate(each) if one > 2 * median), default=-1)
    # Memory of CUDA graphs is taken from the card once, and counts as reserved alone.
    memory = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else 0.0
    return {
        "step_s": median,
        "slowest_s": max(blocks),
        "steps": len(blocks) * BLOCK,
        "warm_s": ends[slow + 1] if slow + 1 < len(ends) else None,
        "memory_gib": memory,
        "losses": [round(float(loss), 6) for loss in losses],
    }


def tflop(work: Work) -> float:
    """Of forward and backward passes of one image, counted in diffusers' model without computing anything."""
    shape = SHAPES[work.shape]
    size, width = shape["size"], shape["unet"]["cross_attention_dim"]
    # Attention as two products, which are counted on any device.
    fake, plain = FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH)
    with fake, plain, FlopCounterMode(display=False) as counter:
        unet = build_unet(SHAPES[work.shape]["unet"], seed=works.SEED).train()
        unet.requires_grad_(work.adapter == "full")  # an adapter's own operations are few
        called = with_added(unet, work.shape, 1, torch.device("cpu"))
        noised, states = torch.randn(1, channels_of(work.shape), size, size), torch.randn(1, shape["tokens"], width)
        noised.requires_grad_(work.adapter != "full")
        called(noised, torch.zeros(1), states, return_dict=False)[0].sum().backward()
    return counter.get_total_flops() / 1e12


def peak_tflops(device: torch.device) -> float | None:
    """Of a bf16 product of two 8192x8192 matrices of random numbers."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times[10:]) / 1e12


def run(name: str, variant: str, seconds: float, began: float) -> dict[str, Any]:
    """A row of results; this process was started at `began`, in seconds since the epoch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = WORKS[name]
    if variant in ("stock", "eager"):
        work = replace(work, batch=work.eager_batch or work.batch)
    built_s = 0.0

    def make() -> Callable[[], Tensor]:
        nonlocal built_s
        step = MAKERS[variant](work, device)
        built_s = time.time() - began
        return step

    measured = measure(make, seconds, device)
    measured["start_s"] = measured["warm_s"] and built_s + measured["warm_s"]
    rate = work.batch * work.accumulation / measured["step_s"]
    peak, needed = peak_tflops(device), tflop(work)
    return {
        "work": name,
        "variant": variant,
        "batch": work.batch,
        "accumulation": work.accumulation,
        "images_per_s": round(rate, 2),
        "of_peak": peak and round(rate * needed / peak, 4),
        "tflop_per_image": round(needed, 4),
        **{key: round(value, 4) if isinstance(value, float) else value for key, value in measured.items()},
    }


def main() -> None:
    on_gpu = torch.cuda.is_available()
    variants = [name for name in MAKERS if on_gpu or name != "compiled"]
    usual = [name for name in WORKS if name.startswith("tiny") != on_gpu]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(usual), help=f"of {', '.join(WORKS)}")
    parser.add_argument("--variants", default=",".join(variants))
    parser.add_argument("--seconds", type=float, default=30.0 if on_gpu else 2.0, help="measured time of each")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that a variant may take in all")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well")
    parser.add_argument("--one", type=float, metavar="BEGAN", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names, variants = arguments.works.split(","), arguments.variants.split(",")
    for known, given in ((WORKS, names), (MAKERS, variants)):
        if unknown := set(given) - set(known):
            parser.error(f"{sorted(unknown)[0]} is not one of {', '.join(known)}")
    if arguments.one is not None:
        print(json.dumps(run(names[0], variants[0], arguments.seconds, arguments.one)), flush=True)
        return
    table = []
    for name in names:
        base = None
        for variant in variants:
            command = [sys.executable, "-m", "benchmarks.train_speed", "--one", str(time.time()), "--works", name]
            command += ["--variants", variant, "--seconds", str(arguments.seconds)]
            row: dict[str, Any] = {"work": name, "variant": variant}
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit)
                lines = done.stdout.splitlines()
                said = done.stderr.strip() or f"exit code {done.returncode}"  # killed, it says nothing
                row = json.loads(lines[-1]) if not done.returncode else row | {"error": said[-2000:]}
            except subprocess.TimeoutExpired:
                row["error"] = f"took longer than {arguments.limit:g} s"
            if "images_per_s" in row:
                base = base or row["images_per_s"]
                row["to_first"] = round(row["images_per_s"] / base, 3)
            record(arguments.out, row | context())
            table.append(row)
    heads = f"{'images/s':>9}{'to first':>9}{'of peak':>9}{'GiB':>7}{'warm s':>8}{'start s':>8}  aim"
    print(f"\n{'work':<14}{'variant':<12}{heads}")
    for row in table:
        if "error" in row:
            print(f"{row['work']:<14}{row['variant']:<12}failed: {row['error'].splitlines()[-1][:100]}")
            continue
        work, share = WORKS[row["work"]], row["of_peak"]
        aim = f"{work.reach:g} / {work.stretch:g}" if work.reach else ""
        waits = "".join(f"{'-' if row[key] is None else f'{row[key]:.1f}':>8}" for key in ("warm_s", "start_s"))
        print(
            f"{row['work']:<14}{row['variant']:<12}{row['images_per_s']:>9.1f}{row['to_first']:>9.2f}"
            f"{f'{share:.1%}' if share else '-':>9}{row['memory_gib']:>7.1f}{waits}  {aim}"
        )


if __name__ == "__main__":
    main()
