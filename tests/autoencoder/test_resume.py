"""A first-stage run killed at any moment goes on to the same bits."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import UserError
from finetune.autoencoder import checkpoint
from finetune.autoencoder.train import main
from finetune.checkpoint import write_record
from finetune.data.shards import ShardSet, ShardWriter
from finetune.models.autoencoder import encode_moments, load_autoencoder
from tests.autoencoder.runs import arguments, assert_same_run, losses
from tests.autoencoder.vgg import heads, vgg16

DISCRIMINATOR = [
    "loss.discriminator_weight=0.5",
    "loss.discriminator_layers=1",  # the shortest side of the pictures is 8
    "loss.discriminator_width=8",
    "loss.discriminator_lr=2e-3",
]
COMMAND = "import sys, finetune, finetune.autoencoder.train as t; finetune.run_cli(lambda: t.main(sys.argv[1:]))"


def joining(step: int) -> list[str]:
    return [*DISCRIMINATOR, f"loss.discriminator_start={step}"]


@pytest.mark.slow
@pytest.mark.parametrize("discriminator", [False, True])
def test_sigkill_and_the_same_command_end_in_the_same_bits(
    shards: Path, tmp_path: Path, discriminator: bool
) -> None:
    steps = 40
    more = (f"train.steps={steps}", "checkpoint.every=7", *(joining(10) if discriminator else ()))
    command = [sys.executable, "-c", COMMAND, *arguments(shards, tmp_path / "killed", *more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    first = tmp_path / "killed" / "checkpoints" / "step-00000007"
    while process.poll() is None and not first.exists():
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "vae").exists()
    with metrics.open("a") as log:  # a line cut off by the kill, and one of a step that will come again
        log.write('{"step": 39, "loss": 1.0}\n{"step": 8, "lo')

    resumed = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "resuming from" in resumed.stdout

    main(arguments(shards, tmp_path / "straight", *more))
    assert_same_run(tmp_path / "killed", tmp_path / "straight", steps, discriminator)
    rows = losses(tmp_path / "killed")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["step"] for row in rows if "adversarial" in row] == (list(range(11, 41)) if discriminator else [])
    kept = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert kept == ["step-00000028", "step-00000035", "step-00000040"]


def test_a_run_goes_on_before_and_after_its_discriminator_joins(shards: Path, tmp_path: Path) -> None:
    """From step 2 across its first step, 4, and from step 4 with its weights and moments: the same bits."""
    more = ("train.steps=6", "checkpoint.every=2", *joining(3))
    straight = tmp_path / "straight"
    main(arguments(shards, straight, *more))
    assert not (straight / "checkpoints/step-00000002/discriminator").exists()
    for last in (2, 4):
        resumed = tmp_path / f"from-{last}"
        shutil.copytree(straight, resumed)
        shutil.rmtree(resumed / "vae")
        for folder in (resumed / "checkpoints").iterdir():
            if folder.name > f"step-{last:08d}":
                shutil.rmtree(folder)
        main(arguments(shards, resumed, *more))
        assert_same_run(straight, resumed, 6, discriminator=True)
    plain = tmp_path / "plain"
    main(arguments(shards, plain, *more, "loss.discriminator_start=5"))
    assert losses(plain)[:3] == losses(straight)[:3]
    assert losses(plain)[4]["l1"] != losses(straight)[4]["l1"]  # it did move the autoencoder


def test_a_run_without_its_discriminators_state_is_refused(shards: Path, tmp_path: Path) -> None:
    """As of a version that knew none: its settings are not in the record."""
    run = tmp_path / "run"
    main(arguments(shards, run, "train.steps=3"))
    record = run / "checkpoints/step-00000003/trainer.json"
    saved = json.loads(record.read_text())
    saved["depends_on"] = {k: v for k, v in saved["depends_on"].items() if "discriminator" not in k}
    record.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="has no discriminator, and this run has had one for 2 steps"):
        main(arguments(shards, run, "train.steps=6", *joining(1)))


def test_pictures_too_small_for_the_discriminator_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"discriminator_layers=2 needs sides of 12 pixels at least, .* has 8"):
        main(arguments(shards, tmp_path / "run", "loss.discriminator_weight=1", "loss.discriminator_layers=2"))


def test_lpips_is_named_when_it_is_off_and_known_by_its_weights(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file may be moved, and a run goes on with the same bits; other weights are refused."""
    tensors = vgg16() | heads()
    first, moved, other = (tmp_path / name for name in ("lpips.safetensors", "moved.safetensors", "other.pth"))
    save_file(tensors, first)
    run, straight = tmp_path / "run", tmp_path / "straight"
    square = "data.size=16"  # VGG16 halves a side four times
    main(arguments(shards, straight, square, f"loss.lpips={first}", "train.steps=4", "optim.schedule=constant"))
    main(arguments(shards, run, square, f"loss.lpips={first}", "train.steps=2", "optim.schedule=constant"))
    assert "LPIPS" not in capsys.readouterr().out
    first.rename(moved)
    main(arguments(shards, run, square, f"loss.lpips={moved}", "train.steps=4", "optim.schedule=constant"))
    assert_same_run(run, straight, 4)
    for row in losses(run):
        assert row["lpips"] > 0
        assert row["loss"] == pytest.approx(row["l1"] + row["lpips"] + 1e-6 * row["kl"] / (3 * 16 * 16), rel=1e-5)

    torch.save(tensors | {"features.0.bias": torch.ones(64)}, other)
    with pytest.raises(UserError, match=r"loss.lpips \(weights' sha256\) is another now"):
        main(arguments(shards, run, square, f"loss.lpips={other}", "train.steps=5", "optim.schedule=constant"))
    with pytest.raises(UserError, match=r"loss.lpips \(weights' sha256\) is another now"):
        main(arguments(shards, run, square, "train.steps=5", "optim.schedule=constant"))
    assert capsys.readouterr().out.count("LPIPS is off: with loss.lpips=FILE") == 1
    with pytest.raises(UserError, match="loss.lpips=/nope: there is no such file"):
        main(arguments(shards, tmp_path / "none", square, "loss.lpips=/nope"))
    with pytest.raises(UserError, match="loss.lpips needs sides of 16 pixels at least, and the shortest .* has 8"):
        main(arguments(shards, tmp_path / "small", f"loss.lpips={moved}"))


