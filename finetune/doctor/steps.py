"""Two steps by the loop of `finetune train` itself: weights, samples, learning rate and losses, watched."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from finetune import build, loop
from finetune.batch import Batch
from finetune.checkpoint import Progress
from finetune.config import Config
from finetune.data.loader import Data
from finetune.distributed import StopRequest, World
from finetune.doctor.context import Context, settle, skipped
from finetune.doctor.table import FAIL, OK, Row
from finetune.doctor.weights import Weights, equal_rows, keep, moved_names, moved_rows, weights_of
from finetune.loop import Parts
from finetune.lr import learning_rate
from finetune.terminal import ranks_text

STEPS = 2
_NEVER = 1 << 60
_LR_RTOL = 1e-9


class EnoughError(Exception):
    """The loop has made the steps that were asked for."""


class Probe:
    """Stands where the loop reports: notes what each step did, writes nothing, and ends the loop."""

    def __init__(self, parts: Parts, world: World, steps: int) -> None:
        self.parts, self.world, self.left = parts, world, steps
        self.open_losses: list[float] = []
        self.steps_not_finite = self.steps_skipped = 0
        self.rates: list[list[float]] = []  # of each parameter group after each step
        self.loss_sums: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        self.since = time.perf_counter()

    def step(self, loss_sum: Tensor, grad_norm: Tensor, data_seconds: float) -> None:
        self.loss_sums.append(float(loss_sum))
        self.norms.append(float(grad_norm))
        settle(self.world)
        self.seconds.append(time.perf_counter() - self.since)
        self.rates.append([float(group["lr"]) for group in self.parts.strategy.optimizer.param_groups])
        self.left -= 1
        if self.left == 0:
            raise EnoughError
        self.since = time.perf_counter()

    def settle(self) -> None: ...

    def log(self, step: int, lr: float) -> None: ...

    def write(self, values: dict[str, Any]) -> None: ...

    def image(self, step: int, picture: Image.Image, caption: str) -> Path | None: ...

    def say(self, line: str) -> None: ...

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield


class _Watched:
    """A run's data, whose batches are noted as the loop takes them."""

    def __init__(self, data: Data, seen: list[Batch]) -> None:
        self._data, self._seen = data, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def loader(self, **settings: Any) -> Any:
        return _WatchedLoader(self._data.loader(**settings), self._seen)


class _WatchedLoader:
    def __init__(self, loader: Any, seen: list[Batch]) -> None:
        self._loader, self._seen = loader, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        try:
            for batch in batches:
                self._seen.append(batch)
                yield batch
        finally:
            batches.close()


def loop_config(config: Config, scratch: Path) -> Config:
    """The same run in another folder, without what happens between steps."""
    changed = copy.deepcopy(config)
    changed.run.dir = str(scratch)
    changed.checkpoint.every = changed.tracker.every = _NEVER
    changed.checkpoint.resume = "auto"
    changed.validation.every = changed.sample.every = 0
    changed.train.steps = max(config.train.steps, STEPS + 2)  # the last step would be saved and shown
    return changed


def make_steps(context: Context, progress: Progress, steps: int) -> tuple[Probe, list[Batch]]:
    """Steps by the loop of `finetune train` itself; collective.

    Returns:
        What it reported, and the batches that it took.
    """
    world, parts, scratch = context.joined(), context.parts, context.scratch
    assert parts is not None and scratch is not None
    seen: list[Batch] = []
    probe = Probe(parts, world, steps)
    watched = replace(parts, data=_Watched(parts.data, seen))  # type: ignore[arg-type]
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
    try:
        loop.train(loop_config(context.config, scratch), world, watched, probe, progress, StopRequest(world.rank))
    except EnoughError:
        pass
    finally:
        if on_gpu:
            context.peak_bytes = max(context.peak_bytes, torch.cuda.max_memory_allocated(world.device))
            context.reserved_bytes = max(context.reserved_bytes, torch.cuda.max_memory_reserved(world.device))
    context.step_seconds += probe.seconds
    per_step = parts.accumulation
    return probe, seen[: steps * per_step]


