"""The benchmark scripts stay alive: at tiny size on the CPU they write complete result lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import profile_step, train_speed
from benchmarks.ranks import end
from finetune.models.fast import blocks
from tests.conftest import ROOT, environment

FIELDS = {"work", "variant", "hardware", "versions", "date", "commit"}


def lines(script: str, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", f"benchmarks.{script}", *arguments]
    # As a user has it: kernels run on a CPU by Triton's interpreter would take minutes.
    plain = environment() | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_training_speed_is_measured_beside_the_stock_loop(tmp_path):
    out = tmp_path / "results.jsonl"
    variants = ["stock", "eager", "ours", "ours_ema"]
    chosen = ("--works", "tiny", "--variants", ",".join(variants), "--seconds", "0.1", "--out", str(out))
    rows = lines("train_speed", *chosen)
    assert [row["variant"] for row in rows] == variants
    for row in rows:
        assert row.keys() >= FIELDS | {"tflop_per_image", "of_peak", "step_s", "slowest_s", "memory_gib", "batch"}
        assert row["images_per_s"] > 0 and row["warm_s"] > 0 and row["tflop_per_image"] > 0
        assert row["to_first"] == pytest.approx(row["images_per_s"] / rows[0]["images_per_s"], abs=2e-3)
    # The same weights, noise and batches: fast models learn what eager ones do, whatever an average does beside.
    _, eager, ours, averaged = (row["losses"] for row in rows)
    assert ours == pytest.approx(eager, rel=2e-3)
    assert averaged == pytest.approx(ours, rel=1e-5)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


@pytest.mark.parametrize("given", [("--works", "huge"), ("--works", "tiny", "--variants", "ours,theirs")])
def test_unknown_works_and_variants_are_refused(monkeypatch, capsys, given):
    monkeypatch.setattr(sys, "argv", ["train_speed", *given])
    with pytest.raises(SystemExit) as ended:
        train_speed.main()
    assert ended.value.code == 2
    assert f"{given[-1].split(',')[-1]} is not one of" in capsys.readouterr().err


def test_a_step_is_profiled_by_class_of_kernel(tmp_path, monkeypatch, capsys):
    """In this process, by torch's operations: kernels that the interpreter runs would take a minute."""
    monkeypatch.setattr(blocks, "kernels", None)
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["profile_step", "--work", "tiny", "--steps", "1", "--out", str(out)])
    profile_step.main()
    printed = capsys.readouterr().out.splitlines()
    (row,) = [json.loads(line) for line in printed if line.startswith("{")]
    assert row.keys() >= FIELDS and (row["work"], row["variant"]) == ("tiny", "ours")
    assert {"convolutions", "matrix products", "attention", "optimizer"} <= row["ms"].keys()
    assert all(ms >= 0 for ms in row["ms"].values())
    assert 0 < sum(row["ms"].values()) <= row["step_ms"]
    assert json.loads(out.read_text()) == row
    assert any(line.startswith("convolutions") for line in printed)  # the table


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("_normalize", "group norm"),
        ("_gate_gradient", "GEGLU"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void cudnn::ops::nchwToNhwcKernel<float>", "layout copies"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_poi_fused_add_3", "fused by inductor: pointwise"),
        ("Memcpy HtoD", "copies"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_known_by_their_names(kernel, wanted):
    assert profile_step.class_of(kernel) == wanted


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


@pytest.mark.slow
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
