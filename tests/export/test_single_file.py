"""A single file holds what was exported, and diffusers draws from it what it draws from the folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from finetune import UserError, export
from finetune.export import folder
from finetune.models import ldm_keys
from tests import fakes


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion, whose latents have the scale that such files mean."""
    made = fakes.base_model(tmp_path_factory.mktemp("base") / "model")
    config = made / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.18215}))
    return made


def drawn(pipe: StableDiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    return pipe("a red apple", latents=noise, **settings).images


def test_diffusers_draws_the_same_from_the_file(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert export.main([str(base), "--format", "single-file", "--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    pipe = StableDiffusionPipeline.from_pretrained(base)
    single = StableDiffusionPipeline.from_single_file(
        out, config=str(base), local_files_only=True, safety_checker=None, torch_dtype=torch.float32
    )
    np.testing.assert_array_equal(drawn(single), drawn(pipe))
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1"
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"


def test_a_run_with_a_lora_is_merged_and_weights_have_the_dtype(base: Path, tmp_path: Path) -> None:
    run = fakes.lora_run(tmp_path / "run", base)
    out = tmp_path / "style.safetensors"
    export.main([str(run), "--format", "single-file", "--out", str(out), "--dtype", "float16"])
    state = load_file(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    plain = ldm_keys.unet_to_ldm(fakes.unet().state_dict(), fakes.unet().config)
    changed = {key for key, tensor in plain.items() if not torch.equal(tensor.half(), state[key])}
    assert changed and all(".attn" in key for key in changed)


def test_what_a_file_cannot_say_is_refused(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    other = fakes.base_model(tmp_path / "other")
    for line, argv in {
        "which a single file cannot say": [str(other), "--out", str(out)],
        "ends in .safetensors": [str(base), "--out", str(tmp_path / "model.ckpt")],
    }.items():
        with pytest.raises(UserError, match=line):
            export.main([*argv, "--format", "single-file"])
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match="is there already"):
        export.main([str(base), "--format", "single-file", "--out", str(out)])
    assert out.read_bytes() == b"mine"


def test_a_failure_leaves_the_earlier_file(tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"old")

    def fail() -> None:
        with folder.whole_file(out) as file:
            file.write_bytes(b"half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert (out.read_bytes(), len(list(tmp_path.iterdir()))) == (b"old", 1)
