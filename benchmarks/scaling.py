"""Training on 1 to N GPUs of one host, beside one GPU in the same call.

    python -m benchmarks.scaling --works sd21_full --gpus 1,8 --nodes 2 --out benchmarks/results/scaling.jsonl
    python -m benchmarks.scaling --works sdxl_full --strategies zero2 --gpus 1,2,4,8 --shards /local/shards
    python -m benchmarks.scaling                                  # on a CPU: a tiny work, two gloo processes
    python -m benchmarks.scaling --draw benchmarks/results/scaling.jsonl    # table and plot of what is there

Each variant runs in processes of its own, one a GPU, with step, loader and defaults of `finetune train`: bf16,
and `model.fast` on a GPU. Weights are random; latents and states of captions are random too, written as real
shards on local disk, dropped from the page cache before each variant and read by the real loader. (SDXL's states
are read as well here, where `finetune train` computes them, and its added conditions are fixed tensors.)

One GPU is each of those taken, all at the same time, without a word between them: `images_per_s_gpu` is their mean,
`images_per_s_each` what each does, so that linear is what all of them do alone. It trains as `ddp`: without parts.

images_per_s_gpu  of blocks of four steps, the median; `images_per_s` of all GPUs
efficiency        images/s a GPU beside those of one GPU in the same call
comm_share        share of a step in which collectives alone run: what they cost. Of three steps under
                  torch's profiler, the mean over ranks: NCCL's kernels that overlap with no other kernel or copy;
                  on a CPU gloo's operations that overlap with none of torch's. Waiting for a slower rank is in it
comm_running      share of a step in which collectives run, overlapped or not
data_wait         share of a step that the host waits for a batch, on the rank that waits longest. A GPU goes on
                  meanwhile with what it was given, so this is the most that data can cost
stall_s, lost_s   of a run's first checkpoint, on the most GPUs: as `benchmarks.checkpoint` measures them, `gib` on
                  disk in all

`--nodes 2` measures the most GPUs once more, as two torchrun agents with half of them each: what launching and
meeting as two nodes costs. Their GPUs still reach each other as GPUs of one host do. A variant that fails is a row
with its reason. `NCCL_NVLS_ENABLE` is 0 unless the environment says otherwise (see `benchmarks.ranks`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.checkpoint import progress, timed, while_saving
from benchmarks.common import context, record, rounded, save_plot
from benchmarks.ranks import BLOCK, launch, peak_gib, require_gpus, timed_blocks, visible_gpus, waiter
from benchmarks.strategies import wrapped
from benchmarks.train_speed import Work
from benchmarks.works import SEED, SHAPES, SPACE, make_unet, stepping, with_added
from finetune import UserError, distributed
from finetune.checkpoint import Checkpoints, Layout
from finetune.data.loader import Data, Loader, Samples, Wanted
from finetune.data.order import Order, Source
from finetune.data.shards import (
    LATENT,
    TEXT,
    EncoderInfo,
    ShardSet,
    ShardWriter,
    TextInfo,
    json_bytes,
    latent_bytes,
)
from finetune.data.shards.files import npy_bytes
from finetune.distributed import Strategy, World
from finetune.models.adapters import lora_alphas

# Images of one rank; strategies that are measured by default.
WORKS = {
    "sd21_full": (Work("sd21_512", 48), ("ddp", "zero1", "zero2")),
    "sdxl_full": (Work("sdxl_1024", 8, checkpointing=True), ("zero1", "zero2", "zero3")),
    "sd21_lora": (Work("sd21_512", 48, adapter="lora"), ("ddp",)),
    "sdxl_lora": (Work("sdxl_1024", 8, adapter="lora", checkpointing=True), ("ddp",)),
    "tiny": (Work("tiny", 4), ("ddp", "zero2")),
    "tiny_lora": (Work("tiny", 4, adapter="lora"), ("ddp",)),
}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
PROFILED_STEPS = 3
MAX_SAMPLES = 1 << 16
Spans = list[tuple[float, float]]


@dataclass
class Job:
    """What a worker is told, as JSON on its command line."""

    work: str
    strategy: str
    batch: int  # of one rank
    seconds: float
    shards: str
    checkpoints: str | None  # a folder for them, where a save is measured
    out: str  # rank 0 leaves its result there


# --- data -------------------------------------------------------------------------------------------


def write_shards(folder: Path, shape: str, mib: float) -> None:
    """Random moments and states of one caption each, in at least 8 shards of `mib` in all."""
    size, tokens, width = (
        SHAPES[shape]["size"],
        SHAPES[shape]["tokens"],
        SHAPES[shape]["unet"]["cross_attention_dim"],
    )
    generator = np.random.default_rng(SEED)
    moments = generator.standard_normal((16, 8, size, size), np.float32)
    moments[:, 4:] = np.abs(moments[:, 4:]) * 0.1
    states = generator.standard_normal((16, 1, tokens, width), np.float32).astype(np.float16)
    latents, texts = [latent_bytes(each) for each in moments], [npy_bytes(each) for each in states]
    count = min(int(mib * 2**20) // (len(latents[0]) + len(texts[0])), MAX_SAMPLES)
    with ShardWriter(
        folder, "latents", members=(LATENT, "json", TEXT), max_samples=max(1, min(1024, count // 8))
    ) as writer:
        for index in range(count):
            said = {"captions": [f"thing {index}"]}
            members = {LATENT: latents[index % 16], "json": json_bytes(said), TEXT: texts[index % 16]}
            writer.write(f"{index:09d}", members, (size * 8,) * 2)
        encoder = EncoderInfo("bench/vae", "0" * 64, SPACE.scale, 0.0, "float32", (-1.0, 1.0), 4, 8)
        manifest = writer.finish(encoder)
    text = TextInfo("bench/text", "0" * 64, tokens, width, "float32")
    replace(manifest, text=text).save(folder)


def drop_from_cache(folder: Path) -> None:
    """Let the next reads of these shards come from the disk, where the system does as it is asked."""
    for path in folder.glob("*.tar"):
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def loader(job: Job, world: World) -> Loader:
    shards = ShardSet.open(job.shards)
    buckets = list(shards.bucket_sizes)
    samples = Samples(shards, buckets, [np.empty(0, np.int64)])
    order = Order([Source(samples.sizes)], seed=SEED, global_batch=job.batch * world.size)
    data = Data([samples], buckets, order, [], SPACE, Wanted(text_states=True))
    pin = world.device.type == "cuda"
    return data.loader(seed=SEED, rank=world.rank, world_size=world.size, micro_batch=job.batch, pin=pin)


# --- one rank -----------------------------------------------------------------------------------------


def merged(spans: Spans) -> Spans:
    """The same time in spans that do not touch, ascending."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def length(spans: Spans) -> float:
    """Time covered by any of them."""
    return sum(end - start for start, end in merged(spans))


