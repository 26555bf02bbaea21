"""The run itself, for a few steps: data, model, the loop's own steps, a checkpoint, and going on from it."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune import UserError, build, first_line, loop
from finetune.batch import Batch
from finetune.checkpoint import Progress, require_same
from finetune.config import Config
from finetune.data.loader import Data
from finetune.distributed import DataParallel, Shard, StopRequest, Strategy, World, ZeRO
from finetune.doctor.context import Context, odd_ones, skipped
from finetune.doctor.files import space_row
from finetune.doctor.memory import OUT_OF_MEMORY
from finetune.doctor.table import FAIL, OK, WARN, Row, ranks_text, size_text
from finetune.loop import Parts
from finetune.lr import learning_rate
from finetune.models.components import complete_checkpoints
from finetune.tracking import Tracker, wandb_mode

STEPS = 2
_NEVER = 1 << 60
_CHUNK = 1 << 23  # elements whose checksum is taken at once: 64 MiB of int64
_READ_SECONDS = 1.0
_MARGIN = 1.3  # readers must be that much faster than the steps
_LOSS_RTOL = 1e-3  # of a repeated step on a GPU, whose kernels may add in another order
_LR_RTOL = 1e-9


# --- the pieces of a run ----------------------------------------------------------------------------------------


def data_rows(context: Context) -> list[Row]:
    """Every rank opens the shards by itself and reads one micro-batch."""
    outcomes = context.exchange("data", "opening the data", lambda: _open(context))
    remedy = "every machine must reach the shards under the same path; `data-tools verify SHARDS` looks at them all"
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
        _settle(world)
        context.parts = parts
        return time.perf_counter() - started

    outcomes = context.exchange("build", "building the model", make, collective=True)
    memory = any(outcome.memory for outcome in outcomes)
    remedy = OUT_OF_MEMORY if memory else "see what it says; finetune train would say the same"
    if rows := context.failures("model", outcomes, remedy):
        context.parts = None
        return rows
    parts = context.parts
    assert parts is not None
    every = sum(_whole(parameter) for parameter in parts.strategy.module.parameters())
    trained = sum(shard.shape.numel() for shard in parts.strategy.shards)
    text = f"{every / 1e6:.1f} M weights, {trained / 1e6:.1f} M trained; built in {outcomes[0].value:.0f} s"
    rows = [Row("model", OK, text), *strategy_rows(context)]
    return rows + [Row("note", WARN, notice, "only if that is not what you want") for notice in parts.notices]


def _whole(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def strategy_rows(context: Context) -> list[Row]:
    """What really spreads the weights is what the config asks for, over all ranks."""
    outcomes = context.exchange("hosts", "strategy", lambda: strategy_of(context))
    remedy = "start with torchrun or a file of launchers/accelerate/; the strategy is the run's: strategy=..."
    if rows := context.failures("strategy", outcomes, remedy):
        return rows
    wanted = (context.config.strategy.kind, context.config.strategy.stage if _is_zero(context.config) else 0)
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


def _is_zero(config: Config) -> bool:
    return config.strategy.kind == "zero"


def strategy_of(context: Context) -> tuple[str, int, int, int]:
    """(kind, stage, rank, ranks) as the strategy's own layer counts them."""
    assert context.parts is not None
    strategy: Any = context.parts.strategy
    if isinstance(strategy, ZeRO):
        engine = strategy.engine
        return "zero", int(engine.zero_optimization_stage()), int(engine.global_rank), int(engine.dp_world_size)
    if isinstance(strategy, DataParallel):
        wrapped: Any = strategy.wrapped
        group = getattr(wrapped, "process_group", None)
        if group is not None:
            return "ddp", 0, dist.get_rank(group), dist.get_world_size(group)
        return "ddp", 0, 0, 1  # not wrapped: gradients stay on this rank
    raise UserError(f"{type(strategy).__name__} is no strategy that the doctor knows")


