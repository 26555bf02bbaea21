"""Where the time of a training step goes on a GPU, by class of kernel.

    python -m benchmarks.profile_step --work sd21_full --variants compiled,ours --kernels
    python -m benchmarks.profile_step --work tiny               # on a CPU: operators instead of kernels

Milliseconds of a step's kernels, which may overlap; `idle` is the step's time without any. Works and variants are
those of `benchmarks.train_speed`. One JSON line each, a table last.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import context, record
from benchmarks.ranks import waiter
from benchmarks.train_speed import MAKERS, WORKS

# The first that fits, in lower case.
CLASSES = {
    "attention": r"flash|fmha|sdpa|attention|softmax|compute_dot_do_o|convert_dq|^_mix|^_prepare$|^_gradient_of_",
    "layout copies": r"nchwtonhwc|nhwctonchw",
    "group norm": r"^_(moments|merge|normalize|sums|merge_sums|gradient)$|groupnorm|group_norm|rowwisemoments",
    "GEGLU": r"^_gate|gelu",
    "layer norm": r"layer_norm|layernorm|^_add_norm",
    "ends of blocks": r"^_join$|^_column_sums$",
    "gradients added up": r"^_add$",
    "joined maps": r"catarray|fused_cat|^_cat$",
    "convolutions": r"conv|fprop|dgrad|wgrad|implicit_gemm|xmma",
    "matrix products": r"gemm|nvjet|cutlass|addmm|\bmm\b|bmm|splitk|cublas",
    "optimizer": r"multi_tensor|fusedadam|foreach|adam|lpnorm",
    "fused by inductor: reductions": r"triton_(red|per)",
    "fused by inductor: pointwise": r"triton_poi",
    "copies": r"memcpy|memset|copy",
}


def class_of(kernel: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.search(pattern, kernel.lower())), "other")


def breakdown(step: Callable[[], Any], steps: int, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """(milliseconds of a step by class, lines of the longest kernels)."""
    on_gpu, wait = device.type == "cuda", waiter(device)
    for _ in range(8 if on_gpu else 1):
        step()
    wait()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    started = time.perf_counter()
    with profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        wait()
    took = (time.perf_counter() - started) / steps
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    spans = []
    for event in profiler.events():
        if on_gpu and str(event.device_type) != "DeviceType.CUDA":
            continue
        span = event.time_range
        ms = (event.self_cpu_time_total if not on_gpu else span.elapsed_us()) / 1e3 / steps
        times[event.name] += ms  # type: ignore[assignment]
        counts[event.name] += 1
        spans.append((span.start, span.end))
    classes: Counter[str] = Counter()
    for name, ms in times.items():
        classes[class_of(name)] += ms  # type: ignore[assignment]
    busy, last = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    first = min(start for start, _ in spans)
    row = {"step_ms": round((last - first) / 1e3 / steps if on_gpu else took * 1e3, 2)}
    row["idle_ms"] = round(row["step_ms"] - busy / 1e3 / steps, 2) if on_gpu else 0.0
    shown = [f"{ms:9.3f} ms {counts[name] // steps:5d} x  {name[:110]}" for name, ms in times.most_common(25)]
    return row | {
        "kernels": round(len(spans) / steps),
        "ms": {k: round(v, 2) for k, v in classes.most_common()},
    }, shown


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS, default="sd21_full" if on_gpu else "tiny")
    parser.add_argument("--variants", default="compiled,ours" if on_gpu else "ours", help=f"of {', '.join(MAKERS)}")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kernels", action="store_true", help="list the longest kernels as well")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well")
    arguments = parser.parse_args()
    variants = arguments.variants.split(",")
    if unknown := set(variants) - MAKERS.keys():
        parser.error(f"{min(unknown)} is not one of {', '.join(MAKERS)}")
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    device = torch.device("cuda" if on_gpu else "cpu")
    rows = {}
    for variant in variants:
        step = MAKERS[variant](WORKS[arguments.work], device)
        rows[variant], kernels = breakdown(step, arguments.steps, device)
        del step
        record(arguments.out, {"work": arguments.work, "variant": variant, **rows[variant], **context()})
        if arguments.kernels:
            print("\n".join(kernels))
        if on_gpu:
            torch.cuda.empty_cache()
    print("\n" + f"{'ms of a step':<34}" + "".join(f"{name:>12}" for name in rows))
    for name in sorted({name for row in rows.values() for name in row["ms"]}):
        print(f"{name:<34}" + "".join(f"{row['ms'].get(name, 0.0):>12.1f}" for row in rows.values()))
    for name in ("idle_ms", "step_ms"):
        print(f"{name.removesuffix('_ms'):<34}" + "".join(f"{row[name]:>12.1f}" for row in rows.values()))


if __name__ == "__main__":
    main()
