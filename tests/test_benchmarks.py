"""The benchmark scripts stay alive: at tiny size on the CPU they write complete result lines."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import (
    cost_curve,
    cost_quality,
    encode,
    graph_parity,
    loss_curve,
    profile_step,
    scaling,
    strategies,
    train_speed,
)
from benchmarks.common import context
from benchmarks.ranks import end
from benchmarks.works import MATCHED, make_unet
from finetune import UserError
from finetune.data.shards import LATENT, EncoderInfo, ShardWriter, json_bytes, latent_bytes
from finetune.latents import LatentSpace
from finetune.models.autoencoder import Pixels, encoder_sha256
from finetune.models.fast import blocks
from finetune.models.unet import build_unet
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
        assert row["images_per_s"] > 0 and row["tflop_per_image"] > 0
        # On a busy machine steps may never be quick.
        assert row["start_s"] is row["warm_s"] is None or row["start_s"] > row["warm_s"] > 0
        assert row["to_first"] == pytest.approx(row["images_per_s"] / rows[0]["images_per_s"], abs=2e-3)
    # The same weights, noise and batches: fast models learn what eager ones do, whatever an average does beside.
    _, eager, ours, averaged = (row["losses"] for row in rows)
    assert ours == pytest.approx(eager, rel=2e-3)
    assert averaged == pytest.approx(ours, rel=1e-5)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_operations_are_counted_without_a_gpus_weights(monkeypatch):
    """A forward and a backward pass have about three times the operations of a forward one, an adapter's two."""
    full, adapter = (train_speed.tflop(train_speed.WORKS[name]) for name in ("tiny", "tiny_lora"))
    assert 0.6 < adapter / full < 0.75
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train_speed.tflop(train_speed.WORKS["tiny"]) == full


def test_results_need_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert context()["commit"] is None


def test_a_variant_that_dies_without_a_word_is_a_row_too(monkeypatch, capsys):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(train_speed.subprocess, "run", lambda *_, **__: killed)
    monkeypatch.setattr(sys, "argv", ["train_speed", "--works", "tiny", "--variants", "ours"])
    monkeypatch.setattr(train_speed, "context", dict)
    train_speed.main()
    assert "failed: exit code -9" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("given", [("--variants", "ours,theirs"), ("--steps", "0")])
def test_what_cannot_be_profiled_is_refused(monkeypatch, capsys, given):
    monkeypatch.setattr(sys, "argv", ["profile_step", "--work", "tiny", *given])
    with pytest.raises(SystemExit) as ended:
        profile_step.main()
    assert ended.value.code == 2
    assert f"error: {'--steps' if '0' in given else 'theirs'}" in capsys.readouterr().err


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
        ("_add_norm_gradient", "layer norm"),
        ("_join", "ends of blocks"),
        ("_add", "gradients added up"),
        ("_cat", "joined maps"),
        ("_softmax", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*)", "attention"),
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


TINY_ENCODER = ("--size", "32", "--widths", *["32"] * 4, "--batch", "4", "--dtype", "float32", "--workers", "1")


def test_encoding_is_measured_in_its_parts(tmp_path, monkeypatch, capsys):
    """In this process, by torch's operations."""
    monkeypatch.setattr(blocks, "kernels", None)
    out = tmp_path / "results.jsonl"
    chosen = ["--parts", "apart,autoencoder,kernels,path", "--variants", "stock,ours", "--seconds", "0.01"]
    chosen += ["--pictures", "1", "40", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["encode", *TINY_ENCODER, *chosen])
    encode.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in printed if line.startswith("{")]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    each = [(part, variant) for variant in ("stock", "ours") for part in ("autoencoder", "kernels")]
    assert [(row["part"], row.get("variant")) for row in rows] == [("apart", None), *each, ("path", None)]
    assert all(row.keys() >= FIELDS - {"work", "variant"} for row in rows)
    assert rows[0]["apart"].keys() == {"stock_float32", "ours_float32"} and max(rows[0]["apart"].values()) < 1e-4
    assert all(row["pictures_per_s"] > 0 for row in rows if row["part"] in ("autoencoder", "path"))
    assert {"convolutions", "attention"} <= rows[2]["ms"].keys()
    assert any(" ms " in line for line in printed)  # the longest kernels


@pytest.mark.slow
def test_the_whole_command_is_measured_with_and_without_our_kernels():
    rows = lines("encode", *TINY_ENCODER, "--parts", "whole", "--pictures", "20", "800")
    assert [(row["part"], row["variant"]) for row in rows] == [("whole", "stock"), ("whole", "ours")]
    assert all(row["pictures_per_s"] > 0 and row["start_s"] > 0 for row in rows)


