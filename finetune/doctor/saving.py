"""Save, load and go on: on the file system that the run will use, and in the run's own folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from finetune import UserError, build, loop
from finetune.checkpoint import Progress, followed, require_same
from finetune.checkpoint.snapshots import kept_averages
from finetune.distributed import Strategy
from finetune.doctor.context import Context, settle
from finetune.doctor.files import space_row
from finetune.doctor.steps import STEPS, at_start, loop_config, make_steps
from finetune.doctor.table import FAIL, OK, WARN, Row
from finetune.doctor.weights import checksum, weights_of
from finetune.loop import Parts
from finetune.memory import size_text
from finetune.posthoc import complete_snapshots
from finetune.runs import complete_checkpoints, latest_checkpoint

_LOSS_RTOL = 1e-3  # of a repeated step on a GPU, whose kernels may add in another order


class _Trial:
    """What each rank does to save, load and go on; `seconds` is what that took."""

    def __init__(self, context: Context, parts: Parts, scratch: Path) -> None:
        self.context, self.parts, self.world = context, parts, context.joined()
        self.config = loop_config(context.config, scratch)
        self.seconds = {"stall": 0.0, "save": 0.0, "load": 0.0}

    def progress(self) -> Progress:
        """Of the run as it is now, after the doctor's steps."""
        return replace(
            at_start(self.context),
            step=STEPS,
            images_seen=STEPS * self.config.train.global_batch,
            steps_taken=self.parts.strategy.steps_taken,
            loss_scale=self.parts.strategy.scaler_state(),
            optimizer=self.parts.strategy.counts(),
        )

    def save(self) -> None:
        parts, progress = self.parts, self.progress()
        said: list[str] = []
        parts.checkpoints.say = said.append
        started = time.perf_counter()
        parts.checkpoints.begin(progress, parts.strategy, parts.averages)
        settle(self.world)
        self.seconds["stall"] = time.perf_counter() - started
        parts.checkpoints.finish()
        self.seconds["save"] = time.perf_counter() - started
        if complaints := [line for line in said if not line.startswith("note:")]:
            raise UserError("; ".join(complaints))

    def load(self) -> Progress:
        started = time.perf_counter()
        depends_on = build.depends_on(self.context.config, self.parts)
        progress = loop.resume(self.config, self.world, self.parts, depends_on)
        self.seconds["load"] = time.perf_counter() - started
        if progress.step != STEPS:
            raise UserError(f"a checkpoint of step {STEPS} was saved, and one of step {progress.step} is found")
        return progress

    def one_step(self, progress: Progress) -> float:
        """The loss, summed over this rank's samples."""
        probe, _ = make_steps(self.context, progress, 1)
        return probe.loss_sums[0]

    def state(self) -> tuple[str, str]:
        """Digests of weights, and of all that goes with them."""
        return weights_of(self.parts, gather=False).masters_digest(), _state_digest(self.parts.strategy, self.parts)


