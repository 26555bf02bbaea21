"""The benchmark scripts stay alive: at tiny size on the CPU they write complete result lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.strategies import end
from tests.conftest import ROOT, environment

FIELDS = {"work", "variant", "hardware", "versions", "date", "commit"}


def lines(script: str, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", f"benchmarks.{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_train_step_compares_with_the_stock_loop(tmp_path):
    out = tmp_path / "results.jsonl"
    rows = lines("train_step", "--work", "tiny", "--seconds", "0.1", "--batch", "2", "--out", str(out))
    assert [row["variant"] for row in rows] == ["stock", "ours", "ours_ema", "ours_other_layout", "stock_again"]
    assert all(row["images_per_s"] > 0 and row.keys() >= FIELDS for row in rows)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


@pytest.mark.slow
def test_strategies_follow_the_stock_ddp_loop():
    """Peer and ours draw the same numbers: one curve, but that ZeRO rounds weights to bf16."""
    chosen = ("--gpus", "2", "--batch", "2", "--seconds", "0.1", "--losses", "4", "--variants", "peer_ddp,zero2")
    peer, zero = lines("strategies", "--work", "tiny", *chosen)
    assert [peer["variant"], zero["variant"]] == ["peer_ddp", "zero2"]
    assert all(
        row.keys() >= FIELDS and row["images_per_s_gpu"] > 0 and len(row["losses"]) == 4 for row in (peer, zero)
    )
    assert peer["apart"] == 0 and 0 < zero["apart"] < 0.03


def test_a_variant_that_fails_is_a_row_of_its_own():
    (row,) = lines("strategies", "--work", "tiny", "--variants", "zero1", "--gpus", "1", "--limit", "0.1")
    assert row["error"] == "took longer than 0.1 s"


def test_a_variant_out_of_time_leaves_no_worker_behind(tmp_path):
    """torchrun's workers have sessions of their own, which a kill of torchrun's group does not reach."""
    worker = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(300)"
    (tmp_path / "worker.py").write_text(worker)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    process = subprocess.Popen(
        [*launcher, str(tmp_path / "worker.py"), str(tmp_path / "pid")],
        env=environment(),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    pid = int((tmp_path / "pid").read_text())
    end(process)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_checkpoint_is_measured_beside_what_it_cannot_beat(tmp_path):
    rows = lines("checkpoint", "--batch", "2", "--steps", "2", "--saves", "1", "--folder", str(tmp_path))
    assert [row["variant"] for row in rows] == [
        "step", "bare_copy", "bare_write", "torch_save", "ours_waited", "ours", "step_again"
    ]  # fmt: skip
    assert all(row.keys() >= FIELDS and row["gib"] > 0 for row in rows)
    assert rows[5]["total_s"] > rows[5]["call_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_gpu_parity_runs_on_the_cpu():
    rows = {row["variant"]: row for row in lines("gpu_parity", "--only", "fp32|bf16")}
    assert rows["ddp-fp32"]["loss"] == 0
    assert 0 < rows["ddp-bf16"]["loss"] < 0.03
