"""What two ranks save together, under every strategy; see ranks.py, which runs once for all of these."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.ranks import STRATEGIES
from tests.conftest import ROOT, environment


@pytest.fixture(scope="module")
def found(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    overrides = [
        "experiment=smoke",
        f"data.shards={latents}",
        "tracker=none",
        "model.unet.block_out_channels=[16,32]",
        "model.unet.attention_head_dim=2",
        "train.precision=bf16",
        "ema.halflives_images.short=100",
        "ema.sigma_rels=[0.1]",
    ]
    (folder / "settings.json").write_text(json.dumps({"overrides": overrides, "folder": str(folder)}))
    script = str(Path(__file__).with_name("ranks.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(
        [*torchrun, str(folder / "settings.json")],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_files_hold_the_masters_average_and_moments_exactly(found: dict[str, Any], strategy: str) -> None:
    saves = found["everything"][f"{strategy} saves"]
    assert saves["wrong"] == []
    assert saves["fault"] is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_rank_copies_and_writes_its_share(found: dict[str, Any], strategy: str) -> None:
    saves = found["everything"][f"{strategy} saves"]
    assert sum(saves["bytes"]) == saves["all"]
    assert max(saves["bytes"]) < 0.7 * saves["all"]


@pytest.mark.parametrize("reader", STRATEGIES)
@pytest.mark.parametrize("writer", STRATEGIES)
def test_any_strategy_reads_any(found: dict[str, Any], writer: str, reader: str) -> None:
    assert found["everything"][f"{reader} reads {writer}"] == [[], []]


def test_all_ranks_go_on_and_skip_alike_while_one_disk_is_slow(found: dict[str, Any]) -> None:
    slow = found["slow_disk"]
    assert ["step 4 is not saved" in slow["said"][0], "step 6 is not saved" in slow["said"][1]] == [True, True]
    assert len(slow["said"]) == 2
    assert slow["names"] == ["step-00000001"]
    assert slow["wrong"] == []  # though all that it was taken from went on
    assert slow["steps"] > 10


def test_the_rank_whose_disk_fails_is_named(found: dict[str, Any]) -> None:
    fails = found["one_rank_fails"]
    who = f"No space left on device (rank 1 on {socket.gethostname()})"
    assert fails["said"][0] == f"warning: the checkpoint of step 1 cannot be saved, there is none yet: {who}"
    assert all(f"step-00000002: {who}; the checkpoints before it are untouched" in e for e in fails["errors"])
    assert fails["left"] == []
    assert fails["wrong"] == []


def test_a_rank_that_writes_to_another_disk_is_noticed(found: dict[str, Any]) -> None:
    (line,) = found["another_disk"]["said"]
    assert "does not hold what was written to it: is " in line
    assert "the same folder on all machines" in line
    assert found["another_disk"]["names"] == []


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_ranks_with_little_memory_take_turns_alike(found: dict[str, Any], strategy: str) -> None:
    little = found["little_memory"][strategy]
    assert little["wrong"] == []
    assert little["rounds"] > 2
    assert max(little["bytes"]) <= 100_000


def test_a_folder_that_not_all_ranks_see_is_refused(found: dict[str, Any]) -> None:
    shared = found["shared"]
    assert shared["seen"] == [None, None]
    for line in shared["apart"]:
        assert f"on rank 1 ({socket.gethostname()}) is not the folder that rank 0 made: choose a run.dir" in line
    assert all("is not the folder" in line for line in shared["missing"])
    assert shared["left"] == []
