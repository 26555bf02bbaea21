"""Held-out loss as a plain loop over samples, for any ranks; sample grids as diffusers draws them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from finetune import build, diffusion, rng
from finetune.batch import Sample
from finetune.conditioning import batch_of
from finetune.config import Config, compose
from finetune.distributed import World
from finetune.distributed.watch import Watch
from finetune.loop import Parts, asked
from finetune.pictures import grid
from finetune.validation import SEED, draw_samples, held_out_loss, shares, stratified_timesteps

CPU = torch.device("cpu")


@pytest.fixture
def built(overrides: list[str], pipeline: Path, tmp_path: Path) -> tuple[Config, Parts]:
    settings = [f"model.pretrained={pipeline}", "model.unet={}", "validation.samples=7", "validation.timesteps=3"]
    config = compose("train", [*overrides, *settings], Config)[0]
    run = tmp_path / "run"
    run.mkdir()
    return config, build.build(config, World(0, 1, 0, CPU), run)


# --- shares and strata ----------------------------------------------------------------------------


@pytest.mark.parametrize("strata", [1, 3, 4, 10])
def test_each_sample_has_one_timestep_in_each_stratum(strata: int) -> None:
    ids = torch.arange(500)
    for stratum in range(strata):
        t = stratified_timesteps(ids, stratum, strata, 1000)
        low, high = 1000 * stratum / strata, 1000 * (stratum + 1) / strata
        assert t.dtype == torch.int64
        assert int(low) <= t.min() and t.max() < high + 1e-9 and t.max() <= 999
        assert t.double().mean().item() == pytest.approx((low + high) / 2, abs=60 / strata)
        assert torch.equal(t[100:110], stratified_timesteps(ids[100:110], stratum, strata, 1000))


def test_more_strata_than_timesteps_stay_in_the_schedule() -> None:
    for stratum in range(16):
        t = stratified_timesteps(torch.arange(50), stratum, 16, 4)
        assert (t == stratum // 4).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
def test_shares_deal_all_indices_in_equal_counts(size: int) -> None:
    for count in (1, 2, 5, 7, 16, 33):
        dealt = shares(count, size)
        assert len(dealt) == size and len({len(share) for share in dealt}) == 1
        flat = [i for share in dealt for i in share]
        assert flat[:count] == list(range(count))
        assert set(flat[count:]) <= {count - 1}


# --- held-out loss --------------------------------------------------------------------------------


class OneOf:
    """The strategy that rank `rank` of `size` would have: it keeps its sums for the others."""

    def __init__(self, parts: Parts, rank: int, size: int) -> None:
        self.strategy, self.calls = parts.strategy, 0
        self.sums = torch.empty(0)
        keep = self

        class Counted(World):
            def sum_(self, tensor: Tensor) -> Tensor:
                keep.sums = tensor.clone()
                return tensor

        self.world = Counted(rank, size, rank, CPU)

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return self.strategy(*args)


def loss_of(config: Config, parts: Parts, strategy: Any) -> dict[str, float]:
    return held_out_loss(
        strategy,
        parts.data.held_out,
        parts.model.conditioner,
        strata=config.validation.timesteps,
        num_train_timesteps=1000,
    )


def test_a_long_validation_is_no_hang(built: tuple[Config, Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    config, parts = built
    marks = []
    original = Watch.going_on
    monkeypatch.setattr(Watch, "going_on", lambda self: (original(self), marks.append(self.mark)))
    parts.strategy.world.watch.at("validating")
    loss_of(config, parts, parts.strategy)
    assert len(marks) == 3 * len(parts.data.held_out)
    assert len({id(mark) for mark in marks}) > 1 and len(set(marks)) == 1  # as if it were said again


def test_held_out_loss_is_a_plain_loop_over_samples(built: tuple[Config, Parts]) -> None:
    config, parts = built
    with parts.strategy.evaluating(None):
        found = loss_of(config, parts, parts.strategy)
    model = parts.model.eval()
    sums = np.zeros(3)
    count = 0
    for batch in parts.data.held_out:
        for i in range(len(batch)):
            count += 1
            sample_id = batch.sample_ids[i : i + 1]
            kept = torch.tensor([False])
            context = model.conditioner(model.conditioner.inputs(batch.take([i]), kept))["context"]
            for stratum in range(3):
                draw = sample_id * 3 + stratum
                t = stratified_timesteps(sample_id, stratum, 3, 1000)
                mean, std = batch.moments[i : i + 1].float().chunk(2, dim=1)
                z = (mean + std * rng.normal(SEED, "posterior", draw, (4, 8, 8))) * 0.5
                noise = rng.normal(SEED, "noise", draw, (4, 8, 8))
                noised = diffusion.mix(z, noise, *model.schedule.at(t))
                with torch.no_grad():
                    predicted = model.unet(noised, t, context).sample
                sums[stratum] += torch.nn.functional.mse_loss(predicted, noise).item()
    assert count == 7
    assert [found[f"validation/loss_t{k}"] for k in range(3)] == pytest.approx(sums / 7, rel=1e-5)
    assert found["validation/loss"] == pytest.approx(sums.mean() / 7, rel=1e-5)
    assert found.keys() == {"validation/loss", "validation/loss_t0", "validation/loss_t1", "validation/loss_t2"}


@pytest.mark.parametrize("size", [2, 3, 9])
def test_held_out_loss_is_the_same_for_any_ranks(built: tuple[Config, Parts], size: int) -> None:
    config, parts = built
    alone = OneOf(parts, 0, 1)
    with parts.strategy.evaluating(None):
        found = loss_of(config, parts, alone)
        ranks = [OneOf(parts, rank, size) for rank in range(size)]
        for rank in ranks:
            loss_of(config, parts, rank)
    total = torch.stack([rank.sums for rank in ranks]).sum(0)
    assert total[3] == 7
    torch.testing.assert_close(total, alone.sums, rtol=1e-5, atol=0)
    assert len({rank.calls for rank in ranks}) == 1, "ZeRO-3 needs as many calls on every rank"
    assert found["validation/loss"] == pytest.approx((total[:3] / total[3]).mean().item(), rel=1e-5)


def test_held_out_loss_does_not_depend_on_seed_or_mode(built: tuple[Config, Parts]) -> None:
    config, parts = built
    with parts.strategy.evaluating(None):
        one = loss_of(config, parts, parts.strategy)
        torch.manual_seed(99)
        parts.model.seed = 99  # of the training's draws
        assert loss_of(config, parts, parts.strategy) == one
    assert parts.model.unet.training


def test_evaluation_uses_the_average_and_gives_the_weights_back(built: tuple[Config, Parts]) -> None:
    config, parts = built
    assert parts.average is not None
    weights = [shard.master.clone() for shard in parts.strategy.shards]
    for tensor in parts.average.tensors:
        tensor.mul_(0.5)
    averages = [tensor.clone() for tensor in parts.average.tensors]
    with parts.strategy.evaluating(None):
        raw = loss_of(config, parts, parts.strategy)
    with parts.strategy.evaluating(parts.average.tensors):
        averaged = loss_of(config, parts, parts.strategy)
        assert all(torch.equal(s.master, a) for s, a in zip(parts.strategy.shards, averages, strict=True))
    assert raw != averaged
    assert all(torch.equal(s.master, w) for s, w in zip(parts.strategy.shards, weights, strict=True))
    assert all(torch.equal(t, a) for t, a in zip(parts.average.tensors, averages, strict=True))


# --- sample grids ---------------------------------------------------------------------------------

PROMPTS = ["a red cat", "a blue hat", "a gold bus on a table"]


def drawn(parts: Parts, strategy: Any, prompts: list[str], **changes: Any) -> Image.Image | None:
    settings = {"seed": 3, "downsample": 4, "steps": 4, "guidance": 3.0} | changes
    batch = batch_of(parts.model.conditioner, [Sample({"captions": [prompt]}, (32, 48)) for prompt in prompts])
    decoder = parts.decoder if strategy.world.is_main else None
    with torch.no_grad():
        return draw_samples(strategy, parts.model, decoder, batch, scheduler=parts.scheduler, **settings)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_grid_is_what_diffusers_draws_from_the_same_noise(
    built: tuple[Config, Parts], pipeline: Path, guidance: float
) -> None:
    _, parts = built
    with parts.strategy.evaluating(None):
        picture = drawn(parts, parts.strategy, PROMPTS, guidance=guidance)
    reference = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    noise = torch.cat([torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3 + i)) for i in range(3)])
    wanted = reference(
        PROMPTS, height=32, width=48, num_inference_steps=4, guidance_scale=guidance, latents=noise
    ).images
    assert picture is not None
    difference = np.asarray(picture, int) - np.asarray(grid(wanted, columns=3), int)
    assert picture.size == (3 * 48 + 4, 32)
    assert abs(difference).max() < 2


class Gathering(World):
    """A rank that is a thread: `gather` meets the others."""

    meet: threading.Barrier
    box: list[Any]

    def gather(self, value: Any) -> list[Any]:
        self.box[self.rank] = value
        self.meet.wait(60)
        return list(self.box)


class Share:
    def __init__(self, parts: Parts, world: World) -> None:
        self.parts, self.world = parts, world
        self.picture: Image.Image | None = None

    def __call__(self, *args: Any) -> Tensor:
        return self.parts.strategy(*args)

    def draw(self) -> None:
        self.picture = drawn(self.parts, self, PROMPTS)


@pytest.mark.parametrize("size", [2, 4])
def test_a_grid_is_the_same_for_any_ranks(built: tuple[Config, Parts], size: int) -> None:
    """Each rank draws its share, rank 0 gets all and decodes; with four ranks one repeats a picture."""
    _, parts = built
    kind = type("Meeting", (Gathering,), {"meet": threading.Barrier(size), "box": [None] * size})
    ranks = [Share(parts, kind(rank, size, rank, CPU)) for rank in range(size)]
    with parts.strategy.evaluating(None):
        whole = drawn(parts, parts.strategy, PROMPTS)
        threads = [threading.Thread(target=rank.draw) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert whole is not None and ranks[0].picture is not None
    assert abs(np.asarray(whole, int) - np.asarray(ranks[0].picture, int)).max() <= 1
    assert [rank.picture for rank in ranks[1:]] == [None] * (size - 1)


def test_prompts_come_from_held_out_captions_where_none_are_given(built: tuple[Config, Parts]) -> None:
    config, parts = built
    config.sample.prompts = None
    held = [caption for batch in parts.data.held_out for caption in batch.captions]

    def prompts() -> list[str]:
        batch = asked(config, parts)
        assert batch is not None and batch.bucket == (32, 32)
        return batch.captions

    assert prompts() == held[:4]
    config.sample.prompts = ["x"]
    assert prompts() == ["x"]
    config.sample.prompts = None
    parts.data.held_out = []
    assert prompts() == [""]


def test_after_an_error_no_collective_is_waited_for(built, monkeypatch):
    """Putting the weights back is one under ZeRO; the other ranks may be in another."""
    strategy, calls = built[1].strategy, []
    monkeypatch.setattr(strategy, "refresh", lambda: calls.append("refresh"))
    average = [shard.master.clone() for shard in strategy.shards]
    with pytest.raises(RuntimeError), strategy.evaluating(average):
        raise RuntimeError
    assert calls == ["refresh"]
