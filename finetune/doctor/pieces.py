"""The pieces of a run: data, model, strategy, how fast samples are read, where metrics go."""

from __future__ import annotations

import hashlib
import shutil
import socket
import time
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from finetune import UserError, build, first_line
from finetune.config import data_sources
from finetune.data.shards import is_remote
from finetune.distributed import DataParallel, ZeRO
from finetune.doctor.context import Context, odd_ones, settle, skipped
from finetune.doctor.memory import whole_numel
from finetune.doctor.table import FAIL, OK, WARN, Row
from finetune.tracking import wandb_host, wandb_mode

_READ_SECONDS = 1.0
_MARGIN = 1.3  # readers must be that much faster than the steps
_FAR_STEP = 10  # of whose samples no page was read by the steps


def batch_rows(context: Context) -> list[Row]:
    """A global batch that the ranks cannot share; nothing where they can."""
    outcomes = context.exchange(
        "hosts", "sharing the batch", lambda: build.batch_sizes(context.config, context.joined())
    )
    remedy = "change train.global_batch, train.micro_batch or the number of processes"
    return context.failures("batch", outcomes, remedy)


def data_rows(context: Context) -> list[Row]:
    """Every rank opens the shards by itself and reads one micro-batch."""
    outcomes = context.exchange("data", "opening the data", lambda: _open(context))
    sources = data_sources(asdict(context.config.data)).values()
    remedy = "every machine must reach the shards under the same path; `data-tools verify SHARDS` looks at them all"
    if any(is_remote(source["shards"]) for source in sources):
        remedy = "every machine must reach the address, with the same credentials"
    if rows := context.failures("data", outcomes, remedy):
        return rows
    texts = odd_ones([outcome.value for outcome in outcomes])
    if len(texts) > 1:
        said = "; ".join(f"{context.named(ranks)}: {text}" for text, ranks in texts.items())
        return [Row("data", FAIL, f"the ranks see different shards: {said}", remedy)]
    return [Row("data", OK, next(iter(texts)))]


def _open(context: Context) -> str:
    """What there is, in words that are equal where the data is."""
    micro_batch, _ = build.batch_sizes(context.config, context.joined())
    data = build.open_data(context.config, micro_batch * context.size)
    try:
        digest = hashlib.sha256()
        for samples in data.sources:
            digest.update(str(samples.shards.manifest.sha256).encode())
            for sample in {0, len(samples.shards) - 1}:  # the first shard and the last
                samples.shards.read_json(sample)
        samples_count = sum(len(samples.shards) for samples in data.sources)
        shards = sum(len(samples.shards.manifest.shards) for samples in data.sources)
        return (
            f"{samples_count} samples in {shards} shards of {len(data.sources)} source(s), "
            f"{len(data.buckets)} bucket(s), manifests {digest.hexdigest()[:8]}"
        )
    finally:
        for samples in data.sources:
            samples.shards.close()


def build_rows(context: Context) -> list[Row]:
    """Make everything that a run is made of; sets `context.parts`."""
    scratch = context.scratch
    assert scratch is not None

    def make() -> float:
        started = time.perf_counter()
        world = context.joined()
        kept = context.run / "tokenizer"
        if world.is_main and kept.is_dir():  # of a run that trained its own: making it again may take minutes
            shutil.copytree(kept, scratch / "tokenizer", dirs_exist_ok=True)
        parts = build.build(context.config, world, scratch)
        settle(world)
        context.parts = parts
        return time.perf_counter() - started

    outcomes = context.exchange("build", "building the model", make, collective=True)
    memory = any(outcome.memory for outcome in outcomes)
    remedy = build.OUT_OF_MEMORY if memory else "see what it says; finetune train would say the same"
    if rows := context.failures("model", outcomes, remedy):
        context.parts = None
        return rows
    parts = context.parts
    assert parts is not None
    every = sum(whole_numel(parameter) for parameter in parts.strategy.module.parameters())
    trained = sum(shard.shape.numel() for shard in parts.strategy.shards)
    text = f"{every / 1e6:.1f} M weights, {trained / 1e6:.1f} M trained; built in {outcomes[0].value:.0f} s"
    rows = [Row("model", OK, text), *strategy_rows(context)]
    return rows + [Row("note", WARN, notice, "only if that is not what you want") for notice in parts.notices]