def alone(spans: Spans, others: Spans) -> float:
    """Time covered by some of `spans` and none of `others`."""
    return length([*spans, *others]) - length(others)


def communication(step: Callable[[], Any], world: World) -> tuple[float, float]:
    """(`comm_share`, `comm_running`) of this rank; collective."""
    wait, on_gpu = waiter(world.device), world.device.type == "cuda"
    wait()
    world.barrier()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            step()
        wait()
        took_us = (time.perf_counter() - started) * 1e6
    collectives: Spans = []
    others: Spans = []
    for event in profiler.events():
        span = event.time_range.start, event.time_range.end
        if on_gpu and str(event.device_type) != "DeviceType.CUDA":
            continue
        if "nccl" in event.name.lower() or event.name.startswith("gloo:"):
            collectives.append(span)
        elif on_gpu or event.name.startswith("aten::"):
            others.append(span)
    return alone(collectives, others) / took_us, length(collectives) / took_us


def saving(folder: str, strategy: Strategy, lora: bool, step: Callable[[], Any], world: World) -> dict[str, float]:
    """One checkpoint beside training; collective."""

    def of_all(state: int) -> int:
        if world.size == 1:
            return state
        largest = torch.tensor(state)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    wait, run = waiter(world.device), Path(folder) / "run"
    unet: Any = strategy.module.unet
    layout = Layout({"unet": unet}, lora_alphas("unet", unet) if lora else None)
    checkpoints = Checkpoints(run, layout, keep=1)
    checkpoints.prepare(strategy, [])
    quiet_s = statistics.median(timed(step, wait) for _ in range(2 * BLOCK))
    now = next(progress())
    measured = while_saving(checkpoints, lambda: checkpoints.begin(now, strategy, []), step, wait, quiet_s, of_all)
    world.barrier()
    whole = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    return {name: measured[name] for name in ("stall_s", "lost_s", "total_s")} | {"gib": whole / 2**30}


