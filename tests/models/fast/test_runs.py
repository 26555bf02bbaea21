"""`finetune train` with a fast U-Net: losses of the eager one, over several ranks too, and exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune import loop
from finetune.models import fast
from finetune.models.fast import blocks
from finetune.models.unet import build_unet
from tests.conftest import UNET, metrics
from tests.strategies.conftest import spawn
from tests.strategies.test_parity import apart, tensors
from tests.test_train import parts_of, same_files

SMALL = [  # one level
    "model.unet.down_block_types=[CrossAttnDownBlock2D]",
    "model.unet.up_block_types=[CrossAttnUpBlock2D]",
    "model.unet.block_out_channels=[16]",
]
LORA = ["adapter=lora", "adapter.rank=2", "adapter.alpha=4", "model.unet={}"]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def require_following(found: Path, wanted: Path, steps: int) -> None:
    """Each step's loss and gradient norm, and each validation's loss."""
    assert len(losses(found)) == steps
    lines = metrics(found), metrics(wanted)
    for name in ("loss", "grad_norm", "validation/loss"):
        one, other = ([line[name] for line in each if name in line] for each in lines)
        assert one == pytest.approx(other, rel=1e-4), name


@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_losses_are_those_of_the_eager_unet(overrides, pipeline, tmp_path, command, fastened, adapter):
    settings = [*overrides, "train.steps=8", "train.micro_batch=4", "validation.every=4", "checkpoint.every=8"]
    settings += [*LORA, f"model.pretrained={pipeline}"] if adapter == "lora" else SMALL
    assert command("train", *settings, "model.fast=false", f"run.dir={tmp_path / 'eager'}") == (0, "")
    assert not fastened
    assert command("train", *settings, f"run.dir={tmp_path / 'fast'}") == (0, "")
    assert len(fastened) == 1
    require_following(tmp_path / "fast", tmp_path / "eager", 8)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("more", [[], ["model.gradient_checkpointing=true"]], ids=["", "checkpointing"])
def test_losses_of_a_longer_run(overrides, tmp_path, command, fastened, more):
    settings = [*overrides, *more, "train.steps=200", "checkpoint.every=200", "validation.every=50"]
    assert command("train", *settings, "model.fast=false", f"run.dir={tmp_path / 'eager'}") == (0, "")
    assert command("train", *settings, f"run.dir={tmp_path / 'fast'}") == (0, "")
    require_following(tmp_path / "fast", tmp_path / "eager", 200)


@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(overrides, pipeline, tmp_path, command, fastened, monkeypatch, adapter):
    settings = [*overrides, "train.steps=7", "checkpoint.every=4", "checkpoint.keep=9", "train.micro_batch=4"]
    settings += [*LORA, f"model.pretrained={pipeline}"] if adapter == "lora" else SMALL
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert command("train", *settings, f"run.dir={calm}") == (0, "")

    class KilledError(Exception):
        pass

    original, steps = loop.optimizer_step, []

    def until(*args: object, **settings: object) -> object:
        steps.append(0)
        if len(steps) > 5:
            raise KilledError
        return original(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", until)
        with pytest.raises(KilledError):
            command("train", *settings, f"run.dir={rough}")
    assert command("train", *settings, f"run.dir={rough}") == (0, "")
    assert metrics(rough) == metrics(calm)
    for step in (4, 7):
        same_files(calm / f"checkpoints/step-{step:08d}", rough / f"checkpoints/step-{step:08d}")


@pytest.mark.slow
def test_checkpoints_are_those_of_any_other_run(overrides, tmp_path, command, fastened):
    """An eager run goes on from a fast one's, and the other way round."""
    settings = [*overrides, *SMALL, "train.steps=8", "checkpoint.every=4", "checkpoint.keep=9"]
    assert command("train", *settings, "model.fast=false", f"run.dir={tmp_path / 'eager'}") == (0, "")
    for first, then in (("true", "false"), ("false", "true")):
        run = tmp_path / f"from-{first}"
        assert command("train", *settings, "train.steps=4", f"model.fast={first}", f"run.dir={run}") == (0, "")
        assert command("train", *settings, f"model.fast={then}", f"run.dir={run}") == (0, "")
        require_following(run, tmp_path / "eager", 8)
    assert len(fastened) == 2


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ([], True),
        (["model.fast=false"], False),
        (["strategy=zero1"], True),
        (["strategy=zero2"], True),
        (["strategy=zero2", "strategy.offload=cpu"], True),
        (["strategy=zero3"], True),
        (["adapter=lora", "adapter.dora=true", "model.unet={}"], True),
    ],
    ids=["default", "off", "zero1", "zero2", "zero2-offload", "zero3", "dora"],
)
def test_where_unets_are_made_fast(overrides, pipeline, monkeypatch, fastened, more, made):
    told = []

    def strategy(*_, is_fast):
        told.append(is_fast)
        return type("Strategy", (), {"shards": []})()

    monkeypatch.setattr("finetune.build.make_strategy", strategy)
    more = [*more, f"model.pretrained={pipeline}"] if "adapter=lora" in more else more
    _, parts = parts_of(overrides, *more)
    assert fastened == ([parts.model.unet] if made else [])
    assert told == [made]