def _settle(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


# --- checksums of weights ---------------------------------------------------------------------------------------


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """Of all bits and their places: any one difference changes it.

    Args:
        tensor: of any shape, dtype and device; it is summed there, modulo 2^64.
    """
    flat = tensor.detach().contiguous().view(-1)
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.view(widths[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _CHUNK):
        piece = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(piece), device=flat.device)
        # Odd factors, so that no change of one element is lost; int64 wraps around.
        total += (piece * (places * -7046029254386353131 | 1)).sum()
    return int(total)


@dataclass
class Weights:
    """Checksums at one moment, on one rank.

    Attributes:
        working: by name, of what forward passes use, where each rank holds all of it (not under ZeRO-3, but for
            the small parameters that it keeps whole), and of the average under DDP.
        masters: by name, of this rank's shards.
        apart: trained parameters whose working weights are not their rounded masters.
        owned: elements of this rank's shards.
        finite: all masters are finite numbers.
    """

    working: dict[str, int] = field(default_factory=dict)
    masters: dict[str, int] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    owned: int = 0
    finite: bool = True

    def digest(self) -> str:
        return hashlib.sha256(repr(sorted(self.working.items())).encode()).hexdigest()[:12]

    def masters_digest(self) -> str:
        return hashlib.sha256(repr(sorted(self.masters.items())).encode()).hexdigest()[:12]


@torch.no_grad()
def weights_of(parts: Parts) -> Weights:
    """Checksums of everything that ranks must agree on."""
    strategy, found = parts.strategy, Weights()
    stage: int = getattr(strategy, "stage", 0)
    parameters = parameters_of(strategy)
    for name, parameter in parameters.items():
        if not hasattr(parameter, "ds_numel") or parameter.data.numel() == parameter.ds_numel:
            found.working[name] = checksum(parameter.data)
    for name, buffer in strategy.module.named_buffers():
        found.working[name] = checksum(buffer)
    if parts.average is not None and stage == 0:
        for shard, tensor in zip(strategy.shards, parts.average.tensors, strict=True):
            found.working[f"average of {shard.name}"] = checksum(tensor)
    for shard in strategy.shards:
        if not shard.master.numel():
            continue
        found.masters[shard.name] = checksum(shard.master)
        found.owned += shard.master.numel()
        found.finite = found.finite and bool(torch.isfinite(shard.master).all())
        if stage and not _rounded(parameters[shard.name], shard, stage):
            found.apart.append(shard.name)
    return found


def parameters_of(strategy: Strategy) -> dict[str, Any]:
    """All parameters by the names that shards have."""
    own = "conditioner.encoder."
    return {
        f"text_encoder.{name.removeprefix(own)}" if name.startswith(own) else name: parameter
        for name, parameter in strategy.module.named_parameters()
    }


def _rounded(parameter: Any, shard: Shard, stage: int) -> bool:
    """Whether a piece of the working weights is its master, rounded."""
    count = shard.master.numel()
    if stage == 3:
        working = parameter.ds_tensor.data.view(-1)[:count]
        whole = parameter.data.reshape(-1)
        if len(whole) == parameter.ds_numel and not torch.equal(
            whole[shard.start : shard.start + count], working.to(whole.device)
        ):
            return False
    else:
        working = parameter.data.view(-1)[shard.start : shard.start + count]
    return torch.equal(working.to(shard.master.device), shard.master.reshape(-1).to(working.dtype))


# --- two steps --------------------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """The loop has made the steps that were asked for."""


class _Probe(Tracker):
    """Stands where the loop reports: notes what each step did, writes nothing, and ends the loop."""

    def __init__(self, parts: Parts, world: World, steps: int) -> None:
        self.parts, self.world, self.left = parts, world, steps
        self.steps_not_finite = 0
        self.rates: list[list[float]] = []  # of each parameter group after each step
        self.loss_sums: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        self.since = time.perf_counter()

    def step(self, loss_sum: Tensor, grad_norm: Tensor, data_seconds: float, *_: Any, **__: Any) -> None:
        self.loss_sums.append(float(loss_sum))
        self.norms.append(float(grad_norm))
        _settle(self.world)
        self.seconds.append(time.perf_counter() - self.since)
        self.rates.append([float(group["lr"]) for group in self.parts.strategy.optimizer.param_groups])
        self.left -= 1
        if self.left == 0:
            raise _EnoughError
        self.since = time.perf_counter()

    def log(self, *_: Any, **__: Any) -> None: ...

    def write(self, *_: Any, **__: Any) -> None: ...

    def image(self, *_: Any, **__: Any) -> None: ...

    def say(self, *_: Any, **__: Any) -> None: ...

    def close(self, *_: Any, **__: Any) -> None: ...

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


def make_steps(context: Context, progress: Progress, steps: int) -> tuple[_Probe, list[Batch]]:
    """Steps by the loop of `finetune train` itself; collective.

    Returns:
        What it reported, and the batches that it took.
    """
    world, parts, scratch = context.joined(), context.parts, context.scratch
    assert parts is not None and scratch is not None
    seen: list[Batch] = []
    probe = _Probe(parts, world, steps)
    watched = replace(parts, data=_Watched(parts.data, seen))  # type: ignore[arg-type]
    try:
        loop.train(loop_config(context.config, scratch), world, watched, probe, progress, StopRequest(world.rank))
    except _EnoughError:
        pass
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
    taken: list[tuple[_Probe, list[Batch]]] = []
    outcomes = context.exchange("weights", "weights before the steps", lambda: _keep(before, weights_of(parts)))
    if rows := context.failures("weights", outcomes, "see what it says"):
        return rows + skipped(names[1:], "the weights could not be read")
    rows = _equal_rows(context, before[0], outcomes, "before the first step")

    def go() -> dict[str, Any]:
        taken.append(make_steps(context, _start(context), STEPS))
        probe, batches = taken[0]
        return {"losses": probe.loss_sums, "norms": probe.norms, "rates": probe.rates} | _samples(context, batches)

    outcomes_steps = context.exchange("steps", "two steps", go, collective=True)
    memory = any(outcome.memory for outcome in outcomes_steps)
    remedy = OUT_OF_MEMORY if memory else "see what it says; finetune train would fail so"
    if failed := context.failures("steps", outcomes_steps, remedy):
        context.parts = None  # a step that broke leaves gradients and hooks in any state
        return rows + failed + skipped(names[1:3], "the steps failed")
    outcomes = context.exchange("weights", "weights after the steps", lambda: _keep(after, weights_of(parts)))
    if failed := context.failures("weights", outcomes, "see what it says"):
        return rows + failed
    rows += _equal_rows(context, after[0], outcomes, f"after {STEPS} steps")
    moved = context.exchange("weights", "what has moved", lambda: _moved(parts, before[0], after[0]))
    rows += _moved_rows(context, [each.value for each in moved])
    if bad := [row for row in rows if row.result != OK]:
        rows = [replace(bad[0], seen="; ".join(row.seen for row in bad))]
    else:  # one row says it all
        digest = outcomes[0].value[0]
        count = len({name for each in moved for name in each.value[0]})
        text = f"equal on all ranks before and after {STEPS} steps ({digest})" if context.size > 1 else f"{digest}"
        if context.size > 1 and getattr(parts.strategy, "stage", 0) == 3:
            text = f"every rank's pieces are its rounded masters before and after {STEPS} steps"
        rows = [
            Row("weights", OK, f"{text}; the steps moved {count} of {len(parts.strategy.shards)} trained tensors")
        ]
    seen = [outcome.value for outcome in outcomes_steps]
    return [*rows, *sample_rows(context, seen), *rate_rows(context, seen), *_loss_rows(config, seen)]


def _keep(box: list[Weights], weights: Weights) -> tuple[str, list[str], int, bool]:
    box.append(weights)
    return weights.digest(), weights.apart[:4], weights.owned, weights.finite


def _start(context: Context) -> Progress:
    parts = context.parts
    assert parts is not None
    encoder = parts.data.encoder
    return Progress(
        step=0,
        images_seen=0,
        steps_taken=0,
        depends_on=build.depends_on(context.config, parts.data),
        latents={"scale": encoder.scale, "shift": encoder.shift, "encoder_sha256": encoder.sha256},
    )


def _equal_rows(context: Context, mine: Weights, outcomes: Sequence[Any], when: str) -> list[Row]:
    """Rows on one moment's weights; `outcomes` are of `_keep`."""
    parts = context.parts
    assert parts is not None
    remedy = (
        "the ranks train different models: see that all load the same files in the same environment; if a rank "
        "goes apart during the steps, its GPU or memory may be faulty: leave its machine out"
    )
    digests = odd_ones([outcome.value[0] for outcome in outcomes])
    wrong = []
    if len(digests) > 1:
        # Only now the names: thousands of checksums from each rank are not for every run.
        tables = [each.value for each in context.exchange("weights", "comparing the weights", lambda: mine.working)]
        agreed = next(iter(digests.values()))[0]
        for ranks in list(digests.values())[1:5]:
            odd = [name for name, value in tables[agreed].items() if tables[ranks[0]].get(name) != value]
            wrong.append(
                f"{context.named(ranks)} differ{'s' if len(ranks) == 1 else ''} from rank {agreed} in "
                f"{len(odd)} of {len(tables[agreed])} tensors{f', first {odd[0]}' if odd else ''}"
            )
    for rank, outcome in enumerate(outcomes):
        _, apart, _, finite = outcome.value
        if apart:
            wrong.append(f"{context.named([rank])}: working weights are not the rounded masters in {apart[0]}")
        if not finite:
            wrong.append(f"{context.named([rank])}: some weights are not finite numbers")
    owned = sum(outcome.value[2] for outcome in outcomes)
    whole = sum(shard.shape.numel() for shard in parts.strategy.shards)
    copies = context.size if all(shard.is_whole for shard in parts.strategy.shards) else 1
    if owned != copies * whole:
        wrong.append(f"the ranks' shards hold {owned} elements, the trained weights are {copies * whole}")
    if wrong:
        return [Row("weights", FAIL, f"{when}: {'; '.join(wrong[:4])}", remedy)]
    return [Row("weights", OK, when)]


def _moved(parts: Parts, before: Weights, after: Weights) -> tuple[list[str], list[str]]:
    """Names of masters on this rank that the steps changed, and of frozen parameters that changed."""
    moved = [name for name, value in after.masters.items() if before.masters[name] != value]
    trained = {shard.name for shard in parts.strategy.shards}
    # ZeRO-3 may keep a parameter whole at one moment and not at the other.
    frozen = [
        name
        for name in parameters_of(parts.strategy)
        if name not in trained
        and name in after.working
        and before.working.get(name, after.working[name]) != after.working[name]
    ]
    return moved, frozen


def _moved_rows(context: Context, seen: list[tuple[list[str], list[str]]]) -> list[Row]:
    if frozen := [(rank, names[0]) for rank, (_, names) in enumerate(seen) if names]:
        rank, name = frozen[0]
        return [Row("weights", FAIL, f"{context.named([rank])}: the frozen {name} was changed", "report this")]
    if not any(moved for moved, _ in seen):
        return [
            Row(
                "weights",
                FAIL,
                f"{STEPS} steps changed no weight",
                "look at the learning rate below, and at whether the loss is finite",
            )
        ]
    return [Row("weights", OK, "moved")]


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


# --- save, load, go on --------------------------------------------------------------------------------------------


def resume_rows(context: Context) -> list[Row]:
    """Save, go one step on; load on all ranks, go the same step on: weights and loss must be the same."""
    parts, world = context.parts, context.joined()
    assert parts is not None and context.scratch is not None
    config = loop_config(context.config, context.scratch)
    seconds = {"stall": 0.0, "save": 0.0, "load": 0.0}
    after: list[Weights] = []

    def save() -> None:
        progress = replace(
            _start(context),
            step=STEPS,
            images_seen=STEPS * config.train.global_batch,
            steps_taken=parts.strategy.steps_taken,
            loss_scale=parts.strategy.scaler_state(),
        )
        said: list[str] = []
        parts.checkpoints.say = said.append
        started = time.perf_counter()
        parts.checkpoints.begin(progress, parts.strategy, parts.average)
        _settle(world)
        seconds["stall"] = time.perf_counter() - started
        parts.checkpoints.finish()
        seconds["save"] = time.perf_counter() - started
        if complaints := [line for line in said if not line.startswith("note:")]:
            raise UserError("; ".join(complaints))

    def state() -> tuple[str, str]:
        weights = weights_of(parts)
        after.append(weights)
        return weights.masters_digest(), _state_digest(parts.strategy, parts)

    def load() -> Progress:
        started = time.perf_counter()
        progress = loop.resume(config, world, parts, build.depends_on(context.config, parts.data))
        seconds["load"] = time.perf_counter() - started
        if progress.step != STEPS:
            raise UserError(f"a checkpoint of step {STEPS} was saved, and one of step {progress.step} is found")
        return progress

    def one_step(progress: Progress) -> float:
        probe, _ = make_steps(context, progress, 1)
        return probe.loss_sums[0]

    name, remedy = "resume", "see what it says; a run could not go on from its checkpoints here"
    saved = context.exchange("save", "saving a checkpoint", save, collective=True)
    if rows := context.failures(name, saved, remedy):
        return rows
    at_save = context.exchange("weights", "the saved state", state)
    here = Progress(
        **{
            **_start(context).__dict__,
            "step": STEPS,
            "images_seen": STEPS * config.train.global_batch,
            "steps_taken": parts.strategy.steps_taken,
        }
    )
    undisturbed = context.exchange("steps", "a step without loading", lambda: one_step(here), collective=True)
    end = context.exchange("weights", "the state after it", state)
    loaded = context.exchange("save", "loading the checkpoint", load, collective=True)
    for phase in (at_save, undisturbed, end, loaded):
        if rows := context.failures(name, phase, remedy):
            return rows
    at_load = context.exchange("weights", "the loaded state", state)
    repeated = context.exchange("steps", "a step after loading", lambda: one_step(loaded[0].value), collective=True)
    again = context.exchange("weights", "the state after that", state)
    for phase in (at_load, repeated, again):
        if rows := context.failures(name, phase, remedy):
            return rows
    wrong = [
        f"{context.named([rank])} does not load what was saved: {what}"
        for rank in range(context.size)
        for what, place in (("weights", 0), ("moments, average or count of steps", 1))
        if at_load[rank].value[place] != at_save[rank].value[place]
    ]
    losses = [sum(each.value for each in phase) for phase in (undisturbed, repeated)]
    exact = all(again[rank].value == end[rank].value for rank in range(context.size)) and losses[0] == losses[1]
    apart = abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-12)
    on_gpu = world.device.type == "cuda"
    if not exact and (not on_gpu or apart > _LOSS_RTOL):
        wrong.append(f"the step after loading is another than without it: the losses differ by {apart:.1e}")
    size = sum(path.stat().st_size for path in (context.scratch / "checkpoints").rglob("*") if path.is_file())
    context.checkpoint_bytes = size
    if wrong:
        remedy = "if all rows above are good, do not trust this file system with checkpoints: compare with another"
        return [Row(name, FAIL, "; ".join(wrong[:4]), remedy)]
    how = "bit for bit" if exact else f"to {apart:.0e} of the loss (kernels that add in any order)"
    speed = size / max(seconds["save"], 1e-9) / 1e6
    text = (
        f"{size_text(size)} saved in {seconds['save']:.1f} s ({speed:.0f} MB/s; training waits for "
        f"{seconds['stall']:.1f} s of it), loaded on all ranks in {seconds['load']:.1f} s; the next step is the "
        f"same {how}"
    )
    return [Row(name, OK, text), space_row(context, lambda: _kept_bytes(context.run))]