def worker(job: Job) -> None:
    """One process of a variant."""
    world = distributed.start("auto", uses_deepspeed=job.strategy != "ddp")
    on_gpu = world.device.type == "cuda"
    work, _ = WORKS[job.work]
    started = time.perf_counter()
    unet = make_unet(work.shape, adapter=work.adapter, checkpointing=work.checkpointing)
    module = with_added(unet, work.shape, job.batch, world.device)
    model, strategy = wrapped(module, work.shape, job.batch, world, job.strategy)
    batches = loader(job, world)
    waits: list[float] = []
    train = stepping(strategy, model, iter(batches), job.batch * world.size)

    def step() -> None:
        waits.append(train().data_seconds)

    for _ in range(BLOCK):  # warms up
        step()
    waiter(world.device)()
    setup_s = time.perf_counter() - started
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    waits.clear()
    blocks = timed_blocks(world, step, job.seconds)
    data_wait = max(world.gather(sum(waits[BLOCK:]) / sum(blocks)))
    peak, reserved = peak_gib(world)
    share, running = (statistics.mean(each) for each in zip(*world.gather(communication(step, world)), strict=True))
    step_s = statistics.median(blocks) / BLOCK
    result = {
        "images_per_s_gpu": job.batch / step_s,
        "images_per_s": job.batch * world.size / step_s,
        "step_s": step_s,
        "slowest_s": max(blocks) / BLOCK,
        "steps_timed": len(blocks) * BLOCK,
        "comm_share": share,
        "comm_running": running,
        "data_wait": data_wait,
        "peak_gib": peak,
        "reserved_gib": reserved,
        "setup_s": setup_s,
    }
    if job.checkpoints is not None:
        saved = saving(job.checkpoints, strategy, work.adapter == "lora", step, world)
        longest = {name: max(world.gather(value)) for name, value in saved.items()}
        result |= longest
    if world.is_main:
        Path(job.out).write_text(json.dumps(result))
    world.barrier()
    batches.close()
    distributed.stop()


# --- all variants -------------------------------------------------------------------------------------