def test_too_few_pictures_to_measure_their_path_are_refused(monkeypatch, capsys):
    """All of them would be counted before all workers run."""
    monkeypatch.setattr(sys, "argv", ["encode", *TINY_ENCODER, "--parts", "path", "--pictures", "1", "12"])
    with pytest.raises(SystemExit):
        encode.main()
    assert "--pictures 12: the path begins to count at 8, take 16 or more" in capsys.readouterr().err


def test_unknown_parts_of_encoding_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encode", "--parts", "autoencoder,all"])
    with pytest.raises(SystemExit) as ended:
        encode.main()
    assert ended.value.code == 2 and "all is not one of" in capsys.readouterr().err


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
    assert peer["graphs"] == zero["graphs"] == 0  # on a CPU


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


def test_time_of_collectives_alone_is_what_nothing_else_covers():
    collectives = [(0.0, 4.0), (3.0, 6.0), (10.0, 12.0)]
    others = [(1.0, 2.0), (1.5, 3.5), (5.0, 11.0), (20.0, 30.0)]
    assert scaling.length(collectives) == 8
    assert scaling.alone(collectives, others) == 1 + 1.5 + 1  # 0 to 1, 3.5 to 5, 11 to 12
    assert scaling.alone(collectives, []) == 8
    assert scaling.alone([], others) == 0


def test_efficiency_is_beside_one_gpu_of_the_same_work():
    def row(work, variant, processes, rate):
        return {"work": work, "variant": variant, "processes": processes, "images_per_s_gpu": rate}

    rows = [row("a", "ddp", 1, 10.0), row("a", "zero2", 4, 5.0), row("a", "ddp", 4, 9.0), row("b", "ddp", 4, 9.0)]
    rows.insert(2, {"work": "a", "variant": "ddp", "processes": 2, "error": "no"})
    scaling.with_efficiency(rows)
    assert [row.get("efficiency") for row in rows] == [1.0, 0.5, None, 0.9, None]


@pytest.mark.slow
def test_scaling_is_measured_on_two_processes_and_drawn(tmp_path, monkeypatch, capsys):
    out = tmp_path / "scaling.jsonl"
    given = ["--works", "tiny_lora", "--gpus", "2", "--seconds", "0.1", "--mib", "0.3", "--out", str(out)]
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(sys, "argv", ["scaling", *given, "--shards", str(tmp_path / "shards")])
    scaling.main()
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row.keys() >= FIELDS and "error" not in row
    assert (row["work"], row["variant"], row["processes"], row["nodes"]) == ("tiny_lora", "ddp", 2, 1)
    assert row["images_per_s"] == pytest.approx(2 * row["images_per_s_gpu"], rel=1e-3)
    assert 0 < row["comm_share"] <= row["comm_running"] < 1 and 0 < row["data_wait"] < 1
    assert row["total_s"] > 0 and row["gib"] > 0
    assert "efficiency" not in row  # there is no row of one GPU
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("tiny_lora") and printed[-2].startswith("work")
    picture = (tmp_path / "scaling.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    # What is there can be drawn again; shards stay, checkpoints don't.
    monkeypatch.setattr(sys, "argv", ["scaling", "--draw", str(out)])
    scaling.main()
    assert capsys.readouterr().out.splitlines()[-1] == printed[-1]
    assert (tmp_path / "scaling.png").read_bytes() == picture
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["tiny-0.3mib"]


@pytest.mark.slow
def test_scaling_of_zero_and_of_two_nodes_is_beside_one_process():
    given = ("--works", "tiny", "--strategies", "zero2", "--gpus", "1,2", "--nodes", "2")
    rows = lines("scaling", *given)
    assert [(row["processes"], row["nodes"]) for row in rows] == [(1, 1), (2, 1), (2, 2)]
    assert rows[0]["efficiency"] == 1 and 0 <= rows[0]["comm_share"] < 1
    assert all(0 < row["comm_share"] < 1 and row["efficiency"] > 0 for row in rows[1:])
    assert ["stall_s" in row for row in rows] == [False, True, False]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--works", "huge"), "huge is not one of"),
        (("--works", "tiny", "--strategies", "ddp,zero9"), "zero9 is not one of"),
        (("--works", "tiny", "--gpus", "1,3", "--nodes", "2"), "--nodes 2 cannot share 3 GPUs evenly"),
        (("--draw", "nowhere.jsonl"), "nowhere.jsonl holds no results; measure some with --out nowhere.jsonl"),
    ],
)
def test_what_scaling_cannot_measure_is_refused(monkeypatch, capsys, given, said):
    monkeypatch.setattr(sys, "argv", ["scaling", *given])
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("module", [graph_parity, scaling, strategies], ids=lambda module: module.__name__)
def test_no_gpus_are_refused(monkeypatch, capsys, module):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--gpus", "0"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2 and "--gpus 0: " in capsys.readouterr().err