def _state_digest(strategy: Strategy, parts: Parts) -> str:
    """Of this rank's moments and average, and its count of steps."""
    sums = [
        checksum(tensor) for kind in ("exp_avg", "exp_avg_sq") for tensor in strategy.moments(kind) if len(tensor)
    ]
    sums += [checksum(tensor) for tensor in (parts.average.tensors if parts.average else []) if tensor.numel()]
    return hashlib.sha256(repr([*sums, strategy.steps_taken]).encode()).hexdigest()[:12]


def _kept_bytes(run: Path) -> int:
    return sum(
        file.stat().st_size
        for folder in complete_checkpoints(run).values()
        for file in folder.rglob("*")
        if file.is_file()
    )


def run_rows(context: Context) -> list[Row]:
    """What `finetune train` would find in the run's folder."""
    parts = context.parts
    assert parts is not None

    def look() -> tuple[str, str]:
        if context.rank != 0:
            return OK, ""
        complete = complete_checkpoints(context.run)
        if not complete:
            return OK, f"{context.run} has no checkpoint: a run starts anew"
        step, path = list(complete.items())[-1]
        if context.config.checkpoint.resume == "never":
            return FAIL, f"checkpoint.resume=never, but {path} is there"
        require_same(parts.checkpoints.read(path).depends_on, build.depends_on(context.config, parts.data), path)
        if step >= context.config.train.steps:
            return WARN, f"{context.run} is complete: {step} steps"
        return OK, f"a run goes on from step {step} of {context.config.train.steps}"

    outcomes = context.exchange("save", "looking at the run", look)
    if rows := context.failures("run", outcomes, "put it back, or choose another run.dir"):
        return rows
    result, text = outcomes[0].value
    remedy = {OK: "", WARN: "raise train.steps to go on", FAIL: "choose another run.dir or remove that folder"}
    return [Row("run", result, text, remedy[result])]


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
        start_step=STEPS + 8,
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
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
        name, _, port = host.partition(":")
        with socket.create_connection((name, int(port or 443)), timeout=10):
            return mode

    outcomes = context.exchange("hosts", "W&B", reach)
    if outcomes[0].error:
        text = f"W&B is wanted online and cannot be reached ({first_line(Exception(outcomes[0].error))})"
        return [Row("tracking", WARN, text, "tracker.mode=offline and `wandb sync` later, or tracker=none")]
    return [Row("tracking", OK, f"W&B {outcomes[0].value}")]
