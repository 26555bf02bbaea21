"""Launches that would not train what they seem to: layers that disagree, batches without equal shares."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from finetune import UserError
from finetune.build import batch_sizes
from finetune.config import Config, compose
from finetune.distributed import World, require_agreement
from tests.conftest import ROOT, environment, launch


def test_layers_that_disagree_are_refused():
    require_agreement({"torch.distributed": (1, 2), "accelerate": (1, 2)})
    with pytest.raises(UserError, match=r"torch.distributed says rank 1 of 2, accelerate says rank 0 of 1"):
        require_agreement({"torch.distributed": (1, 2), "accelerate": (0, 1)})


@pytest.mark.slow
def test_accelerate_counting_one_process_is_refused(tmp_path):
    """On a machine without a GPU Accelerate, told of DeepSpeed, sees one process: such a run must not start."""
    script = tmp_path / "fault.py"
    script.write_text(
        "import importlib\n"  # DeepSpeed would compile a reduction for a minute, and a killed one leaves a lock
        "importlib.import_module('deepspeed.comm.torch').build_shm_op = lambda: None\n"
        "from accelerate import PartialState\n"
        "from finetune import distributed, run_cli\n"
        "assert PartialState().num_processes == 1\n"
        "run_cli(lambda: distributed.start('cpu', uses_deepspeed=True) and 0)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = environment() | {"ACCELERATE_USE_DEEPSPEED": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(torchrun, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "the layers disagree on who is who" in done.stderr
    assert "accelerate says rank 0 of 1" in done.stderr


def test_a_deepspeed_launch_that_the_strategy_would_ignore_is_refused(overrides, command, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, line = command("train", *overrides)
    assert code == 2
    assert "strategy=ddp would ignore" in line


@pytest.mark.parametrize(
    ("total", "micro", "size", "expected"),
    [
        (7, None, 2, "train.global_batch=7 cannot be shared by 2 processes: take a multiple of 2"),
        (2, None, 4, "train.global_batch=2 cannot be shared by 4 processes: take a multiple of 4"),
        (
            12,
            4,
            2,
            r"train.micro_batch=4 does not divide the 6 samples of each rank \(train.global_batch=12 over 2",
        ),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(total, micro, size, expected):
    config = compose(
        "train", ["data.shards=x", f"train.global_batch={total}", f"train.micro_batch={micro or 'null'}"], Config
    )[0]
    with pytest.raises(UserError, match=expected):
        batch_sizes(config, World(0, size, 0, torch.device("cpu")))


def test_batches_are_cut_into_equal_parts():
    config = compose("train", ["data.shards=x", "train.global_batch=12", "train.micro_batch=3"], Config)[0]
    assert batch_sizes(config, World(0, 2, 0, torch.device("cpu"))) == (3, 2)


@pytest.mark.slow
def test_a_global_batch_that_the_processes_cannot_share_is_refused(overrides, tmp_path):
    done = launch(2, [*overrides, "train.global_batch=7"])
    assert done.returncode != 0
    assert done.stderr.count("error: ") >= 1
    assert "train.global_batch=7 cannot be shared by 2 processes" in done.stderr
    assert not os.path.exists(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["strategy=zero3", "strategy.offload=nvme"],
            "strategy.offload=nvme with strategy.offload_path=None: nvme",
        ),
        (
            ["strategy=zero2", "strategy.reduce_dtype=bf16"],
            "strategy.reduce_dtype=bf16 is ddp's, ",
        ),
        (
            ["strategy.reduce_dtype=fp16"],
            "strategy.reduce_dtype=fp16",
        ),
        (
            ["strategy=zero3", "strategy.offload_path=/tmp"],
            "strategy.offload=none with strategy.offload_path=/tmp: ",
        ),
        (["strategy=zero2", "strategy.offload=nvme"], "strategy.offload=nvme is stage 3's: add strategy=zero3"),
        (
            ["strategy=zero3", "strategy.offload=disk"],
            "strategy.offload=disk is not known: choose one of none, cpu, nvme",
        ),
        (["strategy.offload=cpu"], "strategy.offload=cpu is ZeRO's: "),
        (["strategy=zero2", "strategy.stage=4"], "strategy.stage=4 is not known: choose 1, 2 or 3"),
        (
            ["strategy=zero2", "train.precision=fp16", "train.device=cpu"],
            "train.precision=fp16 under ZeRO needs a GPU",
        ),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(overrides, command, words, expected):
    code, line = command("train", *overrides, *words)
    assert code == 2
    assert expected in line


def test_processes_end_well_while_gloo_lets_go_of_the_last_tensors():
    """Else Python ends gloo's thread in the middle of C++, and the process aborts when all is done."""
    script = ROOT / "tests" / "strategies" / "leaving.py"
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["let go", "[0, 0]"], done.stderr


def test_a_process_alone_is_launched_by_nobody_after_a_run_under_zero(overrides, command):
    """The next run in this process, of a sweep say, would take its rank and port for a launcher's."""
    words = ["strategy=zero2", "train.precision=fp16"]  # which ends when ranks are joined
    assert command("train", *overrides, *words) == (
        2,
        "error: train.precision=fp16 under ZeRO needs a GPU: choose bf16 or fp32, or strategy=ddp",
    )
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & os.environ.keys()