def test_pictures_may_be_moved_but_not_changed(shards: Path, tmp_path: Path) -> None:
    """A run knows its pictures by what they are."""
    run, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    main(arguments(shards, run, "train.steps=2"))
    shutil.copytree(shards, moved)
    main(arguments(moved, run, "train.steps=3"))
    with ShardWriter(other, "images") as writer:
        for number in range(30):
            writer.write(f"{number}", {"png": ShardSet.open(shards).read_member(number, "png")}, (16, 16))
        writer.finish()
    with pytest.raises(UserError, match=r"data.shards \(manifest's sha256\) is another now; give what"):
        main(arguments(other, run, "train.steps=4"))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    main(arguments(shards, run, "train.steps=6", "checkpoint.every=3"))
    return run


def test_the_same_command_goes_on_from_what_came_of_a_named_checkpoint(
    shards: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, named = tmp_path / "run", finished / "checkpoints/step-00000003"
    for steps, begins in (4, named), (5, run / "checkpoints/step-00000004"):
        main(arguments(shards, run, f"train.steps={steps}", "checkpoint.every=3", f"checkpoint.resume={named}"))
        assert f"resuming from {begins}" in capsys.readouterr().out


def damage(checkpoint: Path) -> None:
    weights = checkpoint / "weights/vae/diffusion_pytorch_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))


def test_the_folder_of_a_run_of_finetune_train_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-00000003/weights/unet").mkdir(parents=True)
    same = {"seed": 0, "train.global_batch": 4}  # what both commands depend on, and likely have alike
    write_record(tmp_path / "checkpoints/step-00000003", {"step": 3, "depends_on": same})
    with pytest.raises(UserError, match="no checkpoint of finetune autoencoder: .* choose another run.dir"):
        main(arguments(shards, tmp_path, "train.steps=6"))


def test_a_broken_checkpoint_is_passed_over(
    shards: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main(arguments(shards, run, "train.steps=6", "checkpoint.every=3"))
    damage(run / "checkpoints/step-00000006")
    with pytest.warns(UserWarning, match="passing over the broken checkpoint .*step-00000006.*checksum"):
        main(arguments(shards, run, "train.steps=6", "checkpoint.every=3"))
    assert "resuming from" in capsys.readouterr().out
    assert_same_run(run, finished, 6)


def test_training_outlives_a_disk_that_refuses_a_save(
    shards: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """But not its last save, which is tried twice."""
    run, original = tmp_path / "run", checkpoint.publish
    refused: list[str] = []

    def publish(temporary: Path, final: Path) -> None:
        if len(refused) < 2:
            refused.append(final.name)
            raise OSError(errno.ENOSPC, "No space left on device")
        original(temporary, final)

    monkeypatch.setattr(checkpoint, "publish", publish)
    main(arguments(shards, run, "train.steps=6", "checkpoint.every=3"))
    assert refused == ["step-00000003", "step-00000006"]
    assert "warning: cannot save" in capsys.readouterr().out
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert_same_run(run, finished, 6)

    refused.clear()
    with pytest.raises(UserError, match="make room and start the same command again"):
        main(arguments(shards, tmp_path / "other", "train.steps=2", "checkpoint.every=3"))


@pytest.mark.filterwarnings("ignore:passing over")
def test_a_broken_checkpoint_does_not_push_out_a_whole_one(shards: Path, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    damage(run / "checkpoints/step-00000006")
    main(arguments(shards, run, "train.steps=7", "checkpoint.every=7", "checkpoint.keep=2"))
    kept = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert kept == ["step-00000003", "step-00000007"]


def test_the_saved_autoencoder_has_unit_latents(shards: Path, finished: Path) -> None:
    """diffusers' loader reads it, and z * scaling_factor has std 1 over the training pictures' posteriors."""
    from finetune.autoencoder.pictures import Pictures
    from finetune.models.autoencoder import to_signed

    vae = load_autoencoder(finished / "vae")
    pictures = Pictures(str(shards), size=None, held_out=64, seed=0, multiple=2, cache_bytes=0, readers=1)
    total = square = count = 0.0
    for bucket, ids in enumerate(pictures.train_ids):
        moments = encode_moments(vae, to_signed(pictures.read(bucket, ids))).double()
        mean, std = moments.chunk(2, dim=1)
        total, square, count = total + mean.sum(), square + (mean**2 + std**2).sum(), count + mean.numel()
    variance = square / count - (total / count) ** 2
    assert (variance.sqrt() * vae.config.scaling_factor).item() == pytest.approx(1.0, abs=1e-4)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}


def test_held_out_pictures_are_measured(shards: Path, finished: Path, tmp_path: Path) -> None:
    """PSNR over all of them, SSIM over those with room for its window (8 x 24 has none)."""
    from finetune.autoencoder.measure import psnr, reconstruct, ssim
    from finetune.autoencoder.pictures import Pictures

    vae = load_autoencoder(finished / "vae")
    pictures = Pictures(str(shards), size=None, held_out=64, seed=0, multiple=2, cache_bytes=0, readers=1)
    decibels, similarities = [], []
    for bucket, ids in enumerate(pictures.held_out_ids):
        pixels = pictures.read(bucket, ids)
        recon = reconstruct(vae, pixels)
        decibels += psnr(pixels, recon).tolist()
        similarities += ssim(pixels, recon).tolist() if min(pixels.shape[1:3]) >= 11 else []
    assert 0 < len(similarities) < len(decibels)
    result = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["held_out_psnr_db"] == pytest.approx(np.mean(decibels), abs=0.01)
    assert result["held_out_ssim"] == pytest.approx(np.mean(similarities), abs=1e-3)


def test_the_average_is_what_is_saved(finished: Path) -> None:
    step = finished / "checkpoints/step-00000006"
    saved = load_file(finished / "vae/diffusion_pytorch_model.safetensors")
    average = load_file(step / "ema/vae/diffusion_pytorch_model.safetensors")
    weights = load_file(step / "weights/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[key], average[key]) for key in saved)
    assert any(not torch.equal(saved[key], weights[key]) for key in saved)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["train.steps=9", "optim.lr=2e-3"], "optim.lr was 0.001 and is 0.002"),
        (["train.steps=9", "seed=1"], "seed was 0 and is 1"),
        (["train.steps=3"], "is at step 6, beyond train.steps=3"),
        (["train.steps=9", "checkpoint.resume=never"], "holds another run"),
        (["train.steps=9", "train.global_batch=512"], "lower train.global_batch"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(shards: Path, finished: Path, more: list[str], line: str) -> None:
    before = losses(finished)
    with pytest.raises(UserError, match=line):
        main([*arguments(shards, finished), "checkpoint.every=3", *more])
    assert losses(finished) == before


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_checkpoints_on_a_disk_that_is_not_mounted_are_not_taken_for_none(
    shards: Path, tmp_path: Path, resume: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "away")
    with pytest.raises(UserError, match=r"is a link to \S+away, which is not there: mount it"):
        main(arguments(shards, tmp_path / "run", "train.steps=1", f"checkpoint.resume={resume}"))


def test_a_folder_in_use_is_refused(shards: Path, tmp_path: Path) -> None:
    from finetune.checkpoint import RunFolder

    holder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="in use by process"):
        main(arguments(shards, tmp_path / "run", "train.steps=1"))
    holder.close()


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite at step .* lower optim.lr"):
        main(arguments(shards, run, "train.steps=20", "optim.lr=1e14", "optim.warmup_images=0"))
    assert list((run / "checkpoints").iterdir()) == []
    assert not (run / "vae").exists()