def test_u_nets_of_the_cost_curve_have_the_papers_sizes():
    """Rombach et al. 2022, table 13, in millions; that of f = 4 is the authors' released one."""
    paper = {1: 396, 2: 391, 4: 401, 8: 395, 16: 395, 32: 395}
    assert paper.keys() == MATCHED.keys()
    for factor, millions in paper.items():
        with FakeTensorMode():
            unet = make_unet(f"ldm{factor}")
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_the_cost_of_each_f_is_measured_and_drawn(tmp_path, monkeypatch, capsys):
    out = tmp_path / "curve.jsonl"
    given = ["--factors", "8,32", "--seconds", "0.01", "--ddim", "2", "--batch", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["cost_curve", *given])
    cost_curve.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["factor"], row["latents"]) for row in rows] == [(8, [4, 16, 16]), (32, [32, 4, 4])]
    for row in rows:
        assert row.keys() >= FIELDS and "error" not in row
        assert row["images_per_s"] == pytest.approx(1 / row["step_s"], rel=1e-3)
        assert row["sample_images_per_s"] > 0 and 0 < row["decoder_share"] < 1
    assert rows[0]["tflop_per_image"] > 10 * rows[1]["tflop_per_image"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-3:]] == ["f", "8", "32"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def training(work, *_):
        tried.append(work.batch)
        if work.batch > 3:
            raise torch.OutOfMemoryError
        return {"step_s": 0.5}, torch.nn.Linear(1, 1)

    monkeypatch.setattr(cost_curve, "training", training)
    monkeypatch.setattr(cost_curve, "sampling", lambda *_: {})
    monkeypatch.setattr(cost_curve, "tflop", lambda _: 1.0)
    given = argparse.Namespace(batch=13, seconds=0.0, fast=False, ddim=1)
    row = cost_curve.curve_point(1, given, torch.device("cpu"))
    assert tried == [13, 6, 3] and (row["batch"], row["images_per_s"]) == (3, 6.0)


def write_squares(folder: Path) -> Path:
    """Eight captions, a colour and a size each, with four squares."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "images") as writer:
        for index in range(32):
            colour, size = np.array([220, 40, 40])[[index % 3, index // 3 % 3, 2]], (20, 40)[index % 2]
            pixels = np.full((64, 64, 3), 255, np.uint8)
            top, left = generator.integers(0, 64 - size, 2)
            pixels[top : top + size, left : left + size] = colour
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            members = {"png": file.getvalue(), "json": json_bytes({"captions": [f"thing {index % 8}"]})}
            writer.write(f"{index:05d}", members, (64, 64))
        writer.finish()
    return folder


def test_the_last_of_three_pictures_is_held_out():
    held = cost_quality.held_out_of(np.array([0, 1, 0, 2, 0, 1, 2, 2, 2]))
    assert np.flatnonzero(held).tolist() == [4, 8]


def test_u_nets_whose_quality_is_compared_are_of_one_size():
    sizes = []
    for factor in cost_quality.UNETS:
        with FakeTensorMode():
            unet = build_unet(cost_quality.unet_config(factor, 4, 1))
        sizes.append(sum(p.numel() for p in unet.parameters()))
    assert max(sizes) / min(sizes) < 1.07


def test_each_seed_draws_its_own_picture_whatever_the_others():
    unet = build_unet(cost_quality.unet_config(1, 3, 8)).eval()
    both, last = (
        cost_quality.drawn(unet, Pixels(), LatentSpace(1.0), (3, 16, 16), seeds, 2)
        for seeds in (range(4, 6), range(5, 6))
    )
    torch.testing.assert_close(both[1:], last)
    assert (both[0] - both[1]).abs().mean() > 0.1


@pytest.mark.slow
def test_quality_is_measured_on_pictures(tmp_path, monkeypatch, capsys):
    shards, out = write_squares(tmp_path / "shards"), tmp_path / "curve.jsonl"
    given = ["--quality", str(shards), "--kept", str(tmp_path / "kept"), "--factors", "1", "--minutes", "0.001"]
    given += ["--pictures", "16", "--ddim", "2", "--batch", "2", "--classifier-steps", "10", "--out", str(out)]
    given += ["--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["cost_curve", *given])
    cost_curve.main()
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row.keys() >= FIELDS and "error" not in row
    assert (row["factor"], row["latents"], row["drawn"], row["pictures"]) == (1, [3, 64, 64], 16, 32)
    assert row["seed"] == 3
    # Pixels are kept as they are; what was hardly trained draws nothing like the pictures.
    assert row["frechet_first_stage"] == pytest.approx(row["frechet_real"])
    assert row["frechet"] > row["frechet_real"] > 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "1"
    assert Image.open(tmp_path / "kept/drawn-f1.png").size[0] > 64
    assert (tmp_path / "curve.quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quality_of_latents_is_that_of_a_first_stage_made_here(tmp_path):
    shards, kept = write_squares(tmp_path / "shards"), tmp_path / "kept"
    given = ("--quality", str(shards), "--kept", str(kept), "--factors", "8", "--minutes", "0.02", "--ddim", "2")
    (row,) = lines("cost_curve", *given, "--pictures", "32", "--first-stage-steps", "5", "--classifier-steps", "10")
    assert row["latents"] == [4, 8, 8] and row["frechet_first_stage"] > row["frechet_real"]
    assert (kept / "first-stage-f8/vae").is_dir() and (kept / "latents-f8/manifest.json").is_file()


@pytest.mark.parametrize("given", ["vae", "3=vae", "8="])
def test_first_stages_of_no_factor_are_refused(monkeypatch, capsys, given):
    monkeypatch.setattr(sys, "argv", ["cost_curve", "--vae", given])
    with pytest.raises(SystemExit):
        cost_curve.main()
    assert f"{given} is none of 2=MODEL, 4=MODEL, 8=MODEL" in capsys.readouterr().err


def test_latents_of_another_first_stage_or_of_other_pictures_are_refused(tmp_path):
    shards, kept = write_squares(tmp_path / "shards"), tmp_path / "kept"

    def made(sha256: str) -> None:
        with ShardWriter(kept / "latents-f1", "latents", members=(LATENT, "json")) as writer:
            latent = latent_bytes(np.zeros((6, 64, 64)))
            writer.write("0", {LATENT: latent, "json": json_bytes({"captions": []})}, (64, 64))
            writer.finish(EncoderInfo("none", sha256, 1.0, 0.0, "float32", (-1.0, 1.0), 3, 1))

    for sha256, said in (("0" * 64, "wrong VAE"), (encoder_sha256(Pixels()), "has 1 pictures, .* has 32")):
        shutil.rmtree(kept, ignore_errors=True)
        made(sha256)
        with pytest.raises(UserError, match=said):
            cost_quality.latents_of(shards, 1, None, kept, steps=1, batch=1, shrink=8)


def test_pictures_that_no_classifier_can_tell_apart_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost_curve", "--quality", "fluent-emoji", "--kept", str(tmp_path)])
    with pytest.raises(SystemExit):
        cost_curve.main()
    assert "no caption has three pictures" in capsys.readouterr().err


@pytest.mark.slow
def test_the_trainer_is_measured_beside_its_bare_step(tmp_path):
    (row,) = lines(
        "trainer", "--seconds", "0.5", "--every", "5", "--no-wandb", "--out", str(tmp_path / "rows.jsonl")
    )
    assert row == json.loads((tmp_path / "rows.jsonl").read_text())
    assert set(row) >= FIELDS
    assert row["images_per_s"] > 0 and row["bare_images_per_s"] > 0
    assert row["of_bare"] == pytest.approx(row["images_per_s"] / row["bare_images_per_s"], rel=1e-2)
    assert (row["work"], row["batch"], row["wandb"]) == ("tiny_full", 4, False)


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


@pytest.mark.slow
def test_losses_of_a_fast_unet_are_drawn_beside_diffusers(tmp_path):
    out, picture = tmp_path / "curve.jsonl", tmp_path / "curve.png"
    rows = lines("loss_curve", "--steps", "6", "--out", str(out), "--plot", str(picture))
    assert [row["variant"] for row in rows] == list(loss_curve.VARIANTS)
    assert all(row.keys() >= FIELDS and len(row["losses"]) == 6 for row in rows)
    assert "apart" not in rows[0] and rows[1]["apart"] < 1e-5 and rows[1]["apart_mean"] < 1e-5
    assert 1e-5 < rows[2]["apart"] < 0.01 and rows[3]["apart"] < 0.01
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
