"""Averages made of snapshots, against integrals done by hand and averages that followed the weights themselves."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from finetune import UserError
from finetune.ema import Average, Power, gamma_of
from finetune.posthoc import (
    LARGEST_RESIDUAL,
    Profile,
    combine,
    complete_snapshots,
    fit,
    inner_product,
    lengths,
    made_afterwards,
    read_snapshots,
)  # fmt: skip

BATCH = 8


def density(profile: Profile, t: np.ndarray) -> np.ndarray:
    inside = np.where(t <= profile.images, t, 0.0)
    return (profile.gamma + 1) * inside**profile.gamma / profile.images ** (profile.gamma + 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Profile(100, 6.94), Profile(100, 16.97)),
        (Profile(40, 16.97), Profile(100, 1.0)),
        (Profile(100, 2.0), Profile(70, 9.0)),
    ],
)
def test_products_are_the_integrals(one: Profile, other: Profile) -> None:
    t = (np.arange(400_000) + 0.5) / 4000
    wanted = (density(one, t) * density(other, t)).sum() / 4000
    assert inner_product(one, other) == pytest.approx(wanted, rel=1e-4)
    assert inner_product(one, other) == inner_product(other, one)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.05, 0.1, 0.2])), min_size=1, max_size=8, unique=True),
    st.floats(0.03, 0.28),
    st.integers(1, 10**9),
)
def test_a_fit_is_the_best_one(kept: list[tuple[int, float]], sigma_rel: float, unit: int) -> None:
    """Shares add up to 1; no other such sum comes nearer; the unit of the clock plays no part."""
    profiles = [Profile(at * unit, gamma_of(length)) for at, length in kept]
    wanted = Profile(50 * unit, gamma_of(sigma_rel))
    found = fit(profiles, wanted)
    assert sum(found.shares) == pytest.approx(1, abs=1e-9)
    products = unit * np.array([[inner_product(a, b) for b in [*profiles, wanted]] for a in [*profiles, wanted]])

    def residual(shares: np.ndarray) -> float:
        off = np.append(shares, -1.0)
        return float(np.sqrt(max(off @ products @ off, 0) / products[-1, -1]))

    shares = np.array(found.shares)
    assert residual(shares) == pytest.approx(found.residual, abs=1e-6)
    generator = np.random.default_rng(0)
    for _ in range(20):
        step = generator.normal(size=len(shares)) * 0.01
        assert residual(shares + step - step.mean()) >= found.residual - 1e-6


def test_a_kept_average_is_itself() -> None:
    profiles = [Profile(images, gamma_of(length)) for images in (50, 100) for length in (0.05, 0.1)]
    found = fit(profiles, Profile(100, gamma_of(0.1)))
    assert found.shares == pytest.approx((0, 0, 0, 1), abs=1e-9)
    assert found.residual < 1e-6


# --- runs that are written by hand ------------------------------------------------------------------


def write_run(
    run: Path, steps: int, every: int, seed: int = 0, since: int = 0, keep_lengths: tuple[float, ...] = (0.05, 0.1)
) -> list[dict[str, torch.Tensor]]:
    """Snapshots of weights on a random walk far from 0; the weights after each step."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": 3 + torch.randn(5, 4, generator=generator), "b": torch.randn(7, generator=generator)}
    averages = [Average.starting_at(list(weights.values()), Power(length)) for length in keep_lengths]
    walk = []
    for step in range(1, steps + 1):
        for key, tensor in weights.items():
            weights[key] = tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        walk.append(dict(weights))
        if step * BATCH <= since:
            averages = [Average.starting_at(list(weights.values()), it.profile) for it in averages]
            continue
        for average in averages:
            average.update(list(weights.values()), step * BATCH, BATCH)
        if step % every == 0:
            folder = run / "snapshots" / f"step-{step:08d}"
            for average in averages:
                inside = folder / f"power-{average.profile.sigma_rel:g}" / "unet"
                inside.mkdir(parents=True)
                named = {key: it.clone() for key, it in zip(weights, average.tensors, strict=True)}
                save_file(named, inside / "model.safetensors", metadata={"format": "pt"})
                (inside / "config.json").write_text("{}")
            described = {
                f"power-{it.profile.sigma_rel:g}": it.describe() | {"since_images": since} for it in averages
            }
            record = {"step": step, "images_seen": step * BATCH, "latents": {}, "averages": described}
            (folder / "trainer.json").write_text(json.dumps(record))
    return walk