def step_rows(context: Context) -> list[Row]:
    """Two steps: equal weights before and after, distinct data, the learning rate, and a finite loss."""
    names = ["weights", "samples", "learning rate", "steps"]
    parts, config = context.parts, context.config
    assert parts is not None
    before: list[Weights] = []
    after: list[Weights] = []
    taken: list[tuple[Probe, list[Batch]]] = []
    outcomes = context.exchange(
        "weights", "weights before the steps", lambda: keep(before, weights_of(parts)), collective=True
    )
    if rows := context.failures("weights", outcomes, "see what it says"):
        return rows + skipped(names[1:], "the weights could not be read")
    rows = equal_rows(context, before[0], outcomes, "before the first step")

    def go() -> dict[str, Any]:
        taken.append(make_steps(context, at_start(context), STEPS))
        probe, batches = taken[0]
        return {"losses": probe.loss_sums, "norms": probe.norms, "rates": probe.rates} | _samples(context, batches)

    outcomes_steps = context.exchange("steps", "two steps", go, collective=True)
    context.is_full = any(outcome.memory for outcome in outcomes_steps)
    remedy = build.OUT_OF_MEMORY if context.is_full else "see what it says; finetune train would fail so"
    if failed := context.failures("steps", outcomes_steps, remedy):
        context.parts = None  # a step that broke leaves gradients and hooks in any state
        return rows + failed + skipped(names[1:3], "the steps failed")
    outcomes = context.exchange(
        "weights", "weights after the steps", lambda: keep(after, weights_of(parts)), collective=True
    )
    if failed := context.failures("weights", outcomes, "see what it says"):
        return rows + failed
    rows += equal_rows(context, after[0], outcomes, f"after {STEPS} steps")
    moved = context.exchange("weights", "what has moved", lambda: moved_names(parts, before[0], after[0]))
    rows += moved_rows(context, [each.value for each in moved])
    if bad := [row for row in rows if row.result != OK]:
        rows = [replace(bad[0], seen="; ".join(row.seen for row in bad))]
    else:  # one row says it all
        digest = outcomes[0].value[0]
        count = len({name for each in moved for name in each.value[0]})
        text = f"equal on all ranks before and after {STEPS} steps ({digest})" if context.size > 1 else f"{digest}"
        if context.size > 1 and getattr(parts.strategy, "stage", 0) == 3:
            text = f"gathered {text}, and every rank's pieces are its rounded masters"
        rows = [
            Row("weights", OK, f"{text}; the steps moved {count} of {len(parts.strategy.shards)} trained tensors")
        ]
    seen = [outcome.value for outcome in outcomes_steps]
    return [*rows, *sample_rows(context, seen), *rate_rows(context, seen), *_loss_rows(config, seen)]


def at_start(context: Context) -> Progress:
    parts = context.parts
    assert parts is not None
    return loop.at_start(parts, build.depends_on(context.config, parts))


def _samples(context: Context, batches: list[Batch]) -> dict[str, Any]:
    """Clocks, sample ids and hashes of the contents of the batches that this rank took."""
    clocks = [int(value) for batch in batches for value in batch.clock]
    ids = [int(value) for batch in batches for value in batch.sample_ids]
    contents = [
        hashlib.blake2b(row.numpy().tobytes(), digest_size=6).hexdigest()
        for batch in batches
        for row in batch.moments
    ]
    return {"clocks": clocks, "ids": ids, "contents": contents}


