"""Single steps under every strategy: what is skipped, and what training starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.strategies.conftest import spawn


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("torch") / "kernels"


@pytest.fixture(scope="module")
def printed(kernels):
    lines = spawn(2, Path(__file__).with_name("skipping.py"), TORCH_EXTENSIONS_DIR=str(kernels)).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def examined(printed):
    assert len(printed) == 22
    return printed[:-1]


def test_ranks_that_lay_weights_out_differently_are_refused(printed):
    """They would add up gradients of different weights, and train on that without a word."""
    assert printed[-1] == {"ddp": [True, True], "zero2": [True, True]}


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_anywhere(examined):
    """Masters, moments and AdamW's count of steps stay bit for bit, and every rank sees the norm."""
    for row in examined:
        for name in ("unchanged", "told", "went_on"):
            assert row[name] == [True, True], (name, row)


def test_the_run_goes_on_as_if_the_step_had_not_been(examined):
    assert all(row["as_if_never"] == [True, True] for row in examined if row["precision"] != "fp16")


def test_a_loss_scale_that_grows_changes_no_update(examined):
    """DeepSpeed's own step halves the gradients of that step."""
    for what in ("grown", "norms_apart"):
        distances = {row["strategy"]: row[what] for row in examined if what in row}
        assert distances.keys() == {"zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload"}
        assert max(distances.values()) < 1e-4, (what, distances)


def test_a_loss_scale_is_carried_to_another_strategy(examined):
    carried = [row["carried"] for row in examined if "carried" in row]
    assert carried == [[True, True]] * 6


def test_masters_start_from_the_exact_weights(examined):
    """DeepSpeed alone would take them from weights that are rounded to bf16 already."""
    assert all(row["first"] == 0.0 for row in examined)


def test_every_strategy_and_rank_has_the_gradient_norm_of_ddp(examined):
    """ZeRO's is ours, over pieces of gradients, some of which are split between the ranks."""
    norms = {(row["strategy"], row["precision"]): row["norm"] for row in examined if row["precision"] != "fp16"}
    for (_, precision), seen in norms.items():
        expected = norms["ddp", precision][0]
        assert seen == pytest.approx([expected] * 2, rel=1e-6 if precision == "fp32" else 5e-3)


@pytest.mark.usefixtures("examined")
def test_nothing_is_compiled_at_the_first_start_on_a_cpu(kernels):
    """It would take a minute, and a kill meanwhile would leave a lock that later runs wait for."""
    assert not kernels.exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_between_steps_a_strategy_holds_weights_masters_and_moments_alone(processes):
    """bf16: bytes a weight on each rank, as the README's table says, without the average."""
    line = spawn(processes, Path(__file__).parent / "holding.py").splitlines()[-1]
    wanted = {"ddp": 12, "zero1": 2 + 12 / processes, "zero2": 2 + 12 / processes, "zero3": 14 / processes}
    for kind, of_ranks in json.loads(line).items():
        assert of_ranks == pytest.approx([wanted[kind]] * processes, rel=0.01), kind