def followed(walk: list[dict[str, torch.Tensor]], sigma_rel: float) -> dict[str, torch.Tensor]:
    """The average of the weights themselves, in float64 by the closed form."""
    edges = (torch.arange(len(walk) + 1).double() / len(walk)) ** (gamma_of(sigma_rel) + 1)
    shares = edges.diff()
    return {key: sum(s * it[key].double() for s, it in zip(shares, walk, strict=True)) for key in walk[0]}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[key].double() - other[key].double()).abs().max().item() for key in other)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.05, 0.08, 0.1, 0.13, 0.2])
def test_what_is_made_is_what_would_have_been_kept(tmp_path: Path, sigma_rel: float) -> None:
    """20 snapshots of 400 steps: within a hundredth of what the weights moved, and within the bound of the fit."""
    walk = write_run(tmp_path, steps=400, every=20)
    with made_afterwards(tmp_path, sigma_rel) as made:
        found = load_file(made.weights / "unet/model.safetensors")
        assert (made.weights / "unet/config.json").read_text() == "{}"
    assert not made.weights.exists() and made.step == 400
    moved = torch.stack([torch.cat([it["a"].flatten(), it["b"]]) for it in walk]).double()
    off, wanted = apart(found, followed(walk, sigma_rel)), followed(walk, sigma_rel)
    assert off < 0.01 * apart(walk[-1], walk[0])
    # Cauchy and Schwarz: |integral of difference times way| <= norm of the one times that of the other.
    way = (moved - moved[-1]).norm(dim=0).max() * BATCH**0.5
    profile = Profile(400 * BATCH, gamma_of(sigma_rel))
    assert off <= made.fit.residual * inner_product(profile, profile) ** 0.5 * way + 1e-5  # of float32's steps
    assert apart(wanted, walk[-1]) > 5 * off, "an average, not the last weights"


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20, every=10)
    left, young, used = (tmp_path / "snapshots" / f".made-{name}" for name in ("left", "young", "used"))
    for folder in (left, young, used):
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if folder != young:
            os.utime(folder, (0, 0))
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with made_afterwards(tmp_path, 0.05) as made:
        os.utime(made.weights, (0, 0))
        with made_afterwards(tmp_path, 0.1):
            assert made.weights.exists()
        assert not left.exists() and young.exists() and used.exists()
    os.close(descriptor)
    with made_afterwards(tmp_path, 0.05):
        assert not used.exists()


def test_an_earlier_snapshot_gives_the_average_of_that_time(tmp_path: Path) -> None:
    walk = write_run(tmp_path, steps=400, every=20)
    with made_afterwards(tmp_path, 0.12, step=200) as made:
        found = load_file(made.weights / "unet/model.safetensors")
    assert made.step == 200 and made.snapshot.name == "step-00000200"
    assert apart(found, followed(walk[:200], 0.12)) < 0.02 * apart(walk[199], walk[0])
    with pytest.raises(UserError, match="no snapshot of step 210; there are 20, 40, 60"):
        read_snapshots(tmp_path, 210)


def test_one_snapshot_gives_what_lies_between_its_lengths(tmp_path: Path) -> None:
    walk = write_run(tmp_path, steps=40, every=40)
    with made_afterwards(tmp_path, 0.05) as made:
        kept = tmp_path / "snapshots/step-00000040/power-0.05/unet/model.safetensors"
        assert apart(load_file(made.weights / "unet/model.safetensors"), load_file(kept)) < 1e-6
    with made_afterwards(tmp_path, 0.07) as made:
        found = load_file(made.weights / "unet/model.safetensors")
        assert 0.01 < made.fit.residual < LARGEST_RESIDUAL
    assert apart(found, followed(walk, 0.07)) < 0.05 * apart(walk[-1], walk[0])
    with (
        pytest.raises(
            UserError,
            match=r"snapshots up to step 40 \(1\) make no average of sigma_rel 0.2: the nearest is off by 60%, "
            "more than 10%; take 0.04 to 0.12",
        ),
        made_afterwards(tmp_path, 0.2),
    ):
        pass
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-00000040"]


