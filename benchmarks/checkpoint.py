"""What a checkpoint costs training, beside a bare copy, `torch.save` and a bare write of the same bytes.

    python -m benchmarks.checkpoint                         # SD 1.5's shape, bf16 autocast, EMA; tiny on a CPU
    python -m benchmarks.checkpoint --work tiny --saves 2

All weights are trained, with their average and two moments: 16 bytes a parameter. `bare_copy` brings as many bytes
from the device to page-locked host memory, `torch_save` is one call with the same tensors and an fsync, and
`bare_write` writes as many bytes from host memory one after another and ends with an fsync. `ours` is
`Checkpoints.begin` between steps as the loop runs them, the device waited for after each step: `stall_s` is what
the call and the step after it take longer than a quiet step, `step_writing_s` a step while the files are written
and summed up, `lost_s` what training lost in all, `total_s` from the call to the published folder. `ours_waited`
is `Checkpoints.save`. One JSON line each, a table last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import context, record
from benchmarks.ranks import waiter
from benchmarks.train_speed import Work, stepping, trained
from benchmarks.works import SHAPES
from finetune.checkpoint import Checkpoints, Layout, Progress
from finetune.checkpoint.host import HostMemory
from finetune.distributed import MOMENTS, DataParallel
from finetune.ema import Average
from finetune.models import fast

_PIECE_BYTES = 1 << 23


def timed(function: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Seconds of a call and of what it leaves to the device."""
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def tensors_of(strategy: DataParallel, averages: list[Average]) -> dict[str, list[torch.Tensor]]:
    kinds = {"weights": [shard.master for shard in strategy.shards]}
    kinds |= {average.name: average.tensors for average in averages}
    return kinds | {kind: strategy.moments(kind) for kind in MOMENTS}


def bare_copy(memory: HostMemory, device: torch.device) -> Callable[[], None]:
    source = torch.zeros(max(chunk.numel() for chunk in memory.chunks), dtype=torch.uint8, device=device)

    def copy() -> None:
        for chunk in memory.chunks:
            chunk.copy_(source[: chunk.numel()], non_blocking=True)

    return copy


def torch_save(path: Path, tensors: dict[str, list[torch.Tensor]]) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def bare_write(path: Path, memory: HostMemory) -> None:
    with path.open("wb", buffering=0) as file:
        for view in memory.views(0, memory.size):
            for at in range(0, len(view), _PIECE_BYTES):
                file.write(view[at : at + _PIECE_BYTES])
        os.fsync(file.fileno())


def progress() -> Iterator[Progress]:
    step = 0
    while True:
        step += 1
        yield Progress(step=step, images_seen=step, steps_taken=step)


def while_saving(
    checkpoints: Checkpoints,
    begin: Callable[[], None],
    step: Callable[[], Any],
    wait: Callable[[], None],
    quiet_s: float,
    of_all: Callable[[int], int] = lambda state: state,
) -> dict[str, float]:
    """One save beside training; `of_all`: this rank's state to the largest of all ranks."""
    started = time.perf_counter()
    call_s = timed(begin, lambda: None)
    first_s = timed(step, wait)
    steps: list[float] = []
    while checkpoints.state:
        checkpoints.advance(of_all(checkpoints.state))
        steps.append(timed(step, wait))
    total_s = time.perf_counter() - started
    return {
        "call_s": call_s,
        "stall_s": call_s + first_s - quiet_s,
        "step_writing_s": statistics.median(steps),
        "total_s": total_s,
        # All that training lost to this save, beside as many quiet steps.
        "lost_s": total_s - quiet_s * (1 + len(steps)),
    }


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=SHAPES, default="sd15_512" if on_gpu else "tiny")
    parser.add_argument("--batch", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--steps", type=int, default=20, help="quiet steps that are measured")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well")
    arguments = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    wait = waiter(device)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.folder))
    rows: list[dict[str, Any]] = []

    def keep(variant: str, **measured: float) -> None:
        row = {"work": arguments.work, "variant": variant, "batch": arguments.batch, "precision": "bf16 autocast"}
        row |= {"gib": round(memory.size / 2**30, 3), "page_locked": memory.pinned}
        rows.append(row | {name: round(value, 4) for name, value in measured.items()})
        record(arguments.out, rows[-1] | context())

    try:
        work = Work(arguments.work, arguments.batch)
        what = trained(work, device, is_fast=fast.available(device), ema=True)
        step, strategy, averages = stepping(work, device, what), what.strategy, what.averages
        components = {"unet": strategy.module.unet}
        checkpoints = Checkpoints(folder / "run", Layout(components), keep=1)  # type: ignore[arg-type]
        prepare_s = timed(lambda: checkpoints.prepare(strategy, averages), wait)
        memory = checkpoints._memory
        for _ in range(5):
            step()
        quiet = [timed(step, wait) for _ in range(arguments.steps)]
        quiet_s = statistics.median(quiet)
        keep("step", step_s=quiet_s, slowest_s=max(quiet))

        copy = bare_copy(memory, device)
        copies = [timed(copy, wait) for _ in range(4)][1:]
        keep("bare_copy", seconds=statistics.median(copies))
        del copy

        disk = [timed(lambda: bare_write(folder / "bare", memory), wait) for _ in range(2)]
        (folder / "bare").unlink()
        keep("bare_write", seconds=min(disk), mib_per_s=memory.size / 2**20 / min(disk))

        tensors = tensors_of(strategy, averages)
        saved = timed(lambda: torch_save(folder / "all.pt", tensors), wait)
        (folder / "all.pt").unlink()
        keep("torch_save", seconds=saved, stall_s=saved)

        clock = progress()
        waited = timed(lambda: checkpoints.save(next(clock), strategy, averages), wait)
        keep("ours_waited", prepare_s=prepare_s, total_s=waited, mib_per_s=memory.size / 2**20 / waited)
        for _ in range(arguments.saves):
            begin = lambda: checkpoints.begin(next(clock), strategy, averages)  # noqa: E731
            measured = while_saving(checkpoints, begin, step, wait, quiet_s)
            keep("ours", step_s=quiet_s, mib_per_s=memory.size / 2**20 / measured["total_s"], **measured)
        steps_after = [timed(step, wait) for _ in range(arguments.steps)]
        keep("step_again", step_s=statistics.median(steps_after), slowest_s=max(steps_after))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table(rows)


def table(rows: list[dict[str, Any]]) -> None:
    columns = ("stall_s", "lost_s", "step_s", "step_writing_s", "seconds", "total_s", "mib_per_s")
    print(f"\n{rows[0]['work']}, {rows[0]['gib']} GiB, page-locked: {rows[0]['page_locked']}")
    print("  ".join(["variant".ljust(12), *(name.rjust(14) for name in columns)]))
    for row in rows:
        cells = (f"{row[name]:.3f}" if name in row else "" for name in columns)
        print("  ".join([row["variant"].ljust(12), *(cell.rjust(14) for cell in cells)]))


if __name__ == "__main__":
    main()
