"""Schedulers of models that are trained further, compared with what a run will do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from finetune import UserError
from finetune.config import SchedulerConfig
from finetune.models.schedulers import FLOW_SCHEDULER, differences, load_scheduler, sampler_config
from tests.test_train import parts_of

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize(
    ("own", "prediction", "says"),
    [
        (SD, "epsilon", []),
        (SD | {"prediction_type": "v_prediction"}, "v", []),
        (SD | {"prediction_type": "v_prediction"}, "epsilon", ["predicts v, not objective.prediction=epsilon"]),
        (SD | {"prediction_type": "sample"}, "flow", ["predicts x0, not objective.prediction=flow"]),
        ({"_class_name": FLOW_SCHEDULER}, "flow", []),
        ({"_class_name": FLOW_SCHEDULER}, "v", ["predicts flow, not objective.prediction=v"]),
        (SD | {"beta_end": 0.02}, "epsilon", ["has beta_end=0.02, not model.scheduler.beta_end=0.012"]),
        (
            SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            "v",
            [
                "has rescale_betas_zero_snr=True, not model.scheduler.rescale_betas_zero_snr=False "
                "(objective=v_zero_snr has)"
            ],
        ),
        (SD | {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}, "epsilon", []),
        ({}, "v", []),
        (
            {"_class_name": FLOW_SCHEDULER, "num_train_timesteps": 500},
            "flow",
            ["has num_train_timesteps=500, not model.scheduler.num_train_timesteps=1000"],
        ),
    ],
)
def test_what_a_model_was_trained_for_is_compared(own: dict[str, object], prediction: str, says: list[str]) -> None:
    assert differences(own, asdict(SchedulerConfig()), prediction) == says


def test_a_model_that_never_saw_pure_noise_is_told_from_a_run_that_shows_it() -> None:
    zero_snr = asdict(SchedulerConfig(rescale_betas_zero_snr=True))
    v = SD | {"prediction_type": "v_prediction"}
    says = ["has rescale_betas_zero_snr=False, not model.scheduler.rescale_betas_zero_snr=True"]
    assert differences(v, zero_snr, "v") == says
    assert differences(v | {"rescale_betas_zero_snr": True}, zero_snr, "v") == []


def test_a_model_that_does_not_say_what_it_predicts_predicts_noise(tmp_path: Path) -> None:
    """As Stable Diffusion 1.5, whose configuration is older than the setting; diffusers takes it so."""
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SD | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}))
    own, settings = load_scheduler(tmp_path), asdict(SchedulerConfig())
    assert differences(own, settings, "epsilon") == []
    assert differences(own, settings, "v") == ["predicts epsilon, not objective.prediction=v"]


def test_a_model_of_other_noise_levels_is_not_sampled_as_one_of_betas() -> None:
    """DDIM's own betas were taken, which no model here was trained with."""
    own = {"_class_name": "EDMEulerScheduler", "sigma_max": 120.0, "prediction_type": "v_prediction"}
    with pytest.raises(UserError, match=r"EDM's noise levels \(EDMEulerScheduler\) can't be sampled here"):
        sampler_config(own)
    assert differences(own, asdict(SchedulerConfig()), "v") == ["has EDM's noise levels, not model.scheduler's"]


def test_a_run_that_trains_otherwise_is_told(pipeline: Path, overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, f"model.pretrained={pipeline}", "model.unet={}"]
    assert not any("learn this anew" in notice for notice in parts_of(words)[1].notices)
    notices = parts_of(words, "objective=v", "model.scheduler.beta_end=0.02")[1].notices
    (line,) = [notice for notice in notices if "learn this anew" in notice]
    assert "predicts epsilon, not objective.prediction=v; has beta_end=0.012" in line
    with pytest.raises(UserError, match="has no scheduler that can be read"):
        load_scheduler(tmp_path)