def resume_rows(context: Context) -> list[Row]:
    """Save, go one step on; load on all ranks, go the same step on: weights and loss must be the same."""
    parts, scratch = context.parts, context.scratch
    assert parts is not None and scratch is not None
    trial = _Trial(context, parts, scratch)
    name, remedy = "resume", "see what it says; a run could not go on from its checkpoints here"
    saved = context.exchange("save", "saving a checkpoint", trial.save, collective=True)
    if rows := context.failures(name, saved, remedy):
        return rows
    at_save = context.exchange("weights", "the saved state", trial.state)
    here = trial.progress()
    undisturbed = context.exchange("steps", "a step without loading", lambda: trial.one_step(here), collective=True)
    end = context.exchange("weights", "the state after it", trial.state)
    loaded = context.exchange("save", "loading the checkpoint", trial.load, collective=True)
    for phase in (at_save, undisturbed, end, loaded):
        if rows := context.failures(name, phase, remedy):
            return rows
    at_load = context.exchange("weights", "the loaded state", trial.state)
    repeated = context.exchange(
        "steps", "a step after loading", lambda: trial.one_step(loaded[0].value), collective=True
    )
    again = context.exchange("weights", "the state after that", trial.state)
    for phase in (at_load, repeated, again):
        if rows := context.failures(name, phase, remedy):
            return rows
    checkpoint = latest_checkpoint(scratch)
    record = json.loads((checkpoint / "trainer.json").read_text())
    context.checkpoint_bytes = _bytes([checkpoint])
    context.snapshot_bytes = _bytes(checkpoint / folder for folder in kept_averages(record))
    wrong = [
        f"{context.named([rank])} does not load what was saved: {what}"
        for rank in range(context.size)
        for what, place in (("weights", 0), ("moments, average or count of steps", 1))
        if at_load[rank].value[place] != at_save[rank].value[place]
    ]
    losses = [sum(each.value for each in phase) for phase in (undisturbed, repeated)]
    is_exact = all(again[rank].value == end[rank].value for rank in range(context.size)) and losses[0] == losses[1]
    apart = abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-12)
    if not is_exact and (trial.world.device.type != "cuda" or apart > _LOSS_RTOL):
        wrong.append(f"the step after loading is another than without it: the losses differ by {apart:.1e}")
    if wrong:
        remedy = "if all rows above are good, do not trust this file system with checkpoints: compare with another"
        return [Row(name, FAIL, "; ".join(wrong[:4]), remedy)]
    how = "bit for bit" if is_exact else f"to {apart:.0e} of the loss (kernels that add in any order)"
    text = f"{_rate_text(context.checkpoint_bytes, trial.seconds)}; the next step is the same {how}"
    return [Row(name, OK, text), space_row(context, lambda: _kept_bytes(context.run))]


def _rate_text(size: int, seconds: Mapping[str, float]) -> str:
    """How long a checkpoint of `size` bytes takes."""
    speed = size / max(seconds["save"], 1e-9) / 1e6
    return (
        f"{size_text(size)} saved in {seconds['save']:.1f} s ({speed:.0f} MB/s; training waits for "
        f"{seconds['stall']:.1f} s of it), loaded on all ranks in {seconds['load']:.1f} s"
    )


def _state_digest(strategy: Strategy, parts: Parts) -> str:
    """Of this rank's moments and averages, and what its optimizer counts."""
    tensors = [tensor for kind in strategy.settings.of_a_weight for tensor in strategy.moments(kind)]
    tensors += [tensor for own in strategy.own_state() for tensor in own.values()]
    tensors += [tensor for average in parts.averages for tensor in average.tensors]
    sums = [checksum(tensor) for tensor in tensors if tensor.numel()]
    return hashlib.sha256(repr([*sums, strategy.steps_taken, strategy.counts()]).encode()).hexdigest()[:12]


def _kept_bytes(run: Path) -> int:
    """Of a run's checkpoints and snapshots."""
    return _bytes([*complete_checkpoints(run).values(), *complete_snapshots(run).values()])


def _bytes(folders: Iterable[Path]) -> int:
    """Of all files in these folders; one that several share, by links, counts once."""
    files = [file.stat() for folder in folders for file in folder.rglob("*") if file.is_file()]
    return sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())


def run_rows(context: Context) -> list[Row]:
    """What `finetune train` would find in the run's folder."""
    parts = context.parts
    assert parts is not None

    def look() -> tuple[str, str]:
        if context.rank != 0:
            return OK, ""
        wanted, complete = context.config.checkpoint.resume, complete_checkpoints(context.run)
        if wanted not in ("auto", "never"):
            path, _ = followed(context.run, wanted)
        elif not complete:
            return OK, f"{context.run} has no checkpoint: a run starts anew"
        else:
            path = list(complete.values())[-1]
        if wanted == "never":
            return FAIL, f"checkpoint.resume=never, but {path} is there"
        saved = parts.checkpoints.read(path)
        require_same(saved.depends_on, build.depends_on(context.config, parts), path)
        step = saved.step
        if step >= context.config.train.steps:
            return WARN, f"{context.run} is complete: {step} steps"
        where = "" if path.parent.parent == context.run else f" ({path})"
        return OK, f"a run goes on from step {step}{where} of {context.config.train.steps}"

    outcomes = context.exchange("save", "looking at the run", look)
    if rows := context.failures("run", outcomes, "put it back, or choose another run.dir"):
        return rows
    result, text = outcomes[0].value
    remedy = {OK: "", WARN: "raise train.steps to go on", FAIL: "choose another run.dir or remove that folder"}
    return [Row("run", result, text, remedy[result])]