@pytest.mark.parametrize(
    ("more", "copied"),
    [
        (["train.micro_batch=2"], True),
        (["train.micro_batch=4"], False),  # the whole batch: cast once as it is
        (["train.micro_batch=2", "model.fast=false"], False),
        (["train.micro_batch=2", "train.precision=fp32"], False),
        (["train.micro_batch=2", "adapter=lora", "model.unet={}"], False),  # its weights are few
    ],
    ids=["accumulating", "whole", "off", "fp32", "lora"],
)
def test_where_weights_are_cast_once_a_step(overrides, pipeline, fastened, more, copied):
    more = [*more, f"model.pretrained={pipeline}"] if "adapter=lora" in more else more
    _, parts = parts_of([*overrides, "train.global_batch=4", "train.precision=bf16"], *more)
    assert (parts.strategy.copies is not None) == copied


def test_nothing_is_made_fast_on_a_cpu(overrides):
    _, parts = parts_of(overrides)
    assert not any(isinstance(module, blocks.Resnet) for module in parts.model.unet.modules())


def test_what_is_missing_is_told_and_the_unet_stays_as_it_was(overrides, monkeypatch, fastened):
    monkeypatch.setattr(fast, "missing", lambda: "a C compiler")
    _, parts = parts_of(overrides)
    assert not any(isinstance(module, blocks.Resnet) for module in parts.model.unet.modules())
    (notice,) = [notice for notice in parts.notices if "model.fast" in notice]
    assert "needs a C compiler" in notice
    monkeypatch.setattr(fast, "missing", lambda: None)
    _, parts = parts_of(overrides)
    assert not [notice for notice in parts.notices if "model.fast" in notice]


def launched(folder: Path, jobs: dict[str, tuple[list[str], str | None]]) -> dict[str, Path]:
    """Folders of runs of two processes, made in one launch: by name (overrides, the run that one goes on from)."""
    runs = {name: folder / name for name in jobs}
    told = [
        {"run": str(runs[name]), "start": start and str(runs[start]), "overrides": settings}
        for name, (settings, start) in jobs.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(told))
    print(spawn(2, Path(__file__).with_name("driver.py"), str(folder / "jobs.json")))
    return runs


def over_ranks(overrides: list[str], folder: Path, *more: str) -> tuple[Path, Path]:
    """(fast, eager) runs of two processes."""
    settings = [*overrides, "train.steps=8", "checkpoint.every=8", "train.micro_batch=2", *more, "strategy=ddp"]
    runs = launched(
        folder, {name: ([*settings, f"model.fast={name == 'fast'}"], None) for name in ("fast", "eager")}
    )
    return runs["fast"], runs["eager"]


@pytest.mark.slow
def test_losses_over_ranks(overrides, tmp_path):
    require_following(*over_ranks(overrides, tmp_path, *SMALL), 8)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["model.gradient_checkpointing=true"]], ids=["", "checkpointing"])
