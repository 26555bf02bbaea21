"""Does a fast U-Net learn what diffusers' own does? Losses of both over many steps: same weights, batches, noise.

    python -m benchmarks.loss_curve --work sd21_full --batch 4 --steps 200 --plot curve.png
    python -m benchmarks.loss_curve --work tiny --steps 10     # on a CPU

Works are those of `benchmarks.train_speed`, steps are `finetune train`'s. The reference is diffusers' U-Net in
float32 (no TF32); beside it are ours in float32, and both under bf16 autocast. `apart`: the largest relative
distance of a step's loss from the reference's; `apart_mean`: that of the mean over the last tenth of the steps. One
JSON line each, a table last.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import context, record, save_plot
from benchmarks.strategies import largest_distance
from benchmarks.train_speed import WORKS, Work, stepping, trained

# Name: whether the U-Net is ours, precision.
VARIANTS = {
    "diffusers float32": (False, "fp32"),
    "ours float32": (True, "fp32"),
    "diffusers bf16": (False, "bf16"),
    "ours bf16": (True, "bf16"),
}


def losses(work: Work, device: torch.device, steps: int, *, is_fast: bool, precision: str) -> list[float]:
    step = stepping(work, device, trained(work, device, is_fast=is_fast, ema=False, precision=precision))
    return [float(loss) for loss in torch.stack([step() for _ in range(steps)])]


def apart(ours: list[float], reference: list[float]) -> tuple[float, float]:
    """Relative distances: the largest of a step's loss, and that of the mean over the last tenth of the steps."""
    last = max(1, len(reference) // 10)
    mine, other = sum(ours[-last:]), sum(reference[-last:])
    return largest_distance(ours, reference), abs(mine - other) / other


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """All curves, and below how far each is from the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    reference = rows[0]["losses"]
    for row, style in zip(rows, itertools.cycle(("-", "--", "-.", ":")), strict=False):
        above.plot(row["losses"], style, label=row["variant"], linewidth=1.2)
        if row is not rows[0]:
            distances = [abs(a - b) / b for a, b in zip(row["losses"], reference, strict=True)]
            below.semilogy(distances, style, label=row["variant"], linewidth=1.0)
    above.set_ylabel("loss")
    above.legend()
    above.set_title(f"{rows[0]['work']}, batch {rows[0]['batch']}, {rows[0]['hardware']}")
    below.set_ylabel(f"relative distance from {rows[0]['variant']}")
    below.set_xlabel("step")
    below.legend()
    save_plot(figure, out)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS, default="sd21_full" if on_gpu else "tiny")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200 if on_gpu else 10)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="the first is the reference")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well")
    parser.add_argument("--plot", type=Path, help="a PNG")
    arguments = parser.parse_args()
    if arguments.batch < 1 or arguments.steps < 1:
        parser.error("--batch and --steps must be at least 1")
    variants = arguments.variants.split(",")
    if unknown := set(variants) - VARIANTS.keys():
        parser.error(f"{min(unknown)} is not one of {', '.join(VARIANTS)}")
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    work = replace(WORKS[arguments.work], batch=arguments.batch)
    rows: list[dict[str, Any]] = []
    for variant in variants:
        is_fast, precision = VARIANTS[variant]
        started = time.perf_counter()
        found = losses(work, device, arguments.steps, is_fast=is_fast, precision=precision)
        row = {"work": arguments.work, "variant": variant, "batch": work.batch, "steps": arguments.steps}
        row |= {"seconds": round(time.perf_counter() - started, 1)}
        if rows:
            distances = apart(found, rows[0]["losses"])
            row |= dict(zip(("apart", "apart_mean"), (float(f"{one:.3g}") for one in distances), strict=True))
        rows.append(row | {"losses": [round(loss, 7) for loss in found]} | context())
        record(arguments.out, rows[-1])
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    if arguments.plot:
        plot(rows, arguments.plot)
    print(f"\n{'variant':<20}{'first loss':>12}{'last loss':>12}{'apart':>10}{'of the end':>12}")
    for row in rows:
        cells = [f"{row['losses'][0]:>12.5f}{row['losses'][-1]:>12.5f}"]
        cells += [f"{row[name]:>10.2g}" if name in row else f"{'-':>10}" for name in ("apart", "apart_mean")]
        print(f"{row['variant']:<20}" + "".join(cells))


if __name__ == "__main__":
    main()
