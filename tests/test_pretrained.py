"""What a run takes of a pretrained model, and what it refuses beside one."""

from __future__ import annotations

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
    says = f"the latents in {shards} have scale 0.18215 and shift 0, those of {pipeline} 0.5 and 0: encode with --vae"
    with pytest.raises(UserError, match=says) as caught:
        parts_of(settings, *pretrained)
    assert 'write "scale": 0.5 and "shift": 0.0 into manifest.json there' in str(caught.value)
    manifest.save(shards)
    assert parts_of(settings, *pretrained)[1].data.space.scale == 0.5
