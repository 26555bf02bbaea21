"""The learning rate against its closed form, on the clock of images."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from finetune.lr import SCHEDULES, learning_rate

PEAK = 3e-4


def at(images: int, schedule: str = "cosine", warmup: int = 200, total: int = 1000, final: float = 0.0) -> float:
    return learning_rate(
        images, peak=PEAK, schedule=schedule, warmup_images=warmup, total_images=total, final_ratio=final
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_line_that_reaches_the_peak_at_its_end(schedule: str) -> None:
    for images in (1, 8, 50, 100, 199):
        assert at(images, schedule) == pytest.approx(PEAK * images / 200, rel=1e-15)
    assert at(200, schedule) == PEAK
    assert at(199, schedule) < PEAK


def test_cosine_is_half_a_period_after_the_warm_up() -> None:
    final = 0.1
    share = {0.0: 1.0, 0.25: 0.5 + math.sqrt(2) / 4, 0.5: 0.5, 0.75: 0.5 - math.sqrt(2) / 4, 1.0: 0.0}
    for progress, height in share.items():
        images = 200 + round(progress * 800)
        assert at(images, final=final) == pytest.approx(PEAK * (final + (1 - final) * height), rel=1e-12)
    assert at(1000) == pytest.approx(0.0, abs=1e-20)
    assert at(1000, final=1.0) == PEAK


def test_constant_stays() -> None:
    assert {at(images, "constant") for images in range(200, 5000, 100)} == {PEAK}
    assert at(10**9, "constant", final=0.1) == PEAK  # the final ratio is the cosine's


def test_it_rises_then_falls_and_never_below_the_end() -> None:
    rates = [at(images, final=0.2) for images in range(0, 2001)]
    peak = rates.index(max(rates))
    assert peak == 200
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))
    assert rates[1000:] == pytest.approx([0.2 * PEAK] * 1001)  # past the end it stays


def test_without_warm_up_the_first_step_has_nearly_the_peak() -> None:
    assert at(1, "constant", warmup=0) == PEAK
    assert at(0, warmup=0) == PEAK
    assert 0.999 * PEAK < at(1, warmup=0) < PEAK


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_all_warm_up_ends_at_the_peak(schedule: str) -> None:
    assert at(999, schedule, warmup=1000) == pytest.approx(0.999 * PEAK)
    assert at(1000, schedule, warmup=1000) == PEAK
    assert at(400, schedule, warmup=1000, total=400) == pytest.approx(0.4 * PEAK)  # the run ends within it


def test_steps_of_any_size_see_the_same_rates() -> None:
    """On the clock of images, 8 samples a step and 16 meet the same value at the same image."""
    assert [at(n) for n in range(16, 1001, 16)] == [at(n) for n in range(8, 1001, 8)][1::2]
