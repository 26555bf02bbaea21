"""What one command refuses in a section that both have, the other refuses in the same words."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import UserError, build, lr, tracking
from finetune.autoencoder import config as autoencoder
from finetune.config import Config, compose

BAD = {
    "seed": ["-1", str(2**63)],
    "optim.lr": ["0", "-1", "nan"],
    "optim.beta1": ["-0.1", "1", "2"],
    "optim.beta2": ["1", "nan"],
    "optim.eps": ["0"],
    "optim.weight_decay": ["-1"],
    "optim.max_grad_norm": ["-1"],
    "optim.schedule": ["linear"],
    "optim.warmup_images": ["-1"],
    "optim.final_lr_ratio": ["-3"],
    "ema.halflife_images": ["0", "-5"],
    "ema.rampup_ratio": ["-1"],
    "data.readers": ["0"],
    "strategy.kind": ["fsdp"],
    "strategy.offload": ["disk", "cpu"],
    "train.steps": ["0"],
    "train.global_batch": ["0"],
    "train.precision": ["fp64"],
    "train.threads": ["0"],
    "checkpoint.every": ["0"],
    "checkpoint.keep": ["0"],
    "tracker.mode": ["on"],
    "tracker.every": ["0"],
    "watch.lost_s": ["0.5"],
    "watch.stalled_s": ["-1"],
    "watch.start_s": ["0", "inf"],
    "tracker.project": ["a b/x", "''"],
    "run.dir": ["''", "s3://bucket/run"],
}
TOO_LARGE = (
    "optim.lr",
    "optim.eps",
    "optim.weight_decay",
    "optim.final_lr_ratio",
    "watch.lost_s",
    "watch.stalled_s",
)
BAD |= {key: [*BAD[key], "inf", "1e300"] for key in TOO_LARGE}
BAD |= {key: [*BAD[key], str(10**21)] for key in ("train.global_batch", "train.threads", "data.readers")}


@pytest.mark.parametrize("override", [f"{key}={value}" for key, values in BAD.items() for value in values])
def test_both_commands_refuse(override: str) -> None:
    with pytest.raises(UserError) as of_train:
        build.check(compose("train", ["data.shards=x", "model=tiny", override], Config)[0])
    with pytest.raises(UserError) as of_autoencoder:
        autoencoder.load(["data.shards=x", override])
    lines = [str(caught.value) for caught in (of_train, of_autoencoder)]
    assert all(line.startswith(override.partition("=")[0]) and "\n" not in line for line in lines)
    if "choose one of" not in lines[0]:  # of precisions and offloads each has its own
        assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["00000.tar", "manifest.json"], "it holds shards (00000.tar)"),
        (["a.txt", "b.JPG"], "it holds pictures (b.JPG)"),
        (["model_index.json", "unet"], "it holds a model (model_index.json)"),
        (["config.json", "model.safetensors"], "it holds a model (model.safetensors)"),
    ],
)
def test_a_folder_that_holds_something_else_is_no_runs(tmp_path: Path, names: list[str], says: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    words = ["data.shards=x", f"run.dir={tmp_path}"]
    for check in (
        lambda: build.check(compose("train", [*words, "model=tiny"], Config)[0]),
        lambda: autoencoder.load(words),
    ):
        with pytest.raises(UserError) as caught:
            check()
        assert f"run.dir={tmp_path} is no run's folder, {says}: choose another" in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["slurm-17.log", "wandb", "log.txt", ".submitit", "notes.json", ".doctor"],
        ["config.yaml", "preview.png"],
        ["checkpoints/", "export.safetensors"],
        [".lock", "picture.png"],
    ],
)
def test_a_folder_that_a_run_may_be_in_is_taken(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    autoencoder.load(["data.shards=x", f"run.dir={tmp_path}"])


def test_a_run_is_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    steps = [tmp_path / "checkpoints" / f"step-{step:08d}" for step in (10, 20)]
    for step in steps:
        step.mkdir(parents=True)
        (step / "trainer.json").touch()
    words = ["data.shards=x", f"checkpoint.resume={tmp_path}"]
    line = f"checkpoint.resume={tmp_path} is a run: name a checkpoint of it: {steps[0]} or {steps[1]}"
    with pytest.raises(UserError, match=f"^{line}$"):
        build.check(compose("train", [*words, "model=tiny"], Config)[0])
    with pytest.raises(UserError, match=f"^{line}$"):
        autoencoder.load(words)


@pytest.mark.parametrize("stage", [0, 4])
def test_both_commands_refuse_a_stage_that_zero_has_not(stage: int) -> None:
    words = ["data.shards=x", "strategy=zero1", f"strategy.stage={stage}"]
    for check in (lambda: build.check(compose("train", words, Config)[0]), lambda: autoencoder.load(words)):
        with pytest.raises(UserError, match=f"^strategy.stage={stage} is not known: choose 1, 2 or 3$"):
            check()


@pytest.mark.parametrize(
    "override",
    [
        *(f"optim.schedule={name}" for name in lr.SCHEDULES),
        *(f"tracker.mode={name}" for name in tracking.MODES),
        *("seed=0", f"seed={2**63 - 1}", "optim.beta1=0", "optim.max_grad_norm=0", "train.threads=1"),
        *("ema.rampup_ratio=0", "watch.lost_s=0"),
    ],
)
def test_both_commands_take(override: str) -> None:
    build.check(compose("train", ["data.shards=x", "model=tiny", override], Config)[0])
    autoencoder.load(["data.shards=x", override])
