"""A single file holds what was exported, and diffusers draws from it what it draws from the folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune import UserError, export, sample
from finetune.components import Components, load_components
from finetune.models import ldm_keys, single_file, weight_files
from tests import fakes
from tests.conftest import write_latents

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion, whose latents have the scale that such files mean."""
    return scaled(fakes.base_model(tmp_path_factory.mktemp("base") / "model"), 0.18215)


def scaled(model: Path, scale: float) -> Path:
    """A model whose latents are scaled so."""
    config = model / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": scale}))
    return model


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


def test_diffusers_draws_the_same_from_a_file_of_xl(tmp_path: Path) -> None:
    model = scaled(fakes.tiny_sdxl(tmp_path / "xl"), 0.13025)
    out = tmp_path / "xl.safetensors"
    assert export.main([str(model), "--format", "single-file", "--out", str(out)]) == 0
    single = StableDiffusionXLPipeline.from_single_file(
        out, config=str(model), local_files_only=True, torch_dtype=torch.float32, add_watermarker=False
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        state, wanted = getattr(single, name).state_dict(), getattr(pipe, name).state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in wanted.items()), name
    # Both under one scheduler: the file names none. The transposed projection is multiplied in another order.
    single.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    np.testing.assert_allclose(drawn(single), drawn(pipe), rtol=0, atol=1e-5)
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


def test_a_file_is_drawn_from_and_exported_to_a_folder(base: Path, tmp_path: Path) -> None:
    file, folder, tokenizer = tmp_path / "model.safetensors", tmp_path / "folder", ["--tokenizer", str(base)]
    export.main([str(base), "--format", "single-file", "--out", str(file)])
    export.main([str(file), "--format", "diffusers", "--out", str(folder), *tokenizer])
    pipes = [StableDiffusionPipeline.from_pretrained(source) for source in (base, folder)]
    np.testing.assert_array_equal(drawn(pipes[1]), drawn(pipes[0]))
    pictures = [tmp_path / "one.png", tmp_path / "other.png"]
    settings = ["--prompt", "a red apple", "--steps", "2", "--device", "cpu"]
    sample.main([str(file), *settings, *tokenizer, "--out", str(pictures[0])])
    sample.main([str(folder), *settings, "--out", str(pictures[1])])
    np.testing.assert_array_equal(*(np.asarray(Image.open(picture)) for picture in pictures))


def sampled_as(model: Path, **settings: Any) -> Path:
    """A model whose scheduler says so."""
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return model


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("settings", "marks"),
    [
        ({}, set()),
        ({"prediction_type": "v_prediction"}, {"v_pred"}),
        ({"prediction_type": "v_prediction", **ZERO_SNR}, {"v_pred", "ztsnr"}),
    ],
)
def test_a_file_of_xl_has_the_marks_of_its_prediction(
    settings: dict[str, Any], marks: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sampled_as(scaled(fakes.tiny_sdxl(tmp_path / "xl"), 0.13025), **settings)
    out, plain = tmp_path / "xl.safetensors", tmp_path / "plain.safetensors"
    assert export.main([str(model), "--format", "single-file", "--out", str(out), "--dtype", "float16"]) == 0
    assert "it predicts" not in capsys.readouterr().out
    state = load_file(out)
    assert {key for key in state if "." not in key} == marks
    save_file(state, plain)  # without the metadata that only we read
    assert single_file.open_file(plain).scheduler().items() >= settings.items()
    StableDiffusionXLPipeline.from_single_file(out, config=str(model), local_files_only=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"prediction_type": "v_prediction"},
            "it predicts v, and .* in WebUI by a model.yaml .*`parameterization: v`",
        ),
        (
            {"prediction_type": "v_prediction", **ZERO_SNR},
            "it predicts v at zero terminal SNR, and other tools may take it to predict the noise: ",
        ),
        ({"prediction_type": "sample"}, "it predicts x0, and .*: set it, in ComfyUI by ModelSamplingDiscrete"),
    ],
)
def test_a_prediction_that_no_tensor_says_is_noted(
    settings: dict[str, Any], says: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = shutil.copytree(base, tmp_path / "model"), tmp_path / "model.safetensors"
    argv = [str(model), "--format", "single-file", "--out", str(out)]
    export.main(argv)
    assert "it predicts" not in capsys.readouterr().out
    sampled_as(model, **settings)
    export.main([*argv, "--overwrite"])
    assert re.search(says, capsys.readouterr().out)
    assert not [key for key in load_file(out) if "." not in key]


def weights_of(parts: Components) -> dict[str, torch.Tensor]:
    modules = {"unet": parts.unet, "vae": parts.vae, **parts.conditioner.parts()}
    return {f"{n}.{k}": v for n, module in modules.items() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("kind", [pytest.param("sd", marks=pytest.mark.slow), "xl"])
def test_a_file_is_trained_on_exported_and_read_again(
    kind: str, base: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    """There is no CLIP tokenizer here: the model's own folder is named."""
    model = scaled(fakes.tiny_sdxl(tmp_path / "xl"), 0.13025) if kind == "xl" else base
    first, last = tmp_path / "first.safetensors", tmp_path / "last.safetensors"
    assert command("export", str(model), "--format", "single-file", "--out", str(first))[0] == 0
    words = [
        "model.unet={}",
        f"model.tokenizer={model}",
        f"data.shards={write_latents(tmp_path / 'latents', first)}",
    ]
    code, line = command("train", *overrides, *words, f"model.pretrained={first}", "train.steps=2")
    assert code == 0, line
    run = tmp_path / "run"
    assert command("export", str(run), "--weights", "raw", "--format", "single-file", "--out", str(last))[0] == 0
    trained, read = load_components(run, weights="raw"), single_file.open_file(last)
    wanted = weights_of(trained)
    modules = {"unet": read.unet(), "vae": read.autoencoder(), "text_encoder": read.text_encoder()}
    modules |= {"text_encoder_2": read.text_encoder_2()} if kind == "xl" else {}
    found = {f"{n}.{k}": v for n, module in modules.items() for k, v in module.state_dict().items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    before = single_file.open_file(first).unet().state_dict()
    assert any(not torch.equal(found[f"unet.{name}"], tensor) for name, tensor in before.items())
    assert read.scheduler() == trained.scheduler


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
        with weight_files.whole_file(out) as file:
            file.write_bytes(b"half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert (out.read_bytes(), len(list(tmp_path.iterdir()))) == (b"old", 1)
