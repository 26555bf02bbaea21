"""The patch discriminator, its losses and its weight, against the papers' formulas written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from finetune import rng
from finetune.autoencoder.bottleneck import PenaltyWeights
from finetune.autoencoder.build import build
from finetune.autoencoder.config import AutoencoderConfig
from finetune.autoencoder.discriminator import Adversary, PatchDiscriminator, smallest_side
from finetune.autoencoder.loss import adaptive_weight, generator_loss, hinge_discriminator_loss
from finetune.autoencoder.step import step_once

TINY = AutoencoderConfig(
    block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
)


def pictures(count: int, size: int = 16, purpose: str = "pictures") -> torch.Tensor:
    return rng.uniform(7, purpose, torch.arange(count), (3, size, size)) * 2 - 1


def moved_autoencoder() -> torch.nn.Module:
    vae = build(TINY, seed=3)
    with torch.no_grad():  # residual branches start at zero: move them, so that every gradient matters
        for i, parameter in enumerate(vae.parameters()):
            parameter += 0.05 * rng.normal(0, "move", torch.tensor([i]), tuple(parameter.shape))[0]
    return vae


def test_it_is_the_70_pixel_discriminator_of_the_paper() -> None:
    """Isola et al. 2017, appendix 6.1.2: C64-C128-C256-C512, 4x4, leaky ReLU 0.2, no norm at first and last."""
    layers = list(PatchDiscriminator(3, 64, seed=0).blocks)
    convolutions = [module for module in layers if isinstance(module, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [
        (3, 64), (64, 128), (128, 256), (256, 512), (512, 1)
    ]  # fmt: skip
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1, 1]
    assert {(c.kernel_size, c.padding) for c in convolutions} == {((4, 4), (1, 1))}
    assert [m.negative_slope for m in layers if isinstance(m, torch.nn.LeakyReLU)] == [0.2] * 4
    assert [m.num_features for m in layers if isinstance(m, torch.nn.BatchNorm2d)] == [128, 256, 512]


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_a_logit_sees_its_patch_and_no_more(layers: int, field: int) -> None:
    """16 and 70 pixels are the paper's. By gradients, with the norms (which see the whole batch) taken out."""
    model = PatchDiscriminator(layers, 2, seed=1).double()
    convolutions = torch.nn.Sequential(*[m for m in model.blocks if not isinstance(m, torch.nn.BatchNorm2d)])
    side = 2 * field + 2**layers
    image = torch.zeros(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    logits = convolutions(image)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    seen = image.grad.abs().sum(dim=(0, 1)).nonzero()
    assert (seen.max(dim=0).values - seen.min(dim=0).values + 1).tolist() == [field, field]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_picture_has_one_logit(layers: int) -> None:
    model, side = PatchDiscriminator(layers, 2, seed=0), smallest_side(layers)
    assert model(pictures(2, side)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        model(pictures(2, side - 2**layers))


def test_it_is_its_parameters_and_they_are_drawn_from_the_seed() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (PatchDiscriminator(2, 32, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(one.state_dict()) == {name for name, _ in one.named_parameters()}  # no running statistics
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.blocks[0].weight, other.blocks[0].weight)
    weights = torch.cat([m.weight.flatten() for m in one.blocks if isinstance(m, torch.nn.Conv2d)])
    norms = torch.cat([m.weight for m in one.blocks if isinstance(m, torch.nn.BatchNorm2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert norms.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(one.eval()(pictures(2)), one.train()(pictures(2)))


def test_hinge_losses_at_known_logits() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, -0.5, 1.0])
    # max(0, 1 - real) = 0, 0.5, 2; max(0, 1 + fake) = 0, 0.5, 2
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(2.5 / 3)
    assert generator_loss(fake).item() == pytest.approx(2.5 / 3)


def test_with_the_adaptive_weight_both_losses_pull_equally_on_the_last_layer() -> None:
    layer = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reconstruction, adversarial = (layer * 3).sin().sum(), 1e-3 * layer.exp().mean()
    weight = adaptive_weight(reconstruction, adversarial, layer, delta=0.0)
    assert not weight.requires_grad
    (pull,) = torch.autograd.grad(reconstruction, layer)
    (push,) = torch.autograd.grad(weight * adversarial, layer)
    assert push.norm().item() == pytest.approx(pull.norm().item(), rel=1e-5)


def test_a_flat_discriminator_leaves_the_weight_finite() -> None:
    layer = torch.ones(3, requires_grad=True)
    assert adaptive_weight(layer.sum(), 0.0 * layer.sum(), layer).item() == pytest.approx(3**0.5 / 1e-6)


def test_a_step_against_the_discriminator_equals_one_written_out() -> None:
    vae, model = moved_autoencoder(), PatchDiscriminator(2, 8, seed=1)
    vae_2, model_2 = copy.deepcopy(vae), copy.deepcopy(model)
    image, eps = pictures(3), rng.normal(0, "eps", torch.arange(3), (4, 8, 8))

    def optimizers(*modules: torch.nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(m.parameters(), lr=1e-3, betas=(0.5, 0.9)) for m in modules]

    own, judging = optimizers(vae, model)
    got = step_once(
        vae,
        own,
        image,
        eps,
        penalty=PenaltyWeights(kl=1e-2),
        max_grad_norm=0.5,
        bf16=False,
        adversary=Adversary(model, judging, 0.7),
    )

    own, judging = optimizers(vae_2, model_2)
    distribution = vae_2.encode(image).latent_dist
    recon = vae_2.decode(distribution.mean + distribution.std * eps).sample
    l1 = F.l1_loss(recon, image)
    adversarial = -model_2(recon).mean()
    last = vae_2.decoder.conv_out.weight
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (l1, adversarial)]
    weight = 0.7 * pulls[0] / (pulls[1] + 1e-6)
    total = l1 + 1e-2 * distribution.kl().mean() / image[0].numel() + weight * adversarial
    total.backward()
    torch.nn.utils.clip_grad_norm_(vae_2.parameters(), 0.5)
    own.step()
    model_2.zero_grad()  # the autoencoder's step is not the discriminator's
    verdict = 0.5 * (F.relu(1 - model_2(image)).mean() + F.relu(1 + model_2(recon.detach())).mean())
    verdict.backward()
    torch.nn.utils.clip_grad_norm_(model_2.parameters(), 0.5)
    judging.step()

    expected = {"loss": total, "adversarial": adversarial, "adversarial_weight": weight, "discriminator": verdict}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in ((vae, vae_2), (model, model_2)):
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-4, atol=2e-5)


def test_it_learns_to_tell_pictures_from_reconstructions() -> None:
    model = PatchDiscriminator(1, 8, seed=0)
    adversary = Adversary(model, torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.5, 0.9)), 1.0)
    real = pictures(4)
    blurred = F.avg_pool2d(real, 3, stride=1, padding=1)
    losses = [adversary.learn(real, blurred, max_grad_norm=0.0, bf16=False).item() for _ in range(60)]
    assert losses[0] == pytest.approx(1.0, abs=0.1)
    assert losses[-1] < 0.1
    assert model(real).mean() > 0.5 > -0.5 > model(blurred).mean()
