"""Training that starts from a given autoencoder: all of it, or its decoder alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from finetune import UserError, rng
from finetune.autoencoder.build import build
from finetune.autoencoder.config import AutoencoderConfig
from finetune.autoencoder.train import main
from finetune.models.autoencoder import encode_moments, encoder_sha256, load_autoencoder
from tests.autoencoder.runs import arguments, assert_same_run, losses

SHAPE = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder whose scale and shift no measurement would find."""
    vae = build(AutoencoderConfig(**SHAPE, mid_block_add_attention=False, latent_channels=3), seed=11)
    with torch.no_grad():  # residual branches start at zero: move them
        for i, parameter in enumerate(vae.parameters()):
            parameter += 0.05 * rng.normal(0, "move", torch.tensor([i]), tuple(parameter.shape))[0]
    vae.register_to_config(scaling_factor=0.31, shift_factor=0.07)
    folder = tmp_path_factory.mktemp("given") / "vae"
    vae.save_pretrained(folder)
    return folder


def moments(vae: AutoencoderKL) -> torch.Tensor:
    pictures = rng.uniform(5, "pictures", torch.arange(4), (3, 16, 24)) * 2 - 1
    return encode_moments(vae, pictures)


def test_decoder_only_keeps_latents_scale_and_shift_to_the_bit(shards: Path, given: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = (f"model.pretrained={given}", "train.decoder_only=true", "checkpoint.every=2", "optim.lr=1e-2")
    main(arguments(shards, run, *more, "train.steps=4", "optim.warmup_images=0"))
    before, after = load_autoencoder(given), load_autoencoder(run / "vae")
    assert torch.equal(moments(after), moments(before))
    assert encoder_sha256(after) == encoder_sha256(before)
    assert (after.config.scaling_factor, after.config.shift_factor) == (0.31, 0.07)
    for name, tensor in after.state_dict().items():  # weight decay would move even a weight without a gradient
        kept = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(tensor, before.state_dict()[name]) == kept, name
    trained = load_file(run / "checkpoints/step-00000004/optimizer/exp_avg.safetensors")
    assert {name.split(".")[0] for name in trained} == {"decoder", "post_quant_conv"}
    result = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert "latent_std" not in result


def test_decoder_only_goes_on_to_the_same_bits_wherever_the_given_lies(
    shards: Path, given: Path, tmp_path: Path
) -> None:
    more = ("train.decoder_only=true", "checkpoint.every=2", "train.steps=4", "loss.discriminator_weight=0.5")
    more += ("loss.discriminator_layers=1", "loss.discriminator_width=8")
    straight, resumed, moved = tmp_path / "straight", tmp_path / "resumed", tmp_path / "moved"
    main(arguments(shards, straight, f"model.pretrained={given}", *more))
    shutil.copytree(straight, resumed)
    for gone in (resumed / "vae", resumed / "checkpoints/step-00000004"):
        shutil.rmtree(gone)
    shutil.copytree(given, moved)
    main(arguments(shards, resumed, f"model.pretrained={moved}", *more))
    assert_same_run(straight, resumed, 4, discriminator=True)

    other = build(AutoencoderConfig(**SHAPE, mid_block_add_attention=False, latent_channels=3), seed=12)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"model.pretrained \(weights' sha256\) is another now"):
        main(arguments(shards, resumed, f"model.pretrained={tmp_path / 'other'}", *more))


def test_all_of_a_given_autoencoder_is_trained_from_its_weights_on(
    shards: Path, given: Path, tmp_path: Path
) -> None:
    """With so low a rate that it stays where it was, and its scale is measured anew."""
    run = tmp_path / "run"
    main(arguments(shards, run, f"model.pretrained={given}", "train.steps=2", "optim.lr=1e-6"))
    before, after = load_autoencoder(given).state_dict(), load_autoencoder(run / "vae").state_dict()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0.0, atol=1e-5)
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith("encoder."))
    result = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["scaling_factor"] == pytest.approx(1 / result["latent_std"])
    assert load_autoencoder(run / "vae").config.scaling_factor == pytest.approx(result["scaling_factor"])
    assert result["scaling_factor"] != pytest.approx(0.31, rel=0.01)
    assert [row["step"] for row in losses(run)] == [1, 2]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["model.latent_channels=16"], "model.latent_channels=16, but {given} has 3: leave it out"),
        (["model.block_out_channels=[8,8]"], "model.block_out_channels=[8, 8], but {given} has [8, 16]"),
        (["model.pretrained=nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_the_given_autoencoder_is_refused(
    shards: Path, given: Path, tmp_path: Path, more: list[str], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        main(arguments(shards, tmp_path / "run", f"model.pretrained={given}", *more))
    assert line.format(given=given) in str(caught.value)
    assert "\n" not in str(caught.value)
