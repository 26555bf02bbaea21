"""`finetune train` with a fast U-Net: losses of the eager one, over several ranks too, and exact resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune import loop
from finetune.models import fast
from finetune.models.fast import blocks
from tests.conftest import metrics
from tests.strategies.conftest import spawn
from tests.test_train import parts_of, same_files

SMALL = [  # one level: blocks take a second each to compile
    "model.unet.down_block_types=[CrossAttnDownBlock2D]",
    "model.unet.up_block_types=[CrossAttnUpBlock2D]",
    "model.unet.block_out_channels=[16]",
]
LORA = ["adapter=lora", "adapter.rank=2", "adapter.alpha=4", "model.unet={}"]


@pytest.fixture
def fastened(compiled: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """U-Nets are made fast, as on a GPU; a call says how many graphs were compiled so far."""
    monkeypatch.setattr(fast, "available", lambda device: True)
    monkeypatch.setattr(fast, "missing", lambda: None)
    return compiled


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
    assert fastened() == 0
    assert command("train", *settings, f"run.dir={tmp_path / 'fast'}") == (0, "")
    assert fastened() > 0
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
def test_checkpoints_are_those_of_any_other_run(overrides, tmp_path, command, fastened, monkeypatch):
    """An eager run goes on from a fast one's, and the other way round."""
    made, original = [], fast.make_fast
    monkeypatch.setattr(fast, "make_fast", lambda *args, **settings: made.append(0) or original(*args, **settings))
    settings = [*overrides, *SMALL, "train.steps=8", "checkpoint.every=4", "checkpoint.keep=9"]
    assert command("train", *settings, "model.fast=false", f"run.dir={tmp_path / 'eager'}") == (0, "")
    for first, then in (("true", "false"), ("false", "true")):
        run = tmp_path / f"from-{first}"
        assert command("train", *settings, "train.steps=4", f"model.fast={first}", f"run.dir={run}") == (0, "")
        assert command("train", *settings, f"model.fast={then}", f"run.dir={run}") == (0, "")
        require_following(run, tmp_path / "eager", 8)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ([], True),
        (["model.fast=false"], False),
        (["strategy=zero2"], False),
        (["strategy=zero3"], False),  # weights are there only while their module is called
        (["adapter=lora", "adapter.dora=true", "model.unet={}"], True),
    ],
    ids=["default", "off", "zero2", "zero3", "dora"],
)
def test_where_unets_are_made_fast(overrides, pipeline, monkeypatch, fastened, more, made):
    seen, graphs_of = [], []
    monkeypatch.setattr(fast, "make_fast", lambda unet, compiled: seen.append((unet, compiled)))

    def strategy(*_, graphs):
        graphs_of.append(graphs)
        return type("Strategy", (), {"shards": []})()

    monkeypatch.setattr("finetune.build._strategy", strategy)
    more = [*more, f"model.pretrained={pipeline}"] if "adapter=lora" in more else more
    _, parts = parts_of(overrides, *more)
    assert seen == ([(parts.model.unet, True)] if made else [])
    assert graphs_of == [made]


def test_nothing_is_made_fast_on_a_cpu(overrides):
    _, parts = parts_of(overrides)
    assert not any(isinstance(module, blocks.Region) for module in parts.model.unet.modules())


def test_what_is_missing_is_told_and_the_unet_stays_as_it_was(overrides, monkeypatch, fastened):
    monkeypatch.setattr(fast, "missing", lambda: "a C compiler")
    _, parts = parts_of(overrides)
    assert not any(isinstance(module, blocks.Region) for module in parts.model.unet.modules())
    (notice,) = [notice for notice in parts.notices if "model.fast" in notice]
    assert "needs a C compiler" in notice
    monkeypatch.setattr(fast, "missing", lambda: None)
    _, parts = parts_of(overrides)
    assert not [notice for notice in parts.notices if "model.fast" in notice]


def over_ranks(overrides: list[str], folder: Path, *more: str) -> tuple[Path, Path]:
    """(fast, eager) runs of two processes, in one launch."""
    settings = [*overrides, "train.steps=8", "checkpoint.every=8", "train.micro_batch=2", *more, "strategy=ddp"]
    jobs = [
        {"run": str(folder / name), "start": None, "overrides": [*settings, f"model.fast={name == 'fast'}"]}
        for name in ("fast", "eager")
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    spawn(2, Path(__file__).with_name("driver.py"), str(folder / "jobs.json"))
    return folder / "fast", folder / "eager"


@pytest.mark.slow
def test_losses_over_ranks(overrides, tmp_path):
    require_following(*over_ranks(overrides, tmp_path, *SMALL), 8)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["model.gradient_checkpointing=true"]], ids=["", "checkpointing"])
def test_adapters_over_ranks(overrides, pipeline, tmp_path, more):
    require_following(*over_ranks(overrides, tmp_path, *LORA, f"model.pretrained={pipeline}", *more), 8)


def test_torch_is_as_it_was():
    """Nothing above leaks into other tests of this process."""
    assert torch.compile.__module__ == "torch"
