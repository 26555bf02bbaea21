"""Configurations of samplers, in diffusers' terms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from finetune import UserError
from finetune.models.single_file import open_file
from finetune.models.sources import fetch, fetch_file

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # samples models that predict the flow


def scheduler_config(settings: Mapping[str, Any], prediction: str = "epsilon") -> dict[str, Any]:
    """The configuration of the scheduler that samples what a U-Net predicts, in diffusers' terms.

    A `DDIMScheduler` as Stable Diffusion has it; for `flow` a `FlowMatchEulerDiscreteScheduler`, told by
    `_class_name`.

    Args:
        settings: `beta_start`, `beta_end`, `beta_schedule`, `num_train_timesteps`, and any other argument of
            diffusers' schedulers.
        prediction: what the U-Net predicts: epsilon, v (v_prediction), x0 (sample) or flow.
    """
    if prediction == "flow":
        kept = {key: settings[key] for key in ("num_train_timesteps", "shift") if key in settings}
        return {"_class_name": FLOW_SCHEDULER, **kept}
    fixed = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    names = {"v": "v_prediction", "x0": "sample"}
    settings = {key: value for key, value in settings.items() if not key.startswith("_") and key != "shift"}
    return {**fixed, **settings, "prediction_type": names.get(prediction, prediction)}


def sampler_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a DDIM sampler can take from any scheduler's configuration; its offset and clipping are SD's.

    Raises:
        UserError: the model has no such noise levels.
    """
    if _is_edm(config):
        raise UserError(
            f"a model of EDM's noise levels ({config['_class_name']}) can't be sampled here: take another"
        )
    if config.get("_class_name") == FLOW_SCHEDULER:
        return scheduler_config(config, "flow")
    known = set(DDIMScheduler._get_init_keys(DDIMScheduler))
    kept = {key: value for key, value in config.items() if key in known}
    # StableDiffusionPipeline sets these two in whatever it loads.
    kept |= {"steps_offset": 1, "clip_sample": False}
    return scheduler_config(kept, kept.get("prediction_type", "epsilon"))


def most_steps(config: Mapping[str, Any]) -> int:
    """How many sampling steps a schedule has: `leading` timesteps begin at Stable Diffusion's offset."""
    offset = int(config.get("steps_offset", 0)) if config.get("timestep_spacing", "leading") == "leading" else 0
    return int(config["num_train_timesteps"]) - offset


def load_scheduler(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a model's own scheduler, whichever it is; of a single file, see `SingleFile.scheduler`.

    Raises:
        UserError: there is none that can be read.
    """
    if (file := fetch_file(source, revision)) is not None:
        return open_file(file).scheduler()
    path = fetch(source, "scheduler", revision) / "scheduler" / "scheduler_config.json"
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{source} has no scheduler that can be read: {path}") from error
    return {"prediction_type": "epsilon", **read}  # diffusers' default: files as old as SD 1.5's don't say it


def differences(own: Mapping[str, Any], settings: Mapping[str, Any], prediction: str) -> list[str]:
    """In which ways a model was trained otherwise than a run will train it, in words, as far as the model says.

    Args:
        own: of the model (see `load_scheduler`).
        settings, prediction: of the run (see `scheduler_config`).
    """
    names = {"v_prediction": "v", "sample": "x0"}
    predicts = str(own.get("prediction_type", prediction))
    predicts = "flow" if own.get("_class_name") == FLOW_SCHEDULER else names.get(predicts, predicts)
    found = [] if predicts == prediction else [f"predicts {predicts}, not objective.prediction={prediction}"]
    has_betas = "flow" not in (predicts, prediction)
    # A flow's U-Net is told its times in these terms too.
    for key in ("num_train_timesteps", *(("beta_start", "beta_end", "beta_schedule") if has_betas else ())):
        if key in own and own[key] != settings[key]:
            found.append(f"has {key}={own[key]}, not model.scheduler.{key}={settings[key]}")
    if _is_edm(own):
        found.append("has EDM's noise levels, not model.scheduler's")
    key = "rescale_betas_zero_snr"
    has, wanted = bool(own.get(key)), bool(settings[key])  # a model of before diffusers had it does not say
    if own and has_betas and has != wanted:
        remedy = " (objective=v_zero_snr has)" if has else ""
        found.append(f"has {key}={has}, not model.scheduler.{key}={wanted}{remedy}")
    return found


def _is_edm(config: Mapping[str, Any]) -> bool:
    """Whether there are no betas, but the noise levels of Karras et al. 2022 (arXiv 2206.00364), as CosXL has."""
    return str(config.get("_class_name")).startswith("EDM")
