"""The training loss of each objective against diffusers' schedulers, and what its draws depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from finetune import UserError, build, rng, sampling
from finetune.conditioning import Condition, Conditioner
from finetune.config import Config, compose, groups
from finetune.latents import LatentSpace
from finetune.models.schedulers import scheduler_config
from finetune.objective import LatentDiffusion, Objective
from tests.conftest import metrics

Command = Callable[..., tuple[int, str]]
SEED, BATCH = 3, 8


class Halves(nn.Module):
    """A "U-Net" that is easy to say otherwise: half of its input, plus a thousandth of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.config = SimpleNamespace(in_channels=4)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.scale * x + (t / 1000).view(-1, 1, 1, 1),)


def model_of(*overrides: str) -> LatentDiffusion:
    """What `build` makes of a configuration, around `Halves`."""
    config, _ = compose("train", ["experiment=smoke", "data.shards=none", *overrides], Config)
    build.check(config)
    settings = vars(config.objective)
    return LatentDiffusion(
        Halves(),
        Conditioner(),
        schedule=build.noise_schedule(config.model.scheduler, config.objective.prediction),
        space=LatentSpace(0.5),
        objective=Objective(**settings),
        seed=SEED,
        global_batch=BATCH,
    )


def batch() -> tuple[Tensor, dict[str, Tensor], Tensor]:
    moments = torch.randn(BATCH, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    moments[:, 4:] = moments[:, 4:].abs()
    return moments, {}, torch.arange(40, 40 + BATCH)


def draws(moments: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = moments.chunk(2, dim=1)
    z = (mean + std * rng.normal(SEED, "posterior", clock, (4, 8, 8))) * 0.5
    return z, rng.normal(SEED, "noise", clock, (4, 8, 8))


@pytest.mark.parametrize("choice", ["epsilon", "v", "x0", "min_snr", "v_min_snr", "v_zero_snr", "epsilon_l1"])
def test_the_loss_is_that_of_diffusers_scheduler(choice: str) -> None:
    """Noising, target and SNR by DDPMScheduler; weights as the papers write them; the mean by torch."""
    model = model_of(f"objective={choice}")
    moments, told, clock = batch()
    z, noise = draws(moments, clock)
    reference = DDPMScheduler(
        1000, 0.00085, 0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=choice == "v_zero_snr"
    )
    t = rng.integers(SEED, "timestep", clock, 1000)
    noised = reference.add_noise(z, noise, t)
    predicted = 0.5 * noised + (t / 1000).view(-1, 1, 1, 1)
    target = noise if choice in ("epsilon", "min_snr", "epsilon_l1") else reference.get_velocity(z, noise, t)
    target = z if choice == "x0" else target
    distance = torch.nn.functional.l1_loss if choice == "epsilon_l1" else torch.nn.functional.mse_loss
    wanted = distance(predicted, target, reduction="none").mean(dim=(1, 2, 3))
    snr = compute_snr(reference, t)
    if choice == "min_snr":
        wanted *= snr.clamp(max=5) / snr
    elif choice == "v_min_snr":
        wanted *= snr.clamp(max=5) / (snr + 1)
    found = model("loss", moments, told, clock)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6)
    # The measure for held-out samples is the plain square, whatever is trained.
    plain = torch.nn.functional.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(model("loss_at", moments, told, clock, t, SEED), plain, rtol=2e-5, atol=1e-6)


def test_the_flow_is_that_of_diffusers_scheduler() -> None:
    model = model_of("objective=flow", "model.scheduler.shift=3")
    moments, told, clock = batch()
    z, noise = draws(moments, clock)
    reference = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    index = model.timesteps(clock)
    told = reference.timesteps.flip(0)[index]
    noised = reference.scale_noise(z, told, noise)
    predicted = 0.5 * noised + (told / 1000).view(-1, 1, 1, 1)
    wanted = (predicted - (noise - z)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(model("loss", moments, told, clock), wanted, rtol=2e-5, atol=1e-6)


def test_offset_noise_and_input_perturbation() -> None:
    moments, told, clock = batch()
    z, noise = draws(moments, clock)
    t = rng.integers(SEED, "timestep", clock, 1000)
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear")
    offset = noise + 0.1 * rng.normal(SEED, "offset-noise", clock, (4,))[:, :, None, None]
    perturbed = noise + 0.2 * rng.normal(SEED, "input-perturbation", clock, (4, 8, 8))
    for setting, seen, target in (
        ("offset_noise=0.1", offset, offset),
        ("input_perturbation=0.2", perturbed, noise),
    ):
        predicted = 0.5 * scheduler.add_noise(z, seen, t) + (t / 1000).view(-1, 1, 1, 1)
        wanted = (predicted - target).square().mean(dim=(1, 2, 3))
        found = model_of(f"objective.{setting}")("loss", moments, told, clock)
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6)


def test_samples_count_by_their_weight_and_where_their_mask_says() -> None:
    model = model_of()
    moments, told, clock = batch()
    z, noise = draws(moments, clock)
    t = rng.integers(SEED, "timestep", clock, 1000)
    noised = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear").add_noise(z, noise, t)
    error = (0.5 * noised + (t / 1000).view(-1, 1, 1, 1) - noise).square()
    weight = torch.linspace(0.1, 2, BATCH)
    mask = torch.zeros(BATCH, 1, 8, 8)
    mask[:, :, :3] = 1.0
    mask[:, :, 3] = 0.5
    masked = (3 * error[:, :, :3].mean(dim=(1, 2, 3)) + 0.5 * error[:, :, 3].mean(dim=(1, 2))) / 3.5
    settings = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(
        model("loss", moments, told, clock, weight), weight * error.mean(dim=(1, 2, 3)), **settings
    )
    torch.testing.assert_close(model("loss", moments, told, clock, None, mask), masked, **settings)
    torch.testing.assert_close(model("loss", moments, told, clock, weight, mask), weight * masked, **settings)
    nothing = model("loss", moments, told, clock, None, torch.zeros(BATCH, 1, 8, 8))
    assert torch.equal(nothing, torch.zeros(BATCH))


@pytest.mark.parametrize(
    ("more", "gamma"),
    [
        (["objective.weighting=p2"], 1.0),
        (["objective.weighting=p2", "objective.gamma=0.5"], 0.5),
        (["objective.weighting=min_snr"], 5.0),
        (["objective.weighting=soft_min_snr"], 5.0),
        ([], 5.0),
    ],
)
def test_gamma_is_the_weightings_own_unless_it_is_given(more: list[str], gamma: float) -> None:
    """P2's is an exponent, at most 1 in its paper."""
    model, (moments, told, clock) = model_of(*more), batch()
    t = rng.integers(SEED, "timestep", clock, 1000)
    snr = compute_snr(DDPMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear"), t)
    weight = {
        "p2": 1 / (1 + snr) ** gamma,
        "min_snr": snr.clamp(max=gamma) / snr,
        "soft_min_snr": gamma / (snr + gamma),
    }.get(model.objective.weighting, torch.ones(BATCH))
    plain = model("loss_at", moments, told, clock, t, SEED)
    torch.testing.assert_close(model("loss", moments, told, clock), weight * plain, rtol=2e-5, atol=1e-6)


def test_gamma_in_another_word_is_the_same_run(overrides: list[str], command: Command) -> None:
    """Runs of before it was null have its value in their checkpoints."""
    settings = [*overrides, "objective.weighting=min_snr"]
    assert command("train", *settings, "train.steps=1", "objective.gamma=5") == (0, "")
    assert command("train", *settings, "train.steps=2") == (0, "")
    code, line = command("train", *settings, "train.steps=3", "objective.gamma=4")
    assert (code, "objective.gamma was 5.0 and is 4.0 now" in line) == (2, True), line


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_stratified_timesteps_are_spread_over_the_step_however_it_is_cut(distribution: str) -> None:
    model = model_of("objective.stratified=true", f"objective.timesteps={distribution}")
    steps = [model.timesteps(torch.arange(k * BATCH, (k + 1) * BATCH)) for k in range(200)]
    pieces = torch.cat([model.timesteps(torch.arange(k, k + 2)) for k in range(0, BATCH, 2)])
    assert torch.equal(pieces, steps[0]), "ranks and micro-batches see what one rank sees"
    if distribution == "uniform":
        assert all(sorted((t * BATCH // 1000).tolist()) == list(range(BATCH)) for t in steps)
    every = torch.stack(steps).double()
    u = rng.uniform(SEED, "x", torch.arange(200 * BATCH)).double()
    free = {"uniform": u, "logit_normal": torch.sigmoid(torch.logit(u.clamp(1e-6, 1 - 1e-6)))}[distribution]
    # Means of steps differ far less than those of free draws.
    assert every.mean(dim=1).std() < 0.5 * (1000 * free).view(200, BATCH).mean(dim=1).std()


def test_rescaled_guidance_is_that_of_diffusers() -> None:
    guided, conditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = sampling.rescale_guided(guided, conditional, 0.7)
    torch.testing.assert_close(found, rescale_noise_cfg(guided, conditional, 0.7), rtol=1e-5, atol=1e-6)


def test_sampling_a_flow_follows_straight_lines() -> None:
    """The exact flow to one point takes noise there in any number of steps, from any of the schedule's shifts."""
    point = torch.full((2, 4, 8, 8), 0.3)
    for shift in (1.0, 3.0):
        scheduler = sampling.make_scheduler(
            None, scheduler_config({"num_train_timesteps": 1000, "shift": shift}, "flow")
        )

        def flow(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return (x - point) / (t / 1000)

        noise = torch.randn(point.shape, generator=torch.Generator().manual_seed(0))
        for steps in (1, 7):
            found = sampling.sample(flow, {}, None, noise, scheduler, steps, 1.0)
            torch.testing.assert_close(found, point, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="take euler"):
        sampling.make_scheduler("ddim", scheduler_config({}, "flow"))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.scheduler.rescale_betas_zero_snr=true"], "says nothing of a latent at the pure noise"),
        (["objective=v_zero_snr", "model.scheduler.timestep_spacing=leading"], "timestep_spacing=trailing"),
        (["objective=flow", "model.scheduler.rescale_betas_zero_snr=true"], "has none"),
        (["model.scheduler.shift=3"], "of objective.prediction=flow alone"),
        (["objective.weighting=snr"], "choose one of uniform, min_snr"),
        (["objective.gamma=0"], "objective.gamma=0"),
        (["objective.offset_noise=-0.1"], "must not be negative"),
        (["sample.guidance_rescale=2"], "is a share"),
        (["model.scheduler.timestep_spacing=late"], "choose one of leading, trailing, linspace"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], reason: str) -> None:
    config, _ = compose("train", ["experiment=smoke", "data.shards=none", *overrides], Config)
    with pytest.raises(UserError, match=reason):
        build.check(config)


def test_every_objective_is_known_to_what_builds_it() -> None:
    for choice in groups()["objective"]:
        assert isinstance(model_of(f"objective={choice}"), LatentDiffusion)


@pytest.mark.parametrize("choice", ["flow", "v_zero_snr"])
def test_a_run_trains_draws_and_goes_on(
    overrides: list[str], command: Command, tmp_path: Path, choice: str
) -> None:
    """To the end at once, or in two: the same; its pictures are finite; another objective is refused."""
    settings: list[Any] = [
        *overrides,
        f"objective={choice}",
        "sample.every=4",
        "sample.steps=2",
        "objective.stratified=true",
    ]
    assert command("train", *settings, f"run.dir={tmp_path / 'calm'}")[0] == 0
    assert command("train", *settings, f"run.dir={tmp_path / 'two'}", "train.steps=2")[0] == 0
    code, line = command("train", *settings, f"run.dir={tmp_path / 'two'}", "objective.offset_noise=0.1")
    assert (code, "objective.offset_noise was 0.0 and is 0.1 now" in line) == (2, True), line
    assert command("train", *settings, f"run.dir={tmp_path / 'two'}")[0] == 0
    assert metrics(tmp_path / "two") == metrics(tmp_path / "calm")
    pictures = [(tmp_path / name / "samples" / "step-00000004.png").read_bytes() for name in ("calm", "two")]
    assert pictures[0] == pictures[1]
    out = tmp_path / "drawn.png"
    assert command("sample", str(tmp_path / "two"), "--prompt", "a cat", "--steps", "2", "--out", str(out))[0] == 0
    assert out.exists()
    if choice == "flow":
        code, line = command("export", str(tmp_path / "two"), "--format", "diffusers", "--out", str(tmp_path / "e"))
        assert (code, "cannot sample" in line) == (2, True), line
