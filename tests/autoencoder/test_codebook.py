"""The first stage with a codebook: its loss, its use, and its way from training to samples."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file
from torch.nn import functional as F

from finetune import UserError, rng
from finetune.autoencoder import bottleneck
from finetune.autoencoder.bottleneck import PenaltyWeights, nearest, perplexity, spread_codebook
from finetune.autoencoder.build import build
from finetune.autoencoder.config import AutoencoderConfig
from finetune.autoencoder.measure import measure_latents
from finetune.autoencoder.step import step_once
from finetune.autoencoder.train import main
from finetune.models.autoencoder import decode, encode_moments, encoder_sha256, load_autoencoder, to_signed
from tests.autoencoder.runs import arguments, assert_same_run, losses

SHAPE = AutoencoderConfig(
    block_out_channels=[8, 16],
    layers_per_block=1,
    norm_num_groups=4,
    mid_block_add_attention=False,
    latent_channels=3,
    codebook_size=24,
)
CODEBOOK = ["model.latent_channels=3", "model.codebook_size=24"]
DISCRIMINATOR = ["loss.discriminator_weight=0.5", "loss.discriminator_layers=1", "loss.discriminator_width=8"]


def pictures(count: int, size: int = 16) -> torch.Tensor:
    return rng.uniform(7, "test pictures", torch.arange(count), (3, size, size)) * 2 - 1


def moved() -> VQModel:
    """A model whose every gradient matters and whose entries lie among the latents."""
    vae = build(SHAPE, seed=3)
    assert isinstance(vae, VQModel)
    with torch.no_grad():
        for i, parameter in enumerate(vae.parameters()):
            parameter += 0.05 * rng.normal(0, "move", torch.tensor([i]), tuple(parameter.shape))[0]
        vae.quantize.embedding.weight.copy_(rng.normal(0, "entries", torch.arange(24), (3,)))
    return vae


@pytest.mark.parametrize("commitment", [0.25, 2.0])
def test_a_step_equals_one_written_with_diffusers_quantizer(commitment: float) -> None:
    """With its later, corrected form of the loss, `legacy=False`, which weighs the encoder's term."""
    vae = moved()
    reference = copy.deepcopy(vae)
    image = pictures(2)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.1)
    weights = PenaltyWeights(codebook=0.7, commitment=commitment)
    got = step_once(vae, optimizer, image, None, penalty=weights, max_grad_norm=0.5, bf16=False)

    reference.quantize.legacy, reference.quantize.beta = False, commitment
    z = reference.encode(image).latents
    decoded = reference.decode(z)
    expected = F.l1_loss(decoded.sample, image) + 0.7 * decoded.commit_loss
    own = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.1)
    expected.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    indices = reference.quantize(z)[2][2]
    torch.testing.assert_close(got["loss"], expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got["codebook"], decoded.commit_loss.detach() / (1 + commitment), rtol=1e-5, atol=0)
    assert torch.equal(got["uses_K"], torch.bincount(indices.flatten(), minlength=24))
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad, rtol=1e-5, atol=1e-6)
    own.step()
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-5, atol=1e-5)


def test_the_nearest_entry_is_found_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    z_BCHW = rng.normal(0, "z", torch.arange(2), (3, 5, 7))
    codebook_KC = rng.normal(0, "entries", torch.arange(24), (3,))
    indices_BHW = nearest(z_BCHW, codebook_KC)
    for b, y, x in np.ndindex(2, 5, 7):
        distances = ((codebook_KC - z_BCHW[b, :, y, x]) ** 2).sum(dim=1)
        assert indices_BHW[b, y, x] == distances.argmin()
    monkeypatch.setattr(bottleneck, "_DISTANCES_AT_A_TIME", 24 * 9)
    assert torch.equal(nearest(z_BCHW, codebook_KC), indices_BHW)


def test_perplexity_counts_entries_that_are_used_alike() -> None:
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([0, 9])) == 1.0
    assert perplexity(torch.tensor([3, 1])) == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("count", [4, 1])
