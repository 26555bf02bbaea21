"""Checkpoints of a first-stage run, in the layout of `finetune.checkpoint`: complete or absent, never half.

    checkpoints/step-00001000/
        weights/vae/  ema/vae/      diffusers layout, float32 (ema/ only when EMA is on)
        optimizer/                  exp_avg.safetensors, exp_avg_sq.safetensors, by parameter name
        discriminator/              once it has been trained: weights.safetensors, and the moments of its own AdamW
        trainer.json                written last: the clock, what the run depends on, sha256 of every file

A folder is written under a temporary name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune import UserError
from finetune.autoencoder.discriminator import Adversary
from finetune.autoencoder.zero import Moments, ShardedAdamW
from finetune.checkpoint import followed, newest_whole, prune, publish, write_record
from finetune.distributed import MOMENTS
from finetune.models.autoencoder import FirstStage
from finetune.models.weight_files import write_weights

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


class SaveError(UserError):
    """The disk is full or refuses; the checkpoints before are untouched."""


class Trained(NamedTuple):
    """A model as it is saved: all its weights, and the moments of those that are trained."""

    weights: Mapping[str, Tensor]
    moments: Moments


def checkpoint_dir(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def write_vae(folder: Path, vae: FirstStage, weights: Mapping[str, Tensor]) -> None:
    """Write `weights` with the config of `vae` as a diffusers model folder."""
    folder.mkdir(parents=True)
    vae.save_config(folder)
    _save_tensors(folder / WEIGHTS_NAME, weights)


def save(
    run: Path,
    vae: FirstStage,
    trained: Trained,
    average: Mapping[str, Tensor] | None,
    judge: Trained | None,
    *,
    step: int,
    images_seen: int,
    depends_on: Mapping[str, Any],
    begun_from: str | None = None,
    keep: int,
    passed_over: set[Path],
) -> Path:
    """Save everything that the run is at `step`, then remove all but the last `keep` checkpoints.

    Args:
        average: of all weights, where there is one; judge: the discriminator, when it has made a step.
        begun_from: the checkpoint that `checkpoint.resume` named, where one did.
        passed_over: broken ones, as `latest` and `named` found them.

    Raises:
        SaveError: the disk is full or refuses; the checkpoints before this one stay.
    """
    final = checkpoint_dir(run, step)
    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_vae(temporary / "weights" / "vae", vae, trained.weights)
        if average is not None:
            write_vae(temporary / "ema" / "vae", vae, average)
        _save_moments(temporary / "optimizer", trained.moments)
        if judge is not None:
            _save_moments(temporary / "discriminator", judge.moments)
            _save_tensors(temporary / "discriminator" / "weights.safetensors", judge.weights)
        record = {"step": step, "images_seen": images_seen, "depends_on": dict(depends_on)}
        write_record(temporary, record | {"begun_from": begun_from})
        publish(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"cannot save {final}: {error}; the checkpoints before it are untouched") from None
    try:
        prune(run, keep, step, passed_over)
    except OSError as error:
        warnings.warn(
            f"old checkpoints in {final.parent} cannot be removed: {error.strerror or error}", stacklevel=2
        )
    return final


def latest(run: Path, passed_over: set[Path]) -> tuple[Path, dict[str, Any]] | None:
    """A run's newest whole checkpoint, see `newest_whole`, and its record; `passed_over` gets the broken ones.

    What a killed writer left under temporary names is removed.

    Raises:
        UserError: it is of another command.
    """
    for leftover in (run / "checkpoints").glob(".*-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = newest_whole(run, passed_over=passed_over)
    if folder is None:
        return None
    return folder, _record(folder, str(folder), "choose another run.dir")


def named(run: Path, path: str, passed_over: set[Path]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint folder `path`, or what came of it in this run (see `followed`), and its record.

    `passed_over` gets the broken ones.

    Raises:
        UserError: it is not whole, or of another command.
    """
    folder, begun_from = followed(run, path, passed_over)
    record = _record(folder, f"checkpoint.resume={path}", "choose another folder")
    return folder, record | {"begun_from": begun_from}


def _record(folder: Path, named: str, remedy: str) -> dict[str, Any]:
    """What a checkpoint says of its run.

    Raises:
        UserError: it is of another command.
    """
    if not (folder / "weights" / "vae" / WEIGHTS_NAME).is_file():
        raise UserError(f"{named} is no checkpoint of finetune autoencoder: it has no weights/vae; {remedy}")
    record: dict[str, Any] = json.loads((folder / "trainer.json").read_text())
    return record


@torch.no_grad()
def restore(
    folder: Path,
    step: int,
    vae: FirstStage,
    average: Mapping[str, Tensor] | None,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary | None,
    adversary_steps: int,
) -> None:
    """Copy a checkpoint into the model, its average and the optimizers, keeping their devices and layouts.

    Args:
        adversary: the discriminator of the run, if it has one.
        adversary_steps: how many steps it has made by `step`; at 0 or below it has not begun.

    Raises:
        UserError: the run had no discriminator when this was saved.
    """
    weights = load_file(folder / "weights" / "vae" / WEIGHTS_NAME)
    parameters = dict(vae.named_parameters())
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    _restore_moments(folder / "optimizer", trained, optimizer, step)
    if average is not None:
        source = folder / "ema" / "vae" / WEIGHTS_NAME
        saved = load_file(source) if source.exists() else weights  # EMA was switched on later
        for name, tensor in average.items():
            tensor.copy_(saved[name])
    if adversary is not None and adversary_steps > 0:
        path = folder / "discriminator" / "weights.safetensors"
        if not path.exists():
            raise UserError(
                f"{folder} has no discriminator, and this run has had one for {adversary_steps} steps; put "
                "loss.discriminator_weight back or choose another run.dir"
            )
        weights = load_file(path)
        judging = dict(adversary.model.named_parameters())
        for name, parameter in judging.items():
            parameter.copy_(weights[name])
        _restore_moments(folder / "discriminator", judging, adversary.optimizer, adversary_steps)


def _save_moments(folder: Path, moments: Moments) -> None:
    folder.mkdir()
    for part in MOMENTS:
        _save_tensors(folder / f"{part}.safetensors", moments[part])


def _restore_moments(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> None:
    """What `_save_moments` wrote, of an optimizer that had made `steps` steps: those of its own parameters."""
    moments = {part: load_file(folder / f"{part}.safetensors") for part in MOMENTS}
    fused = any(group.get("fused") for group in optimizer.param_groups)
    holders = optimizer.masters if isinstance(optimizer, ShardedAdamW) else parameters
    for name, parameter in holders.items():
        # AdamW keeps its step counter on the CPU unless it is fused.
        counter = torch.tensor(float(steps), device=parameter.device if fused else "cpu")
        optimizer.state[parameter] = {
            "step": counter,
            **{part: torch.zeros_like(parameter).copy_(moments[part][name]) for part in MOMENTS},
        }


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_weights(path, {name: tensor.detach().float() for name, tensor in tensors.items()})
