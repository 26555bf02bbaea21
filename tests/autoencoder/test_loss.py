"""The first stage's loss against diffusers' and torch's public API."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from finetune import rng
from finetune.autoencoder.bottleneck import PenaltyWeights, run
from finetune.autoencoder.build import build
from finetune.autoencoder.config import AutoencoderConfig
from finetune.autoencoder.loss import first_stage_loss, kl_to_standard_normal
from finetune.autoencoder.step import step_once

TINY = AutoencoderConfig(
    block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
)


def pictures(count: int, size: int = 16) -> torch.Tensor:
    return rng.uniform(7, "test pictures", torch.arange(count), (3, size, size)) * 2 - 1


def test_kl_is_that_of_torch_distributions() -> None:
    mean, logvar = rng.normal(0, "kl", torch.arange(6), (4, 5, 5)).chunk(2)
    ours = kl_to_standard_normal(mean, logvar)
    q = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    p = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    reference = torch.distributions.kl_divergence(q, p).sum(dim=(1, 2, 3))
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kl_weight", [1e-6, 0.3])
def test_a_step_equals_one_written_with_the_public_api(kl_weight: float) -> None:
    vae = build(TINY, seed=3)
    with torch.no_grad():  # residual branches start at zero: move them, so that every gradient matters
        for i, parameter in enumerate(vae.parameters()):
            parameter += 0.05 * rng.normal(0, "move", torch.tensor([i]), tuple(parameter.shape))[0]
    reference = copy.deepcopy(vae)
    image, eps = pictures(2), rng.normal(0, "eps", torch.arange(2), (4, 8, 8))

    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.1)
    got = step_once(vae, optimizer, image, eps, penalty=PenaltyWeights(kl=kl_weight), max_grad_norm=0.5, bf16=False)

    # The straight way: diffusers' posterior with its own KL, sums over a picture, mean over the batch.
    distribution = reference.encode(image).latent_dist
    recon = reference.decode(distribution.mean + distribution.std * eps).sample
    per_picture = torch.nn.functional.l1_loss(recon, image, reduction="none").sum(dim=(1, 2, 3))
    expected = ((per_picture + kl_weight * distribution.kl()) / image[0].numel()).mean()
    own = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.1)
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    gradients = {name: p.grad.clone() for name, p in reference.named_parameters()}
    own.step()

    torch.testing.assert_close(got["loss"], expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got["kl"], distribution.kl().mean().detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got["grad_norm"], norm, rtol=1e-5, atol=1e-6)
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-5, atol=1e-5)


def test_the_kl_term_reaches_the_gradients() -> None:
    image = pictures(2)
    mean = torch.zeros(2, 4, 8, 8, requires_grad=True)
    logvar = torch.full((2, 4, 8, 8), 1.0, requires_grad=True)
    first_stage_loss(image, image, 2.0 * kl_to_standard_normal(mean, logvar)).total.sum().backward()
    # d KL / d logvar = (exp(logvar) - 1) / 2 for each latent element
    expected = torch.full_like(logvar, 2.0 * (torch.e - 1) / 2)
    torch.testing.assert_close(logvar.grad, expected)


def test_loss_does_not_depend_on_the_picture_size() -> None:
    """A picture tiled four times, with its latents, has the same loss per element."""
    image, recon = pictures(2), pictures(4)[2:]
    moments, eps = rng.normal(0, "m", torch.arange(2), (8, 8, 8)), rng.normal(1, "e", torch.arange(2), (4, 8, 8))
    totals = []
    for tiles in (1, 2):
        vae = build(TINY, seed=0)
        tiled = [tensor.repeat(1, 1, tiles, tiles) for tensor in (image, recon, moments, eps)]
        vae.encode = lambda x, m=tiled[2]: SimpleNamespace(latent_dist=DiagonalGaussianDistribution(m))
        vae.decode = lambda z, r=tiled[1]: SimpleNamespace(sample=r)
        passed = run(vae, tiled[0], tiled[3], PenaltyWeights(kl=1e-2))
        totals.append(first_stage_loss(tiled[0], passed.recon, passed.penalty).total)
    torch.testing.assert_close(*totals)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = build(TINY, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is not moved
    torch.manual_seed(12)
    again, other = build(TINY, seed=3), build(TINY, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.encoder.conv_in.weight, other.encoder.conv_in.weight)


def test_at_the_start_signals_keep_their_size() -> None:
    """Variance-preserving weights: neither latents nor reconstructions vanish or blow up, at any depth."""
    deep = AutoencoderConfig(block_out_channels=[16, 16, 16, 16], layers_per_block=3, norm_num_groups=4)
    vae, image = build(deep, seed=0), pictures(4, 32)
    with torch.no_grad():
        mean = vae.encode(image).latent_dist.mean
        recon = vae.decode(torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))).sample
    assert 0.2 < mean.std().item() < 2.0
    assert 0.2 < recon.std().item() < 2.0


def test_initial_logvar_sets_the_posterior_at_the_start() -> None:
    config = copy.copy(TINY)
    plain = build(config, seed=3)
    config.initial_logvar = -6.0
    shifted = build(config, seed=3)
    image = pictures(2)
    assert isinstance(plain, AutoencoderKL)
    with torch.no_grad():
        a, b = plain.encode(image).latent_dist, shifted.encode(image).latent_dist
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.logvar - 6.0, b.logvar)
