"""A first-stage run in W&B and in metrics.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from finetune.autoencoder.train import main
from tests.autoencoder.runs import arguments


@pytest.mark.usefixtures("logged_out")
def test_wandb_offline_is_one_run_over_a_restart(shards: Path, tmp_path: Path) -> None:
    """Real W&B, no network: lines, reconstructions and measures, under one id."""
    run = tmp_path / "run"
    more = ("tracker=wandb", "sample.every=1", "optim.schedule=constant")
    main(arguments(shards, run, *more, "train.steps=2"))
    main(arguments(shards, run, *more, "train.steps=3"))
    identity = (run / "wandb-id").read_text().strip()
    records = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert [record.name for record in records] == [f"run-{identity}.wandb"] * 2
    wanted = (b"images_seen", b"grad_norm", b"held_out_psnr_db", b"codebook_size")
    ends = time.monotonic() + 20
    while any(key not in record.read_bytes() for record in records for key in wanted):
        assert time.monotonic() < ends  # W&B's process writes on for a moment
        time.sleep(0.05)
    for folder, steps in zip(sorted(run.glob("wandb/offline-run-*")), [(1, 2), (3,)], strict=True):
        ours = {(run / "samples" / f"step-{step:08d}.png").stat().st_size for step in steps}
        assert {path.stat().st_size for path in folder.glob("files/media/images/samples_*.png")} == ours


def test_lines_of_metrics(shards: Path, tmp_path: Path) -> None:
    """The measures of an end come once, last, however often the run comes to it, and go when it goes on."""
    run = tmp_path / "run"
    ends = ("train.steps=4", "train.steps=4", "train.steps=5")
    for end in ends:
        main(arguments(shards, run, end, "tracker.every=3", "checkpoint.every=2", "optim.schedule=constant"))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [2, 3, 4, 4] if end == "train.steps=4" else [2, 3, 4, 5, 5]
        assert [line["step"] for line in lines] == steps
        common = {"step", "images_seen", "loss", "l1", "kl", "grad_norm", "lr", "images_per_s"}
        assert all(line.keys() == common for line in lines[:-1])
        assert lines[-1].keys() == {"step", "latent_std", "scaling_factor", "held_out_psnr_db", "held_out_ssim"}
