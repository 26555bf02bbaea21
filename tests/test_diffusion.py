"""Schedules, targets, weights and losses against diffusers, torch, and what the papers say, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from finetune import diffusion

SD = (0.00085, 0.012, 1000)
TIMES = torch.tensor([0, 1, 17, 100, 250, 500, 750, 998, 999])


def schedule(zero_snr: bool = False) -> diffusion.Schedule:
    alpha_bar_T = diffusion.alphas_cumprod(diffusion.betas(*SD, "scaled_linear"))
    return diffusion.variance_preserving(diffusion.zero_terminal_snr(alpha_bar_T) if zero_snr else alpha_bar_T)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn[0], drawn[1]


def peer(**settings: object) -> DDPMScheduler:
    """diffusers' scheduler, whose table is made float64."""
    made = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear", **settings)
    made.alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
    return made


@pytest.mark.parametrize("name", diffusion.BETA_SCHEDULES)
def test_betas_and_alpha_bars_are_those_of_diffusers(name: str) -> None:
    reference = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule=name)
    betas_T = diffusion.betas(*SD, name)
    assert betas_T.dtype == torch.float64
    # diffusers keeps float32: it agrees to that, and with its own formula in float64 to the last bits.
    torch.testing.assert_close(betas_T.float(), reference.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        diffusion.alphas_cumprod(betas_T).float(), reference.alphas_cumprod, rtol=2e-5, atol=0
    )
    exact = np.linspace(0.00085, 0.012, 1000)
    if name == "scaled_linear":
        exact = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(betas_T.numpy(), exact, rtol=1e-14)
    np.testing.assert_allclose(diffusion.alphas_cumprod(betas_T).numpy(), np.cumprod(1 - exact), rtol=1e-12)


def test_the_default_schedule_is_stable_diffusions() -> None:
    alpha_bar_T = diffusion.alphas_cumprod(diffusion.betas(*SD, "scaled_linear"))
    assert alpha_bar_T[0].item() == pytest.approx(0.99915, abs=1e-9)
    assert alpha_bar_T[999].item() == pytest.approx(0.00466, abs=1e-5)
    assert (alpha_bar_T.diff() < 0).all()


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    betas_T = diffusion.betas(*SD, "scaled_linear")
    alpha_bar_T = diffusion.zero_terminal_snr(diffusion.alphas_cumprod(betas_T))
    assert alpha_bar_T[999].item() == 0
    assert alpha_bar_T[0].item() == pytest.approx(0.99915, abs=1e-12)
    reference = torch.cumprod(1 - rescale_zero_terminal_snr(betas_T), 0)
    torch.testing.assert_close(alpha_bar_T, reference, rtol=1e-6, atol=1e-12)