def strategy_rows(context: Context) -> list[Row]:
    """What really spreads the weights is what the config asks for, over all ranks."""
    outcomes = context.exchange("hosts", "strategy", lambda: strategy_of(context))
    remedy = "start with torchrun or a file of launchers/accelerate/; the strategy is the run's: strategy=..."
    if rows := context.failures("strategy", outcomes, remedy):
        return rows
    asked_for = context.config.strategy
    wanted = (asked_for.kind, asked_for.stage if asked_for.kind == "zero" else 0)
    wrong = []
    for rank, outcome in enumerate(outcomes):
        kind, stage, of_rank, of_size = outcome.value
        if (kind, stage) != wanted:
            asked, runs = (f"{k} stage {s}" if k == "zero" else k for k, s in (wanted, (kind, stage)))
            wrong.append(f"{context.named([rank])}: the config asks for {asked}, what runs is {runs}")
        if (of_rank, of_size) != (rank, context.size):
            wrong.append(
                f"{context.named([rank])}: it counts as rank {of_rank} of {of_size}, not of {context.size}"
            )
    if wrong:
        return [Row("strategy", FAIL, "; ".join(wrong[:4]), remedy)]
    kind, stage, _, _ = outcomes[0].value
    what = (
        f"DeepSpeed ZeRO stage {stage}"
        if kind == "zero"
        else "data parallel"
        if context.size > 1
        else "one process"
    )
    assert context.parts is not None
    text = f"{what}: micro-batches of {context.parts.micro_batch}, {context.parts.accumulation} a step and rank"
    return [Row("strategy", OK, text)]


def strategy_of(context: Context) -> tuple[str, int, int, int]:
    """(kind, stage, rank, ranks) as the strategy's own layer counts them."""
    assert context.parts is not None
    strategy: Any = context.parts.strategy
    if isinstance(strategy, ZeRO):
        engine = strategy.engine
        return "zero", int(engine.zero_optimization_stage()), int(engine.global_rank), int(engine.dp_world_size)
    if isinstance(strategy, DataParallel):
        if strategy.reduction is not None:
            return "ddp", 0, dist.get_rank(), dist.get_world_size()
        return "ddp", 0, 0, 1  # gradients stay on this rank
    raise UserError(f"{type(strategy).__name__} is no strategy that the doctor knows")


def reading_rows(context: Context) -> list[Row]:
    """A second of reading by all ranks at once, against what the steps take."""
    outcomes = context.exchange("data", "reading", lambda: _read(context))
    remedy = "raise data.readers and data.prefetch, put the shards on a faster disk, or encode larger shards"
    if rows := context.failures("reading", outcomes, remedy):
        return rows
    speeds = [outcome.value for outcome in outcomes]
    slowest = context.exchange("hosts", "step time", lambda: min(context.step_seconds[1:] or [0.0]))
    step = max(outcome.value for outcome in slowest)
    reading = min(speeds) * context.size  # all ranks wait for the slowest reader
    wanted = context.config.train.global_batch / step if step else 0.0
    text = f"{reading:.0f} samples/s can be read, the steps take {wanted:.1f} images/s"
    if reading < _MARGIN * wanted:
        slow = min(range(context.size), key=lambda rank: speeds[rank])
        return [Row("reading", WARN, f"{text} (slowest: {context.named([slow])})", remedy)]
    return [Row("reading", OK, text)]


def _read(context: Context) -> float:
    """Samples a second of this rank's share, as a run reads them."""
    parts, config = context.parts, context.config
    assert parts is not None
    loader = parts.data.loader(
        seed=config.seed,
        rank=context.rank,
        world_size=context.size,
        micro_batch=parts.micro_batch,
        start_step=_FAR_STEP,
        readers=config.data.readers,
        prefetch=config.data.prefetch,
        pin=context.joined().device.type == "cuda",
    )
    batches = iter(loader)
    try:
        next(batches)
        held = config.data.prefetch * parts.micro_batch  # what was ready beforehand was read in no time
        count, started = -held, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < _READ_SECONDS or (
            count <= 0 and elapsed < 10 * _READ_SECONDS
        ):
            count += len(next(batches))
        return max(count, 1) / elapsed
    finally:
        batches.close()
        loader.close()


def tracking_rows(context: Context) -> list[Row]:
    """Whether W&B can be reached, where the run would want it."""
    settings = context.config.tracker
    if not settings.wandb:
        return skipped(["tracking"], "tracker=none")

    def reach() -> str:
        mode = wandb_mode(settings.mode)
        if context.rank != 0 or mode != "online":
            return mode
        name, _, port = wandb_host().partition(":")
        with socket.create_connection((name, int(port or 443)), timeout=10):
            return mode

    outcomes = context.exchange("hosts", "W&B", reach)
    if outcomes[0].error:
        text = f"W&B is wanted online and cannot be reached ({first_line(Exception(outcomes[0].error))})"
        return [Row("tracking", WARN, text, "tracker.mode=offline and `wandb sync` later, or tracker=none")]
    return [Row("tracking", OK, f"W&B {outcomes[0].value}")]
