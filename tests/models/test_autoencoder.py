"""The first stage against diffusers' own calls, and what is known of its weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from finetune import UserError
from finetune.models import autoencoder
from finetune.models.autoencoder import (
    decode,
    encode_moments,
    encoder_info,
    encoder_sha256,
    load_autoencoder,
)


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(path / "vae")
    return path


def test_a_pipeline_folder_and_its_vae_are_the_same(folder: Path) -> None:
    a, b = load_autoencoder(folder), load_autoencoder(folder / "vae")
    assert not a.training
    assert not any(parameter.requires_grad for parameter in a.parameters())
    for name, weight in a.state_dict().items():
        assert torch.equal(weight, b.state_dict()[name])
        assert torch.equal(weight, tiny_vae().state_dict()[name])


def test_moments_and_pictures_are_diffusers(folder: Path) -> None:
    vae = load_autoencoder(folder)
    images = torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = encode_moments(vae, images)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        assert moments.shape == (2, 8, 16, 8)
        torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], dim=1))
        reference = vae.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(decode(vae, moments[:, :4]), reference)
    assert moments.dtype == torch.float32
    assert encode_moments(load_autoencoder(folder, dtype=torch.bfloat16), images).dtype == torch.float32


def test_the_sum_knows_the_encoder_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    vae = load_autoencoder(folder)
    known = encoder_sha256(vae)
    tiny_vae().half().save_pretrained(tmp_path / "half")
    assert encoder_sha256(load_autoencoder(tmp_path / "half")) == known
    assert encoder_sha256(load_autoencoder(folder, dtype=torch.float16)) == known
    with torch.no_grad():
        vae.decoder.conv_in.weight.add_(1)
        assert encoder_sha256(vae) == known
        vae.quant_conv.bias[0] += 0.5
    changed = encoder_sha256(vae)
    assert changed != known
    assert encoder_sha256(tiny_vae(1)) not in (known, changed)


def test_info_says_where_the_vae_is(folder: Path, tmp_path: Path) -> None:
    vae = load_autoencoder(folder)
    root = tmp_path / "a" / "latents"
    info = encoder_info(vae, folder, root)
    assert info.source.startswith("..")
    assert Path(info.locate(root)).resolve() == folder.resolve()
    assert encoder_info(vae, folder / "vae", folder).source == "./vae"
    assert encoder_info(vae, "owner/name", root).source == "owner/name"
    assert (info.scale, info.shift, info.channels, info.downsample) == (0.18215, 0.0, 4, 2)
    assert (info.dtype, info.pixel_range, info.sha256) == ("float32", (-1.0, 1.0), encoder_sha256(vae))


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "vae", tmp_path / "broken")
    os.truncate(tmp_path / "broken" / "diffusion_pytorch_model.safetensors", 5000)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (tmp_path / "empty").mkdir()
    for source, says in [
        (tmp_path / "nowhere", "no autoencoder at"),
        (tmp_path / "empty", "neither config.json nor vae/config.json"),
        (tmp_path / "unet" / "config.json", "is a file"),
        (tmp_path / "unet", "is a UNet2DConditionModel, not an AutoencoderKL or a VQModel"),
        (tmp_path / "broken", "cannot load an autoencoder"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            load_autoencoder(source)
        assert str(source) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_name_that_the_hub_does_not_have_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(source: str, part: str, revision: str | None) -> Path:
        assert (source, part, revision) == ("typo/name", "vae", "v2")
        raise UserError("typo/name: no such folder, and no such model on the Hugging Face Hub")

    monkeypatch.setattr(autoencoder, "fetch", absent)
    with pytest.raises(UserError, match=r"^no autoencoder at typo/name: no such folder, and no such model"):
        load_autoencoder("typo/name", revision="v2")


def test_channelwise_normalisation_is_refused(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    vae.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="channel by channel"):
        load_autoencoder(tmp_path)