def test_the_codebook_begins_with_latents_and_is_used(count: int) -> None:
    """From 256 cells and more; and from 64, fewer than the 100 entries."""
    vae = build(AutoencoderConfig(**{**vars(SHAPE), "codebook_size": 100}), seed=0)
    assert isinstance(vae, VQModel)
    image = pictures(count)
    spread_codebook(vae, [image], seed=0)
    entries_KC = vae.quantize.embedding.weight.detach().clone()
    cells_NC = encode_moments(vae, image).chunk(2, dim=1)[0].permute(0, 2, 3, 1).reshape(-1, 3)
    of_cells = min(100, len(cells_NC))
    assert torch.cdist(entries_KC[:of_cells], cells_NC).min(dim=1).values.max() < 1e-3
    assert len(entries_KC.unique(dim=0)) == 100
    pixels = ((image + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    _, uses_K = measure_latents(vae, [pixels])
    assert uses_K is not None and uses_K.sum() == len(cells_NC)
    assert (uses_K > 0).sum() > 0.6 * of_cells
    spread_codebook(vae, [image], seed=0)
    assert torch.equal(vae.quantize.embedding.weight, entries_KC)
    spread_codebook(vae, [image], seed=1)
    assert not torch.equal(vae.quantize.embedding.weight, entries_KC)


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    main(arguments(shards, run, *CODEBOOK, *DISCRIMINATOR, "train.steps=4", "checkpoint.every=2"))
    return run


def test_a_run_with_a_codebook_goes_on_to_the_same_bits(shards: Path, finished: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(finished, resumed)
    for gone in (resumed / "vae", resumed / "checkpoints/step-00000004"):
        shutil.rmtree(gone)
    main(arguments(shards, resumed, *CODEBOOK, *DISCRIMINATOR, "train.steps=4", "checkpoint.every=2"))
    assert_same_run(finished, resumed, 4, discriminator=True)
    for row in losses(finished):
        assert 1 <= row["perplexity"] <= 24 and "kl" not in row
        adversarial = row["adversarial_weight"] * row["adversarial"]
        assert row["loss"] == pytest.approx(row["l1"] + 1.25 * row["codebook"] + adversarial, rel=1e-4)


def test_what_is_saved_quantizes_when_it_decodes(shards: Path, finished: Path) -> None:
    vae = load_autoencoder(finished / "vae")
    assert isinstance(vae, VQModel)
    trained = load_file(finished / "checkpoints/step-00000004/ema/vae/diffusion_pytorch_model.safetensors")
    assert torch.equal(vae.quantize.embedding.weight, trained["quantize.embedding.weight"])
    image = pictures(2)
    mean, std = encode_moments(vae, image).chunk(2, dim=1)
    with torch.no_grad():
        torch.testing.assert_close(mean, vae.encode(image).latents)
        torch.testing.assert_close(decode(vae, mean), vae(image).sample.clamp(-1, 1))
    assert not std.any()
    # Anything that is nearest to the same entry gives the same picture.
    codebook_KC = vae.quantize.embedding.weight
    entries = F.embedding(nearest(mean, codebook_KC), codebook_KC)
    torch.testing.assert_close(decode(vae, entries.permute(0, 3, 1, 2)), decode(vae, mean))
    known = encoder_sha256(vae)
    vae.quantize.embedding.weight += 1  # the codebook is the decoder's
    assert encoder_sha256(vae) == known

    from finetune.autoencoder.pictures import Pictures

    held = Pictures(str(shards), size=None, held_out=64, seed=0, multiple=2, cache_bytes=0, readers=1)
    vae = load_autoencoder(finished / "vae")
    means = [
        encode_moments(vae, to_signed(held.read(bucket, ids))).chunk(2, dim=1)[0].flatten()
        for bucket, ids in enumerate(held.train_ids)
    ]
    result = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["latent_std"] == pytest.approx(torch.cat(means).std(correction=0).item(), rel=0.05)
    assert vae.config.scaling_factor == pytest.approx(1 / result["latent_std"])
    assert 0 < result["codebook_used"] <= 1 and 1 <= result["codebook_perplexity"] <= 24


def test_decoder_only_trains_the_codebook_and_keeps_the_latents(
    shards: Path, finished: Path, tmp_path: Path
) -> None:
    run, given = tmp_path / "run", finished / "vae"
    more = (f"model.pretrained={given}", "train.decoder_only=true", "train.steps=2", "optim.warmup_images=0")
    main(arguments(shards, run, *more))
    before, after = load_autoencoder(given), load_autoencoder(run / "vae")
    assert encoder_sha256(after) == encoder_sha256(before)
    assert after.config.scaling_factor == before.config.scaling_factor
    for name, tensor in after.state_dict().items():
        kept = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(tensor, before.state_dict()[name]) == kept, name


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            [*CODEBOOK, "loss.kl_weight=1e-3"],
            "loss.kl_weight=0.001, but the VQModel that is trained has no post",
        ),
        (["loss.commitment=1"], "loss.commitment=1.0, but the AutoencoderKL that is trained has no codebook"),
        (["model.codebook_size=1"], "model.codebook_size=1 must be at least 2"),
        (
            ["model.pretrained=GIVEN", "model.codebook_size=9"],
            "codebook_size=9, but GIVEN has 24: leave it out",
        ),
    ],
)
def test_settings_of_the_other_kind_are_refused(
    shards: Path, finished: Path, tmp_path: Path, more: list[str], line: str
) -> None:
    given = str(finished / "vae")
    with pytest.raises(UserError) as caught:
        main(arguments(shards, tmp_path / "run", *(word.replace("GIVEN", given) for word in more)))
    assert line.replace("GIVEN", given) in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("factor", "entries", "channels"), [(2, 2048, 2), (4, 8192, 3), (8, 16384, 4), (16, 16384, 8), (32, 16384, 16)]
)
def test_models_have_the_codebooks_of_the_paper(factor: int, entries: int, channels: int) -> None:
    """Rombach et al. 2022, table 8, the rows of VQ kind with the largest codebook for each factor."""
    from finetune.autoencoder import config as schema

    config, _ = schema.load(["data.shards=x", f"model=vq_f{factor}"])
    with torch.device("meta"):
        vae = build(config.model, seed=0)
        latents = vae.encode(torch.empty(1, 3, 64, 96)).latents
    assert latents.shape == (1, channels, 64 // factor, 96 // factor)
    assert vae.quantize.embedding.weight.shape == (entries, channels)