def with_efficiency(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row how it stands to one GPU of the same work, where that was measured before it."""
    alone: dict[str, float] = {}
    for row in rows:
        if "error" in row:
            continue
        if row["processes"] == 1:
            alone[row["work"]] = row["images_per_s_gpu"]
        if row["work"] in alone:
            row["efficiency"] = row["images_per_s_gpu"] / alone[row["work"]]


@contextlib.contextmanager
def shards_of(shape: str, root: Path | None, mib: float) -> Iterator[Path]:
    """A folder of shards: kept in `root` for the next call, or temporary."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as temporary:
        folder = (root or Path(temporary)) / f"{shape}-{mib:g}mib"
        if not (folder / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # half written
            write_shards(folder, shape, mib)
        yield folder


def on_each(job: Job, gpus: int, limit_s: float) -> dict[str, Any]:
    """One process on each of the first `gpus` GPUs, at once: the mean of what they measure, or one's `error`."""
    names = visible_gpus()[:gpus] or [""]
    with ThreadPoolExecutor(len(names)) as pool:
        rows = list(pool.map(lambda gpu: launch("benchmarks.scaling", asdict(job), 1, limit_s, gpus=[gpu]), names))
    failed = [row for row in rows if "error" in row]
    if failed:
        return failed[0]
    mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    mean["host_gib"] /= len(rows)  # each has seen all of them
    return mean | {"images_per_s_each": [row["images_per_s_gpu"] for row in rows]}


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    measured_on = context()
    for name in arguments.works:
        work, usual = WORKS[name]
        batch = arguments.batch or work.batch
        most = max(arguments.gpus)
        places = [(count, 1) for count in arguments.gpus if count > 1]
        if arguments.nodes > 1:
            places.append((most, arguments.nodes))
        variants = [(strategy, *place) for strategy in arguments.strategies or usual for place in places]
        if 1 in arguments.gpus:
            variants.insert(0, ("ddp", 1, 1))
        with shards_of(work.shape, arguments.shards, arguments.mib) as shards:
            for strategy, processes, nodes in variants:
                row = {"work": name, "variant": strategy, "processes": processes, "nodes": nodes}
                row |= {"batch": batch, "precision": "bf16"}
                drop_from_cache(shards)
                with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=arguments.shards) as folder:
                    is_saved = strategy in arguments.saves and (processes, nodes) == (most, 1)
                    saves = folder if is_saved else None
                    job = Job(name, strategy, batch, arguments.seconds, str(shards), saves, "")
                    if processes == 1:
                        row |= on_each(job, most, arguments.limit)
                    else:
                        row |= launch("benchmarks.scaling", asdict(job), processes, arguments.limit, nodes=nodes)
                rows.append(row)
                with_efficiency(rows)
                record(arguments.out, {key: rounded(value) for key, value in row.items()} | measured_on)
    return rows


# --- what comes of it ---------------------------------------------------------------------------------


def newest(path: Path) -> list[dict[str, Any]]:
    """The last row of each variant that was measured on the hardware of the file's last row.

    Raises:
        UserError: there are none.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if not rows:
        raise UserError(f"{path} holds no results; measure some with --out {path}")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["hardware"] == rows[-1]["hardware"]:
            found[tuple(row[key] for key in ("work", "variant", "processes", "nodes"))] = row
    return list(found.values())


def table(rows: Sequence[dict[str, Any]]) -> None:
    columns = {
        "images_per_s": "images/s",
        "images_per_s_gpu": "a GPU",
        "efficiency": "of linear",
        "comm_share": "comm",
        "data_wait": "data wait",
        "stall_s": "stall s",
        "lost_s": "lost s",
        "peak_gib": "GiB",
        "host_gib": "host GiB",
    }
    shares = {"efficiency", "comm_share", "data_wait"}
    head = "".join(f"{name:>11}" for name in columns.values())
    print(f"\n{'work':<12}{'strategy':<9}{'GPUs':>5}{'nodes':>6}{head}")
    for row in rows:
        print(f"{row['work']:<12}{row['variant']:<9}{row['processes']:>5}{row['nodes']:>6}", end="")
        if "error" in row:
            print(f"  {row['error'][:100]}")
            continue
        cells = [
            "-" if name not in row else f"{row[name]:.1%}" if name in shares else f"{row[name]:.4g}"
            for name in columns
        ]
        print("".join(f"{cell:>11}" for cell in cells))


def draw(rows: Sequence[dict[str, Any]], out: Path, hardware: str) -> None:
    """Images/s beside linear growth, and where the rest goes, one column a work."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "error" not in row]
    works = list(dict.fromkeys(row["work"] for row in rows))
    if not works:
        return
    figure = Figure(figsize=(4.5 * len(works), 7), layout="constrained")
    figure.suptitle(f"{hardware}, bf16")
    grid = figure.subplots(2, len(works), squeeze=False)
    for column, work in enumerate(works):
        above, below = grid[0][column], grid[1][column]
        here = [row for row in rows if row["work"] == work]
        one = [row for row in here if row["processes"] == 1]
        counts = sorted({row["processes"] for row in here})
        if one:
            linear = [one[0]["images_per_s"] * count for count in counts]
            above.plot(counts, linear, linestyle=":", color="gray", label="linear")
        for number, strategy in enumerate(dict.fromkeys(row["variant"] for row in here)):
            color = f"C{number}"
            for is_one, style, marker in ((True, "-", "o"), (False, "", "s")):
                mine = sorted(
                    (row for row in here if row["variant"] == strategy and (row["nodes"] == 1) is is_one),
                    key=lambda row: row["processes"],
                )
                if is_one and strategy != "ddp":
                    mine = one + mine  # all begin at one GPU
                if not mine:
                    continue
                gpus = [row["processes"] for row in mine]
                label = strategy if is_one else f"{strategy}, {mine[0]['nodes']} agents"
                face = color if is_one else "none"
                drawn = {"linestyle": style, "marker": marker, "color": color, "markerfacecolor": face}
                above.plot(gpus, [row["images_per_s"] for row in mine], label=label, **drawn)
                below.plot(
                    gpus, [100 * row["comm_share"] for row in mine], label=f"{label}: communication", **drawn
                )
                if is_one:
                    waits = [100 * row["data_wait"] for row in mine]
                    below.plot(gpus, waits, linestyle="--", color=color, label=f"{label}: waiting for data")
        above.set(title=f"{work}, {here[0]['batch']} a GPU", ylabel="images/s", ylim=(0, None))
        below.set(xlabel="GPUs", ylabel="% of a step", ylim=(0, None))
        for axes in (above, below):
            axes.set_xticks(counts)
            axes.legend(fontsize="small")
    save_plot(figure, out)


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(Job(**json.loads(sys.argv[2])))
        return
    on_gpu = torch.cuda.is_available()
    there = torch.cuda.device_count() if on_gpu else 2
    works = [name for name in WORKS if name.startswith("tiny") != on_gpu]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", type=names, default=works if on_gpu else ["tiny"], help=f"of {', '.join(WORKS)}")
    parser.add_argument(
        "--strategies", type=names, help=f"of {', '.join(STRATEGIES)} (default: those of each work)"
    )
    gpus = [count for count in (1, 2, 4, 8) if count <= there]
    parser.add_argument("--gpus", type=numbers, default=gpus, help="how many, as 1,8; on a CPU processes")
    parser.add_argument("--nodes", type=int, default=1, help="torchrun agents that share the most GPUs once more")
    parser.add_argument("--batch", type=int, help="samples of one GPU (default: 48, 8 for SDXL)")
    parser.add_argument(
        "--shards", type=Path, help="shards are kept here, on the disk to measure; default: temporary"
    )
    parser.add_argument("--mib", type=float, default=4096 if on_gpu else 2, help="of each work's shards")
    parser.add_argument(
        "--saves", type=names, default=STRATEGIES, help="whose checkpoint is measured, or none (default: all's)"
    )
    parser.add_argument("--seconds", type=float, default=15.0 if on_gpu else 0.2, help="timed, of each variant")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a variant is ended")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well, and plotted beside it")
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="measure nothing: table and plot of its newest rows"
    )
    arguments = parser.parse_args()
    lists = (
        (WORKS, arguments.works),
        (STRATEGIES, arguments.strategies or []),
        ((*STRATEGIES, "none"), arguments.saves),
    )
    for known, given in lists:
        if unknown := set(given) - set(known):
            parser.error(f"{min(unknown)} is not one of {', '.join(known)}")
    require_gpus(parser, arguments.gpus)
    if arguments.nodes < 1 or max(arguments.gpus) % arguments.nodes:
        parser.error(f"--nodes {arguments.nodes} cannot share {max(arguments.gpus)} GPUs evenly")
    out = arguments.draw or arguments.out
    if out is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install matplotlib")
    if arguments.shards is not None:
        arguments.shards.mkdir(parents=True, exist_ok=True)
    if arguments.draw is None:
        table(measure(arguments))
    if out is not None:
        try:
            rows = newest(out)
        except UserError as error:
            parser.error(str(error))
        if arguments.draw is not None:
            table(rows)
        draw(rows, out.with_suffix(".png"), rows[0]["hardware"])


if __name__ == "__main__":
    main()