def sample_rows(context: Context, seen: Sequence[dict[str, Any]]) -> list[Row]:
    """All ranks' samples together are the planned global batches, each sample once."""
    parts, total = context.parts, context.config.train.global_batch
    assert parts is not None
    remedy = (
        "the ranks must know who they are: look at the rows ranks and strategy; start with torchrun or launchers/"
    )
    wanted: dict[int, int] = {}
    for step in range(STEPS):
        chosen = parts.data.order.batch(step)
        ids = parts.data.ids(chosen.bucket, chosen.sources, chosen.rows)
        wanted |= {step * total + place: int(sample) for place, sample in enumerate(ids.tolist())}
    wrong = []
    owner: dict[int, int] = {}
    for rank, each in enumerate(seen):
        again = [owner[clock] for clock in each["clocks"] if clock in owner]
        if again:
            wrong.append(
                f"{context.named([rank])} reads {len(again)} of its {len(each['clocks'])} samples as "
                f"{ranks_text(sorted(set(again)))} does"
            )
        owner |= {clock: rank for clock in each["clocks"] if clock not in owner}
    if missing := wanted.keys() - owner.keys():
        wrong.append(f"{len(missing)} of {len(wanted)} planned samples are read by no rank")
    others = [
        (rank, clock)
        for rank, each in enumerate(seen)
        for clock, sample in zip(each["clocks"], each["ids"], strict=True)
        if wanted.get(clock) != sample
    ]
    if others:
        ranks = sorted({rank for rank, _ in others})
        wrong.append(f"{context.named(ranks)}: {len(others)} samples are not those of the plan")
    contents: dict[tuple[str, ...], list[int]] = {}
    for rank, each in enumerate(seen):
        contents.setdefault(tuple(each["contents"]), []).append(rank)
    for content, ranks in contents.items():
        same = [seen[rank]["ids"] for rank in ranks]
        # One picture may be there twice; several in a row are not.
        if len(ranks) > 1 and len(content) > 2 and len({tuple(ids) for ids in same}) > 1:
            wrong.append(f"{context.named(ranks)} have other sample ids, but the same contents")
    if wrong:
        return [Row("samples", FAIL, "; ".join(wrong[:4]), remedy)]
    distinct = len({content for each in seen for content in each["contents"]})
    share = total // context.size
    text = (
        f"{STEPS} global batches of {total}: {share} a rank, none twice, as planned ({distinct} distinct contents)"
    )
    return [Row("samples", OK, text)]


def rate_rows(context: Context, seen: Sequence[dict[str, Any]]) -> list[Row]:
    """What each rank's optimizer has in its parameter groups after each step, against the plan."""
    config, parts = context.config, context.parts
    assert parts is not None
    ratios = [float(group.get("lr_ratio", 1.0)) for group in parts.strategy.optimizer.param_groups]
    planned = [planned_rate(config, step) for step in range(1, STEPS + 1)]
    wrong = []
    for rank, each in enumerate(seen):
        for number, (rates, plan) in enumerate(zip(each["rates"], planned, strict=True), start=1):
            odd = [
                (rate, plan * ratio)
                for rate, ratio in zip(rates, ratios, strict=True)
                if abs(rate - plan * ratio) > _LR_RTOL * abs(plan * ratio)
            ]
            if odd:
                rate, plan_of_it = odd[0]
                times = f", {rate / plan_of_it:.3g} times" if plan_of_it else ""
                wrong.append(
                    f"{context.named([rank])}, step {number}: {rate:.6g} instead of {plan_of_it:.6g}{times}"
                )
                break
    if wrong:
        return [
            Row(
                "learning rate",
                FAIL,
                "; ".join(wrong[:4]),
                "the schedule counts images of all ranks: nothing else (a prepared scheduler that steps once a "
                "process, a DeepSpeed scheduler) may set the rate",
            )
        ]
    text = ", ".join(f"{rate:.4g}" for rate in planned)
    several = f"; groups at {', '.join(f'{ratio:.3g}' for ratio in ratios)} times that" if len(ratios) > 1 else ""
    return [Row("learning rate", OK, f"{text} after steps 1 to {STEPS}, as planned{several}")]


def planned_rate(config: Config, step: int) -> float:
    """The learning rate of the optimizer step that makes the run `step` steps long."""
    return learning_rate(
        step * config.train.global_batch,
        peak=config.optim.lr,
        schedule=config.optim.schedule,
        warmup_images=config.optim.warmup_images,
        total_images=max(config.train.steps, STEPS + 2) * config.train.global_batch,
        final_ratio=config.optim.final_lr_ratio,
    )


def _loss_rows(config: Config, seen: Sequence[dict[str, Any]]) -> list[Row]:
    total = config.train.global_batch
    losses = [sum(each["losses"][step] for each in seen) / total for step in range(STEPS)]
    norms = seen[0]["norms"]
    said = ", ".join(f"{loss:.4f}" for loss in losses), ", ".join(f"{norm:.3g}" for norm in norms)
    text = f"losses {said[0]}; gradient norms {said[1]}"
    if not all(torch.isfinite(torch.tensor(losses))):
        return [Row("steps", FAIL, text, "train.precision=fp32 or bf16, a lower optim.lr; look at the latents")]
    if not all(torch.isfinite(torch.tensor(norms))) and config.train.precision != "fp16":
        return [Row("steps", FAIL, f"{text}: such a step is skipped", "train.precision=fp32, a lower optim.lr")]
    return [Row("steps", OK, text)]
