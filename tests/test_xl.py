"""Stable Diffusion XL: its U-Net is told exactly what diffusers' pipeline tells it; training, drawing, resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors import safe_open

from data_tools.encode.encoder import TextCache
from finetune import UserError, sampling
from finetune.batch import Sample
from finetune.components import load_components
from finetune.conditioning import batch_of, call_unet
from finetune.conditioning.text import TextXL
from tests import fakes
from tests.conftest import launch, metrics
from tests.test_train import parts_of

Command = Callable[..., tuple[int, str]]
PROMPTS = ["a red apple", "a smiling face with many words in it that are cut at some place"]
ORIGINAL, CROP, SIZE = (50, 40), (3, 7), (32, 24)


@pytest.fixture(scope="module", params=[True, False], ids=["zeros", "empty"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl") / "model"
    return fakes.tiny_sdxl(folder, force_zeros=request.param)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.tiny_sdxl(tmp_path_factory.mktemp("xl") / "model")


def told(unet: Any) -> list[dict[str, torch.Tensor]]:
    """What the U-Net is called with from now on."""
    calls: list[dict[str, torch.Tensor]] = []

    def note(_: Any, __: Any, named: dict[str, Any]) -> None:
        calls.append({"context": named["encoder_hidden_states"], **named["added_cond_kwargs"]})

    unet.register_forward_pre_hook(note, with_kwargs=True)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("negative", [None, "", "ugly"])
def test_the_unet_is_told_what_diffusers_tells_it(base: Path, negative: str | None) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    theirs = told(pipe.unet)
    sizes = {"original_size": ORIGINAL, "crops_coords_top_left": CROP, "target_size": SIZE}
    named = {"negative_original_size": ORIGINAL, "negative_crops_coords_top_left": CROP}
    pipe(
        PROMPTS, negative_prompt=None if negative is None else [negative] * 2, height=SIZE[0], width=SIZE[1],
        num_inference_steps=1, guidance_scale=3.0, output_type="latent", negative_target_size=SIZE,
        **sizes, **named,
    )  # fmt: skip

    parts = load_components(base)
    ours = told(parts.unet)
    assert isinstance(parts.conditioner, TextXL)
    records = [{"captions": [p], "original_size": [*ORIGINAL], "crop": [*CROP, 32, 24]} for p in PROMPTS]
    batch = batch_of(parts.conditioner, [Sample(record, SIZE) for record in records])
    for drop in (True, False):
        inputs = parts.conditioner.inputs(batch, torch.tensor([drop, drop]), negative or "")
        call_unet(parts.unet, torch.zeros(2, 4, 8, 6), torch.tensor(1), parts.conditioner(inputs))
    zeros = negative == "" and parts.conditioner.zero_null  # diffusers encodes an empty caption that is written out
    for name, tensor in theirs[0].items():
        pair = torch.cat([call[name] for call in ours])
        assert pair.dtype == tensor.dtype == torch.float32
        rows = slice(2, None) if zeros else slice(None)
        assert torch.equal(pair[rows], tensor[rows]), name
    assert ours[0]["time_ids"].tolist() == [[50.0, 40.0, 3.0, 7.0, 32.0, 24.0]] * 2
    assert (ours[0]["context"].abs().max() == 0) == (parts.conditioner.zero_null and not negative)


@torch.no_grad()
def test_a_picture_is_diffusers_picture(base: Path) -> None:
    """Sizes of what is drawn: neither resized nor cut."""
    parts = load_components(base)
    scheduler = sampling.make_scheduler(None, parts.scheduler)
    wanted = [Sample({"captions": [prompt]}, SIZE) for prompt in PROMPTS]
    settings = {"steps": 3, "guidance": 4.0}
    drawn = sampling.generate(
        parts.unet, parts.vae, parts.conditioner, scheduler, parts.latents, wanted, [1, 2], **settings
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(scheduler.config)
    noise = sampling.draw_noise(sampling.generators([1, 2]), (4, 8, 6))
    theirs = pipe(
        PROMPTS, height=32, width=24, latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="pt"
    ).images
    ours = torch.cat([image.reshape(-1, 3, 32, 24) for image in drawn]) / 2 + 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_sizes_are_the_records(xl: Path) -> None:
    text = load_components(xl).conditioner
    read = text.read(Sample({"captions": ["x"], "original_size": [90, 70], "crop": [1, 2, 32, 32]}, (32, 32)))
    np.testing.assert_array_equal(read["time_ids"], np.array([90, 70, 1, 2, 32, 32], dtype=np.float32))
    assert read["time_ids"].dtype == np.float32
    for broken in ({"original_size": [90]}, {"crop": "no"}, {"original_size": None}):
        with pytest.raises(UserError, match="original_size is"):
            text.read(Sample({"captions": ["x"], **broken}, (32, 32)))


@pytest.fixture
def words(overrides: list[str], pipeline: Path, xl: Path) -> list[str]:
    return [*overrides, f"model.pretrained={xl}", f"model.vae={pipeline}", "model.unet={}", "train.precision=fp32"]


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bits_and_draws(
    words: list[str], command: Command, tmp_path: Path, xl: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    words = [*words, "checkpoint.every=1"]
    assert command("train", *words, "train.steps=2")[0] == 0
    assert command("train", *words, f"run.dir={other}", "train.steps=1")[0] == 0
    assert command("train", *words, f"run.dir={other}", "train.steps=2")[0] == 0
    assert metrics(run)[-1]["loss"] == metrics(other)[-1]["loss"]
    parts = load_components(run, weights="raw")
    assert isinstance(parts.conditioner, TextXL)
    changed = load_components(xl).unet.state_dict()
    learnt = [name for name, tensor in parts.unet.state_dict().items() if not torch.equal(tensor, changed[name])]
    assert any(name.startswith("add_embedding.") for name in learnt)
    assert (
        command("sample", str(run), "--prompt", "a cat", "--steps", "1", "--out", str(tmp_path / "a.png"))[0] == 0
    )


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_both_text_encoders_are_trained_as_far_as_they_are_used(words: list[str], adapter: str) -> None:
    _, parts = parts_of(words, "model.train_text_encoder=true", f"adapter={adapter}")
    names = [name for name in parts.strategy.parameters if not name.startswith("unet.")]
    assert {name.split(".")[0] for name in names} == {"text_encoder", "text_encoder_2"}
    trained = [name for name in names if name.startswith("text_encoder.")]
    assert any("layers.0." in name for name in trained) and not any("layers.1." in name for name in trained)
    batch = next(iter(parts.data.held_out))
    loss = parts.model.train().to(torch.device("cpu"))
    inputs = parts.model.conditioner.inputs(batch, torch.zeros(len(batch), dtype=torch.bool))
    loss("loss", batch.moments, inputs, batch.clock).mean().backward()
    touched = {name for name, p in parts.strategy.parameters.items() if p.grad is not None}
    assert touched == set(parts.strategy.parameters)


def test_weights_of_trained_text_encoders_are_drawn_with(
    words: list[str], command: Command, tmp_path: Path, xl: Path
) -> None:
    assert command("train", *words, "model.train_text_encoder=true", "train.steps=1")[0] == 0
    parts = load_components(tmp_path / "run", weights="raw")
    before = load_components(xl)
    for name, module in parts.text.parts().items():  # type: ignore[union-attr]
        own = before.text.parts()[name].state_dict()  # type: ignore[union-attr]
        assert any(not torch.equal(tensor, own[key]) for key, tensor in module.state_dict().items())
    for module, own in zip(parts.text.unused(), before.text.unused(), strict=True):  # type: ignore[union-attr]
        assert all(map(torch.equal, module.state_dict().values(), own.state_dict().values()))
    out = tmp_path / "a.png"
    assert command("sample", str(tmp_path / "run"), "--prompt", "a cat", "--steps", "1", "--out", str(out))[0] == 0
    assert out.is_file()
    files = sorted((tmp_path / "run").glob("checkpoints/*/weights/text_encoder_2/model.safetensors"))
    with safe_open(files[-1], framework="pt") as file:
        assert "text_projection.weight" in file.keys()  # noqa: SIM118


def test_an_adapter_of_unet_and_both_text_encoders_is_diffusers_too(
    words: list[str], command: Command, tmp_path: Path, xl: Path
) -> None:
    settings = ["adapter=lora", "adapter.rank=2", "model.train_text_encoder=true", "optim.lr=1e-2"]
    assert command("train", *words, *settings, "train.steps=2", "checkpoint.every=1")[0] == 0
    run = tmp_path / "run"
    ours, before = load_components(run, weights="raw").text, load_components(xl).text
    assert isinstance(ours, TextXL) and isinstance(before, TextXL)
    ids, ids_2 = ours.tokenize(PROMPTS), ours.tokenize_2(PROMPTS)
    wanted = ours.encode(ids, ids_2)
    assert all(
        (one - other).abs().max() > 1e-3 for one, other in zip(wanted, before.encode(ids, ids_2), strict=True)
    )
    for form, out in (("lora", tmp_path / "lora"), ("kohya", tmp_path / "lora.safetensors")):
        assert command("export", str(run), "--weights", "raw", "--format", form, "--out", str(out))[0] == 0
        pipe = StableDiffusionXLPipeline.from_pretrained(xl)
        pipe.load_lora_weights(out)
        with torch.no_grad():
            context, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
        torch.testing.assert_close(wanted, (context, pooled), rtol=0, atol=1e-5)
        assert any("lora" in name for name, _ in pipe.unet.named_parameters())
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        heads = {key.split("_")[1] for key in file.keys()}  # noqa: SIM118
    assert heads == {"unet", "te1", "te2"}


def test_states_of_captions_are_not_kept_of_one_encoder_alone(xl: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is of Stable Diffusion XL.*leave it out"):
        TextCache(str(xl), torch.device("cpu"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["true", "false"])
def test_ddp_and_zero3_agree_over_two_processes(words: list[str], trained: str, tmp_path: Path) -> None:
    losses = []
    for strategy in ("ddp", "zero3"):
        run = tmp_path / strategy
        more = [f"run.dir={run}", f"strategy={strategy}", f"model.train_text_encoder={trained}", "train.steps=3"]
        done = launch(2, [*words, *more])
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append([line["loss"] for line in metrics(run)])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