def test_noising_and_v_equal_diffusers() -> None:
    z, noise = pair(len(TIMES), 4, 16, 16)
    made = schedule()
    noised = diffusion.mix(z, noise, *made.at(TIMES))
    torch.testing.assert_close(noised, peer().add_noise(z, noise, TIMES), rtol=1e-6, atol=1e-6)
    v = diffusion.target("v", z, noise, *made.at(TIMES))
    torch.testing.assert_close(v, peer().get_velocity(z, noise, TIMES), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(noised.var(dim=(1, 2, 3)), torch.ones(len(TIMES)).double(), rtol=0.15, atol=0)
    assert torch.equal(made.told, torch.arange(1000))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_and_what_is_told_are_those_of_diffusers(shift: float) -> None:
    made = diffusion.rectified_flow(1000, shift)
    reference = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    torch.testing.assert_close(made.level.flip(0).float(), reference.sigmas[:1000], rtol=1e-6, atol=0)
    torch.testing.assert_close(made.told.flip(0), reference.timesteps, rtol=1e-6, atol=0)
    z, noise = pair(2, 4, 8, 8)
    at = torch.tensor([9, 700])
    noised = diffusion.mix(z, noise, *made.at(at))
    wanted = reference.scale_noise(z, reference.timesteps.flip(0)[at], noise)
    torch.testing.assert_close(noised, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(diffusion.target("flow", z, noise, *made.at(at)), noise - z)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_what_is_predicted_gives_the_latent_back(prediction: str) -> None:
    """From z_t and a perfect prediction, and errors of both are in the ratio that weights rest on."""
    z, noise = pair(5, 4, 8, 8)
    made = diffusion.rectified_flow(1000) if prediction == "flow" else schedule()
    signal, level = made.at(torch.tensor([1, 100, 500, 900, 998]))
    noised = diffusion.mix(z, noise, signal, level)
    a, s = signal.view(-1, 1, 1, 1), level.view(-1, 1, 1, 1)

    def latent_of(predicted: torch.Tensor) -> torch.Tensor:
        match prediction:
            case "epsilon":
                return (noised - s * predicted) / a
            case "x0":
                return predicted
            case "v":
                return a * noised - s * predicted
        return noised - s * predicted

    perfect = diffusion.target(prediction, z, noise, signal, level)
    torch.testing.assert_close(latent_of(perfect), z, rtol=1e-9, atol=1e-9)
    error = torch.randn_like(z)
    of_latent = (latent_of(perfect + error) - z).square().mean(dim=(1, 2, 3))
    ratio = error.square().mean(dim=(1, 2, 3)) / of_latent
    torch.testing.assert_close(diffusion.error_ratio(prediction, signal, level), ratio, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [("epsilon", [0.004254, 0.591443, 1.0, 1.0]), ("v", [0.004250, 0.528883, 0.276333, 0.0046601])],
)
def test_min_snr_has_the_reference_numbers(prediction: str, wanted: list[float]) -> None:
    levels = schedule().at(torch.tensor([0, 100, 500, 999]))
    found = diffusion.weight(prediction, "min_snr", *levels, gamma=5.0)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-4)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


def test_147_timesteps_of_stable_diffusion_have_an_snr_above_5() -> None:
    made = schedule()
    assert int(((made.signal / made.level).square() > 5).sum()) == 147


@pytest.mark.parametrize("weighting", diffusion.WEIGHTINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_weights_are_the_papers(weighting: str, prediction: str) -> None:
    """Each as its paper writes it, for the error of the noise (of the latent, of v), with diffusers' SNR."""
    snr = compute_snr(peer(), TIMES)
    gamma, k = 1.5, 0.7
    of_epsilon = {
        "min_snr": torch.minimum(snr, torch.tensor(gamma)) / snr,
        "soft_min_snr": 1 / (snr / gamma + 1),
        "p2": 1 / (k + snr) ** gamma,
        "debiased": 1 / snr.sqrt(),
    }
    factor = {"epsilon": 1.0, "x0": snr, "v": snr / (snr + 1)}[prediction]
    wanted = torch.ones_like(snr) if weighting == "uniform" else of_epsilon[weighting] * factor
    found = diffusion.weight(prediction, weighting, *schedule().at(TIMES), gamma=gamma, k=k)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("weighting", diffusion.WEIGHTINGS)
def test_weights_are_finite_at_pure_noise(weighting: str) -> None:
    for prediction, made in (("v", schedule(zero_snr=True)), ("flow", diffusion.rectified_flow(1000))):
        assert torch.isfinite(diffusion.weight(prediction, weighting, *made.at(TIMES))).all()


@pytest.mark.parametrize("kind", diffusion.LOSSES)
def test_losses_are_torchs(kind: str) -> None:
    predicted, wanted = pair(5, 4, 8, 6)
    found = diffusion.elementwise_loss(kind, predicted, wanted, huber_delta=0.3)
    reference = {
        "mse": torch.nn.functional.mse_loss(predicted, wanted, reduction="none"),
        "l1": torch.nn.functional.l1_loss(predicted, wanted, reduction="none"),
        "huber": torch.nn.functional.huber_loss(predicted, wanted, reduction="none", delta=0.3),
    }[kind]
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(diffusion.per_sample(found)[2], reference[2].mean())


def test_a_mask_leaves_out_what_it_covers() -> None:
    loss, _ = pair(3, 4, 8, 6)
    mask = torch.zeros(3, 1, 8, 6)
    mask[0, :, :4], mask[1, :, 2, 2] = 1, 0.5
    found = diffusion.per_sample(loss, mask)
    wanted = torch.stack([loss[0, :, :4].mean(), loss[1, :, 2, 2].mean(), torch.zeros(()).double()])
    torch.testing.assert_close(found, wanted)


def test_loss_is_float32_whatever_the_model_says() -> None:
    predicted = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)  # its square is no float16
    loss_B = diffusion.per_sample(diffusion.elementwise_loss("mse", predicted, torch.zeros(1, 4, 64, 64)))
    assert loss_B.dtype == torch.float32
    assert loss_B.item() == pytest.approx(90_000.0)


def test_noising_keeps_a_low_precision_dtype() -> None:
    z, half = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.float64)
    assert diffusion.mix(z, z, half, half).dtype == torch.bfloat16


def test_offset_noise_is_constant_over_a_channel() -> None:
    noise, offset = pair(3, 4, 8, 8)[0], torch.arange(12).view(3, 4).double()
    added = diffusion.add_offset(noise, offset, 0.1) - noise
    torch.testing.assert_close(added, 0.1 * offset[:, :, None, None].expand_as(noise))


def test_uniform_and_logit_normal_timesteps() -> None:
    u_B = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert torch.equal(diffusion.timesteps(u_B, "uniform", 1000), (u_B * 1000).long())
    found = diffusion.timesteps(u_B, "logit_normal", 1_000_000, mean=-0.5, std=0.8)
    logits = torch.logit((found.double() + 0.5) / 1_000_000)
    assert logits.mean().item() == pytest.approx(-0.5, abs=1e-3)
    assert logits.std().item() == pytest.approx(0.8, abs=1e-3)
    ends = diffusion.timesteps(torch.tensor([0.0, 1 - 2**-24]), "logit_normal", 1000)
    assert ends.min() >= 0 and ends.max() <= 999


def test_stratified_points_fill_every_stratum_once() -> None:
    for offset in (0.0, 0.37, 1 - 2**-24):
        u_B = diffusion.stratified(torch.full((16,), offset, dtype=torch.float64), torch.arange(16), 16)
        assert sorted((u_B * 16).long().tolist()) == list(range(16))
