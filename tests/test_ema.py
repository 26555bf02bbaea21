"""Averages against EDM's formulas worked by hand and a float64 loop."""

from __future__ import annotations

import pytest
import torch

from finetune.ema import LARGEST_SIGMA_REL, Average, HalfLife, Power, decay, gamma_of, sigma_rel_of, update_


def test_a_value_weighs_half_after_a_half_life() -> None:
    """EDM, training_loop.py: beta = 0.5 ** (batch / max(min(halflife, seen * ratio), 1e-8))."""
    keep = 1.0
    for images in range(100_016, 100_000 + 4_000 + 1, 16):
        keep *= decay(images, 16, 4_000, 0.05)
    assert keep == pytest.approx(0.5, rel=1e-9)
    assert decay(10**9, 64, 500_000, 0.05) == pytest.approx(0.999911, abs=1e-6)


def test_steps_of_any_size_forget_at_the_same_pace() -> None:
    assert decay(10**9, 8, 1_000, 0.05) ** 4 == pytest.approx(decay(10**9, 32, 1_000, 0.05), rel=1e-12)


def test_a_young_run_has_a_short_half_life() -> None:
    for seen in (16, 160, 16_000):
        assert decay(seen, 16, 500_000, 0.05) == pytest.approx(0.5 ** (16 / (0.05 * seen)), rel=1e-12)
    assert decay(10_000_000, 16, 500_000, 0.05) == decay(20_000_000, 16, 500_000, 0.05)  # ramped up
    assert decay(16, 16, 500_000, 0.05) < 1e-6  # the first step all but replaces the start
    assert decay(16, 16, 500_000, 0.0) == pytest.approx(0.5 ** (16 / 500_000), rel=1e-12)  # no ramp-up


def test_decay_is_a_share_at_any_time() -> None:
    for seen in (0, 1, 10, 10**4, 10**8):
        for halflife in (0, 1, 10**6):
            assert 0.0 <= decay(seen, 16, halflife, 0.05) < 1.0


def test_updates_follow_a_float64_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (), (0,)]  # the empty one: a ZeRO rank that owns nothing of a parameter
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    average = Average.starting_at(weights, HalfLife(200, 0.5))
    reference = [tensor.double() for tensor in weights]
    for step in range(1, 60):
        weights = [tensor + torch.randn(tensor.shape, generator=generator) for tensor in weights]
        average.update(weights, step * 8, 8)
        keep = 0.5 ** (8 / min(200, 0.5 * step * 8))
        reference = [keep * old + (1 - keep) * new.double() for old, new in zip(reference, weights)]
    for tensor, wanted in zip(average.tensors, reference):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-5)


def test_update_is_in_place_and_leaves_the_weights() -> None:
    average, weight = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    update_([average], [weight], 0.75)
    assert torch.equal(average, torch.tensor([0.25, 0.5, 0.75]))
    assert torch.equal(weight.detach(), torch.tensor([1.0, 2.0, 3.0]))
    assert not average.requires_grad
    update_([], [], 0.5)  # a rank may own nothing


def test_the_average_starts_as_a_copy() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    average = Average.starting_at([weight], HalfLife(100, 0.05))
    (tensor,) = average.tensors
    assert torch.equal(tensor, weight)
    assert tensor.data_ptr() != weight.data_ptr() and not tensor.requires_grad
    assert tensor.stride() == weight.stride()  # else each update would convert the layout
    with torch.no_grad():
        weight.fill_(7)
    assert (tensor != 7).all()


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (LARGEST_SIGMA_REL, 0.0)])
def test_the_exponent_is_the_papers(sigma_rel: float, gamma: float) -> None:
    """Karras et al. 2024, arXiv 2312.02696, section 3.1; with gamma 0 all moments count alike, as a uniform law."""
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


def test_exponent_and_length_are_each_others_reverse() -> None:
    for sigma_rel in (0.001, 0.01, 0.05, 0.13, 0.2, 0.288):
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_a_power_function_has_the_deviation_that_it_is_named_by() -> None:
    """Averages of t and of t^2, in many steps of uneven length."""
    average = Average.starting_at([torch.full((2,), 1e9)], Power(0.1))  # what was before the run is forgotten
    seen = 0
    for step in range(4000):
        size = 8 + step % 3
        seen += size
        average.update([torch.tensor([float(seen), float(seen) ** 2])], seen, size)
    mean, square = average.tensors[0].double().tolist()
    assert (square - mean**2) ** 0.5 / seen == pytest.approx(0.1, rel=1e-3)
    gamma = gamma_of(0.1)
    assert mean / seen == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_the_weights_of_each_step_count_by_their_part_of_the_profile() -> None:
    """Closed form: a step from s to t counts (t/T)^(gamma+1) - (s/T)^(gamma+1)."""
    average = Average.starting_at([torch.zeros(50)], Power(0.2))
    for step in range(50):
        average.update([torch.eye(50)[step]], 8 * (step + 1), 8)
    edges = (torch.arange(51).double() / 50) ** (gamma_of(0.2) + 1)
    torch.testing.assert_close(average.tensors[0].double(), edges.diff(), rtol=1e-5, atol=1e-7)