def test_adapters_over_ranks(overrides, pipeline, tmp_path, more):
    require_following(*over_ranks(overrides, tmp_path, *LORA, f"model.pretrained={pipeline}", *more), 8)


def six_steps(overrides: list[str], *more: str) -> list[str]:
    """With accumulation, averages, and a checkpoint after three."""
    settings = [*overrides, "train.steps=6", "checkpoint.every=3", "train.global_batch=8", "train.micro_batch=2"]
    return [*settings, "ema.sigma_rels=[0.1]", "ema.snapshot_every=3", *more]


def require_same_training(found: Path, wanted: Path, tolerance: float) -> None:
    """Losses, and weights, averages and moments of the last checkpoint."""
    assert len(losses(found)) == 6
    assert losses(found) == pytest.approx(losses(wanted), rel=tolerance)
    for part in ("weights", "ema", "optimizer"):
        last = "checkpoints/step-00000006"
        assert apart(tensors(wanted, part, last), tensors(found, part, last)) < tolerance, part


@pytest.fixture(scope="module")
def one_level(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline with a U-Net of fewer blocks."""
    folder = tmp_path_factory.mktemp("one-level") / "tiny"
    shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("unet"))
    shape = {"block_out_channels": [16], "down_block_types": UNET["down_block_types"][:1]}
    shape["up_block_types"] = UNET["up_block_types"][1:]
    build_unet(UNET | shape, seed=2).save_pretrained(folder / "unet")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_zero_with_fast_unets_is_eager_ddp(overrides, one_level, tmp_path):
    """In float32: all weights under ZeRO-2 and 3, going on under DDP with their layout of memory, and adapters."""
    full = six_steps(overrides, *SMALL)
    lora = six_steps(overrides, *LORA, f"model.pretrained={one_level}")
    runs = launched(
        tmp_path,
        {
            "full": ([*full, "model.fast=false"], None),
            "full-zero2": ([*full, "strategy=zero2"], None),
            "full-zero2-ddp": ([*full], "full-zero2"),
            "full-zero3": ([*full, "strategy=zero3"], None),
            "lora": ([*lora, "model.fast=false"], None),
            "lora-zero1": ([*lora, "strategy=zero1"], None),
            "lora-zero3": ([*lora, "strategy=zero3"], None),
        },
    )
    for name in ("full-zero2", "full-zero2-ddp", "full-zero3", "lora-zero1", "lora-zero3"):
        require_same_training(runs[name], runs[name.partition("-")[0]], 1e-5)
    assert losses(runs["full-zero2-ddp"])[:3] == losses(runs["full-zero2"])[:3]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("more", [[], ["model.gradient_checkpointing=true"]], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_zero_with_fast_unets_in_each_precision(overrides, pipeline, tmp_path, adapter, more):
    """ZeRO's weights are bf16, DDP's are cast: fast runs are as far from eager DDP as eager ZeRO is."""
    settings = six_steps(
        overrides, *more, *(SMALL if adapter == "full" else [*LORA, f"model.pretrained={pipeline}"])
    )
    jobs = {}
    for precision in ("fp32", "bf16"):
        own = [*settings, f"train.precision={precision}"]
        jobs[precision] = ([*own, "model.fast=false"], None)
        jobs[f"{precision}-eager"] = ([*own, "model.fast=false", "strategy=zero2"], None)
        for stage in (1, 2, 3):
            jobs[f"{precision}-zero{stage}"] = ([*own, f"strategy=zero{stage}"], None)
    runs = launched(tmp_path, jobs)
    for stage in (1, 2, 3):
        require_same_training(runs[f"fp32-zero{stage}"], runs["fp32"], 1e-5)
        for part in ("weights", "ema"):
            wanted, eager, found = (
                tensors(runs[name], part, "checkpoints/step-00000006")
                for name in ("bf16", "bf16-eager", f"bf16-zero{stage}")
            )
            assert 0 < apart(wanted, found) < 1.3 * apart(wanted, eager), part
        assert losses(runs[f"bf16-zero{stage}"]) == pytest.approx(losses(runs["bf16"]), rel=3e-3)