def test_averages_that_began_later_are_not_mixed_with_older_ones(tmp_path: Path) -> None:
    """To them the weights had been constant before: so it is to what is made of them."""
    write_run(tmp_path / "run", steps=40, every=20)
    walk = write_run(tmp_path / "later", steps=400, every=20, since=100 * BATCH, seed=1)
    for path in complete_snapshots(tmp_path / "run").values():
        path.rename(tmp_path / "later" / "snapshots" / path.name)
    kept = read_snapshots(tmp_path / "later")
    assert min(one.step for one in kept) == 120 and {one.since_images for one in kept} == {800}
    with made_afterwards(tmp_path / "later", 0.15) as made:
        found = load_file(made.weights / "unet/model.safetensors")
    constant = [walk[99]] * 99 + walk[99:]
    assert apart(found, followed(constant, 0.15)) < 0.01 * apart(walk[-1], walk[0])


def test_lengths_that_can_be_made_grow_with_snapshots(tmp_path: Path) -> None:
    write_run(tmp_path, steps=40, every=2)
    few, many = (dict(lengths(read_snapshots(tmp_path, step))) for step in (4, 40))
    assert all(many[length] <= few[length] + 1e-6 for length in few)
    assert sum(residual < LARGEST_RESIDUAL for residual in many.values()) > 30


def test_sums_take_files_as_they_are(tmp_path: Path) -> None:
    """Other orders of tensors, scalars and empty tensors; the metadata of the last one."""
    one = {"x": torch.rand(3, 2), "y": torch.rand(()), "z": torch.zeros(0)}
    other = {"z": torch.zeros(0), "y": torch.rand(()), "x": torch.rand(3, 2)}
    for name, tensors in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "w.safetensors", metadata={"from": name})
    out = tmp_path / "out"
    combine([(tmp_path / "one", -1.5), (tmp_path / "other", 2.5)], out)
    found = load_file(out / "w.safetensors")
    for key in one:
        torch.testing.assert_close(found[key], -1.5 * one[key] + 2.5 * other[key])
    head = (out / "w.safetensors").read_bytes()[:200], (tmp_path / "other" / "w.safetensors").read_bytes()[:200]
    assert b'"from":"other"' in head[0] and head[0][:80] == head[1][:80]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=8, every=4)
    snapshots = tmp_path / "run" / "snapshots"
    victim = snapshots / "step-00000004" / "power-0.1" / "unet" / "model.safetensors"

    def refusal(run: Path) -> str:
        with pytest.raises(UserError) as caught, made_afterwards(run, 0.11):
            pass
        assert "\n" not in str(caught.value)
        return str(caught.value)

    content = victim.read_bytes()
    victim.write_bytes(content[:-4])
    assert f"{victim} cannot be added to the other snapshots" in refusal(tmp_path / "run")
    save_file({"a": torch.zeros(4, 5), "b": torch.zeros(7)}, victim)
    assert f"{victim} cannot be added to the other snapshots (a is [4, 5]" in refusal(tmp_path / "run")
    victim.unlink()
    assert f"{victim} cannot be added to the other snapshots" in refusal(tmp_path / "run")
    assert sorted(path.name for path in snapshots.iterdir()) == ["step-00000004", "step-00000008"]
    (snapshots / "step-00000004" / "trainer.json").write_text("{}")
    assert "step-00000004/trainer.json cannot be read" in refusal(tmp_path / "run")
    assert "has no snapshots to make an average of: train with ema=power" in refusal(tmp_path)
