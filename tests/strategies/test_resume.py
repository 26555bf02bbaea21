"""A checkpoint is of no strategy and no number of processes: a run goes on under any other as if undisturbed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import metrics
from tests.strategies.conftest import STEPS, Run
from tests.strategies.test_parity import AVERAGES, ONE, apart, tensors

PLACES = [("ddp", 1), ("ddp", 2), ("zero2", 2), ("zero3", 4), ("zero3", 2)]

pytestmark = pytest.mark.timeout(7200)  # the first test makes the runs of all


def undisturbed(adapter: str, place: tuple[str, int]) -> Run:
    return Run(adapter, *place, more=ONE)


def resumed(adapter: str, first: tuple[str, int], then: tuple[str, int]) -> Run:
    return Run(adapter, *then, more=ONE, start=undisturbed(adapter, first))


def require_going_on(lab: Any, adapter: str, first: tuple[str, int], then: tuple[str, int]) -> None:
    calm, run = lab(undisturbed(adapter, first)), lab(resumed(adapter, first, then))
    wanted, found = ([line for line in metrics(path) if "loss" in line] for path in (calm, run))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in found] == [line["lr"] for line in wanted]
    losses = [[line["loss"] for line in lines] for lines in (found, wanted)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][: STEPS // 2] == losses[1][: STEPS // 2]
    for part in ("weights", *AVERAGES):
        assert apart(tensors(calm, part), tensors(run, part)) < 1e-5, part
    assert apart(tensors(calm, "optimizer"), tensors(run, "optimizer")) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("then", PLACES, ids=lambda place: f"to_{place[0]}x{place[1]}")
@pytest.mark.parametrize("first", PLACES, ids=lambda place: f"{place[0]}x{place[1]}")
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_run_goes_on_from_anywhere_to_anywhere(lab, adapter, first, then):
    lab.make(*(resumed(adapter, one, other) for one in PLACES for other in PLACES))
    require_going_on(lab, adapter, first, then)
