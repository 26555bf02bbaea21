"""What a run takes of a pretrained model, and what it refuses beside one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import AutoencoderKL

from finetune import UserError
from finetune.data.shards import Manifest
from tests.test_train import parts_of

Command = Callable[..., tuple[int, str]]


@pytest.mark.parametrize("is_named", [False, True], ids=["the model's autoencoder", "model.vae"])
def test_latents_of_another_scale_than_the_models_are_refused(
    overrides: list[str], latents: Path, pipeline: Path, tmp_path: Path, is_named: bool
) -> None:
    """As those are that were encoded with the same autoencoder's bare file; a model built anew takes any."""
    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae")
    vae.register_to_config(scaling_factor=0.18215)
    vae.save_pretrained(tmp_path / "vae")
    shards = tmp_path / "latents"
    shutil.copytree(latents, shards)
    manifest = Manifest.load(shards)
    assert manifest.encoder is not None
    replace(manifest, encoder=replace(manifest.encoder, scale=0.18215)).save(shards)
    settings = [*overrides, f"data.shards={shards}", *([f"model.vae={tmp_path / 'vae'}"] if is_named else [])]
    if is_named:
        assert parts_of(settings)[1].data.space.scale == 0.18215
    pretrained = [f"model.pretrained={pipeline}", "model.unet={}"]
    says = f"the latents in {shards} have scale 0.18215 and shift 0, those of {pipeline} 0.5 and 0: encode"
    with pytest.raises(UserError, match=says) as caught:
        parts_of(settings, *pretrained)
    assert 'write "scale": 0.5 and "shift": 0.0 into manifest.json there' in str(caught.value)
    manifest.save(shards)
    assert parts_of(settings, *pretrained)[1].data.space.scale == 0.5


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["model.unet.cross_attention_dim=64"],
            "model.unet.cross_attention_dim=64 has no effect: the U-Net of .* 16;",
        ),
        (
            ["model.unet.block_out_channels=[5,7]"],
            r"block_out_channels=\[5, 7\] has no effect: .* has \[16, 32\]; leave",
        ),
        (["model.unet.dropout=0.5"], "model.unet.dropout=0.5 has no effect: the U-Net of model.pretrained has 0.0"),
        (["model.unet={layers_per_block: 2}"], "model.unet.layers_per_block=2 has no effect"),
        (["model.text_encoder.max_length=33"], "model.text_encoder.max_length=33 has no effect: .* leave it out"),
        (
            ["optim.text_encoder_lr=1e-3"],
            "optim.text_encoder_lr=0.001 has no effect, .*: set it to null, or model.train_text_encoder=true",
        ),
    ],
)
def test_settings_that_do_nothing_beside_a_pretrained_model_are_refused(
    overrides: list[str], pipeline: Path, more: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parts_of(overrides, f"model.pretrained={pipeline}", *more)
    assert "\n" not in str(caught.value)


def test_a_pretrained_models_own_values_may_be_said_and_those_of_a_choice_are_left_out(
    overrides: list[str], pipeline: Path
) -> None:
    """The fixture says some of the pipeline's; model=tiny, the default, says others of a U-Net built anew."""
    config, parts = parts_of(overrides, f"model.pretrained={pipeline}", "model.unet.layers_per_block=1")
    assert config.model.unet == {"block_out_channels": [16, 32], "attention_head_dim": 2, "layers_per_block": 1}
    assert parts.model.unet.config.cross_attention_dim == 16
    config, _ = parts_of(overrides, f"model.pretrained={pipeline}", "model.unet={}")
    assert config.model.unet == {}
    learning = ["model.train_text_encoder=true", "optim.text_encoder_lr=1e-3"]
    assert parts_of(overrides, f"model.pretrained={pipeline}", *learning)[0].optim.text_encoder_lr == 1e-3


def test_a_run_that_was_begun_with_other_sizes_of_no_effect_goes_on(
    overrides: list[str], pipeline: Path, tmp_path: Path, command: Command
) -> None:
    """Checkpoints of before have model.text_encoder.* of a pretrained model's run, whatever a choice said."""
    settings = [*overrides, f"model.pretrained={pipeline}"]
    assert command("train", *settings, "train.steps=1") == (0, "")
    (path,) = (tmp_path / "run" / "checkpoints").glob("*/trainer.json")
    record = json.loads(path.read_text())
    assert not any(key.startswith("model.text_encoder.") for key in record["depends_on"])
    record["depends_on"]["model.text_encoder.max_length"] = 33
    path.write_text(json.dumps(record))
    assert command("train", *settings, "train.steps=2") == (0, "")
