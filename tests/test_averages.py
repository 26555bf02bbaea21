"""Several averages of one run: kept, saved, gone on with, and chosen from."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import UserError, build
from finetune.checkpoint import checkpoints, find_fault
from finetune.config import Config, compose
from finetune.ema import HalfLife, Power
from finetune.models.adapters import LORA_FILE
from finetune.runs import find_checkpoint
from tests.test_train import parts_of

Command = Callable[..., tuple[int, str]]
SEVERAL = ["ema.halflives_images.short=8", "ema.halflives_images.long=24", "ema.sigma_rels=[0.1]"]
SEVERAL += ["ema.rampup_ratio=1"]
UNET = "unet/diffusion_pytorch_model.safetensors"


def test_the_first_is_what_is_shown_and_the_others_have_names(overrides: list[str]) -> None:
    _, parts = parts_of(overrides, *SEVERAL, "ema.halflife_images=80")
    assert [(it.name, it.profile) for it in parts.averages] == [
        ("ema", HalfLife(80, 1)),
        ("ema-short", HalfLife(8, 1)),
        ("ema-long", HalfLife(24, 1)),
        ("ema-power-0.1", Power(0.1)),
    ]
    with torch.no_grad():
        for number, average in enumerate(parts.averages):
            for tensor in average.tensors:
                tensor.fill_(number + 1.0)
        with parts.evaluating():
            assert all((shard.master == 1).all() for shard in parts.strategy.shards)
    _, parts = parts_of(overrides, "ema=power", "ema.halflives_images.short=8")
    assert {it.name: it.profile for it in parts.averages} == {
        "ema": Power(0.05), "ema-short": HalfLife(8, 0.05), "ema-power-0.1": Power(0.1)
    }  # fmt: skip
    assert parts_of(overrides, "ema=none", *SEVERAL)[1].averages == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ema.halflives_images.short=0"], "ema.halflives_images.short=0 must be greater than 0"),
        (["ema.halflives_images.a.b=5"], "ema.halflives_images.a.b: an average's name is letters"),
        (["ema.halflives_images.power-1=5"], "power-1: an average's name is letters"),
        (["ema.sigma_rels=[0.05,0.3]"], "ema.sigma_rels has 0.3, which is a share of the run: 0.001 to 0.2887"),
        (["ema.sigma_rels=[0.1,0.10]"], "has one twice"),
        (["ema.kind=power"], "ema.kind=power needs lengths: set ema.sigma_rels"),
        (["ema.snapshot_every=2"], "ema.snapshot_every=2 keeps averages by power functions, but there is none"),
        (["ema=power", "ema.snapshot_keep=0"], "ema.snapshot_keep=0 must be greater than 0"),
        (["ema=power", "ema.snapshot_every=-2"], "ema.snapshot_every=-2 must not be negative"),
        (["ema.kind=cosine"], "ema.kind=cosine is not known: choose one of halflife, power"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        build.check(compose("train", [*overrides, *words], Config)[0])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_that_goes_on_keeps_all_its_averages(overrides: list[str], tmp_path: Path, command: Command) -> None:
    """Those that are added later begin at the weights; another kind of average under an old name is refused."""
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert command("train", *overrides, *SEVERAL, f"run.dir={calm}")[0] == 0
    assert command("train", *overrides, *SEVERAL, f"run.dir={rough}")[0] == 0
    shutil.rmtree(rough / "checkpoints/step-00000004")
    assert command("train", *overrides, *SEVERAL, f"run.dir={rough}")[0] == 0
    records = [json.loads((run / "checkpoints/step-00000004/trainer.json").read_text()) for run in (calm, rough)]
    assert records[0] == records[1]
    assert records[0]["averages"]["ema-power-0.1"] == {"sigma_rel": 0.1, "since_images": 0}
    last = calm / "checkpoints/step-00000004"
    names = ["weights", "ema", "ema-short", "ema-long", "ema-power-0.1"]
    means = [load_file(last / name / UNET)["conv_in.weight"].mean().item() for name in names]
    assert len(set(means)) == len(names), "averages of different lengths differ"

    code, line = command("train", *overrides, "ema=power", f"run.dir={rough}", "train.steps=5")
    assert (code, "its ema/ is an exponential average and would be a power function's" in line) == (2, True), line
    added = [*overrides, "ema.sigma_rels=[0.2]", f"run.dir={rough}"]
    assert command("train", *added, "train.steps=5")[0] == 0
    record = json.loads((rough / "checkpoints/step-00000005/trainer.json").read_text())
    assert record["averages"].keys() == {"ema", "ema-power-0.2"}
    assert record["averages"]["ema-power-0.2"]["since_images"] == 4 * 8
    assert command("train", *added, "train.steps=6")[0] == 0
    record = json.loads((rough / "checkpoints/step-00000006/trainer.json").read_text())
    assert record["averages"]["ema-power-0.2"]["since_images"] == 4 * 8

    for name in names:
        weights = {"weights": "raw"}.get(name, name.replace("-", ":", 1))
        assert find_checkpoint(calm, None, weights).weights == last / name
    options = ["--format", "diffusers", "--out", str(tmp_path / "out"), "--weights"]
    assert command("export", str(calm), *options, "ema:power-0.1")[0] == 0
    exported = load_file(tmp_path / "out" / UNET)["conv_in.weight"]
    assert torch.equal(exported, load_file(last / "ema-power-0.1" / UNET)["conv_in.weight"])
    code, line = command("export", str(calm), *options, "ema:none", "--overwrite")
    assert code == 2
    assert "has no average ema:none: choose ema or ema:long or ema:power-0.1 or ema:short or raw" in line
    code, line = command("export", str(calm), *options, "best")
    assert (code, "best is not known: choose ema, ema:NAME or raw" in line) == (2, True), line


# --- snapshots ------------------------------------------------------------------------------------

POWER = ["ema=power", "ema.snapshot_every=2", "train.steps=8", "checkpoint.every=3", "checkpoint.keep=1"]


def steps_of(run: Path) -> list[int]:
    folder = run / "snapshots"
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("*"))


def same_snapshots(one: Path, other: Path) -> None:
    names = [sorted(str(p.relative_to(run)) for p in (run / "snapshots").rglob("*")) for run in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if (one / name).is_file():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_snapshots_outlive_checkpoints_and_share_their_bytes(
    overrides: list[str], tmp_path: Path, command: Command
) -> None:
    assert command("train", *overrides, *POWER)[0] == 0
    run = tmp_path / "run"
    assert os.listdir(run / "checkpoints") == ["step-00000008"]
    assert steps_of(run) == [2, 4, 6, 8]
    last = run / "snapshots/step-00000008"
    for short, name in (("power-0.05", "ema"), ("power-0.1", "ema-power-0.1")):
        assert (last / short / UNET).samefile(run / "checkpoints/step-00000008" / name / UNET)
    assert find_fault(last) is None
    record = json.loads((last / "trainer.json").read_text())
    assert (record["step"], record["images_seen"], record["averages"]["power-0.1"]["sigma_rel"]) == (8, 64, 0.1)


def test_a_run_that_goes_back_makes_its_snapshots_again(
    overrides: list[str], tmp_path: Path, command: Command
) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    keep = ["checkpoint.keep=9"]
    assert command("train", *overrides, *POWER, *keep, f"run.dir={calm}")[0] == 0
    shutil.copytree(calm, rough)
    for step in (4, 6, 8):
        shutil.rmtree(rough / f"checkpoints/step-{step:08d}")
    # Of a past that is no more, at a step that comes again and at one that doesn't.
    (rough / "snapshots/step-00000006/power-0.1" / UNET).write_bytes(b"")
    shutil.copytree(calm / "snapshots/step-00000006", rough / "snapshots/step-00000007")
    (rough / "snapshots/.tmp-step-00000004").mkdir()
    assert command("train", *overrides, *POWER, *keep, f"run.dir={rough}")[0] == 0
    same_snapshots(calm, rough)

    more = ["ema.snapshot_keep=2", "train.steps=9"]
    assert command("train", *overrides, *POWER, *keep, f"run.dir={rough}", *more)[0] == 0
    assert steps_of(rough) == [8, 9]


def test_a_disk_that_refuses_a_snapshot_leaves_those_before(
    overrides: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.link

    def full(source: Path, target: Path) -> None:
        if "step-00000004" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    assert command("train", *overrides, *POWER)[0] == 0
    assert steps_of(tmp_path / "run") == [2, 6, 8]


def test_a_snapshot_stays_where_its_checkpoint_could_not_be_published(
    overrides: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoints.publish

    def publish(temporary: Path, final: Path) -> None:
        if final.name == "step-00000004":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(temporary, final)

    monkeypatch.setattr(checkpoints, "publish", publish)
    assert command("train", *overrides, *POWER)[0] == 0
    assert steps_of(tmp_path / "run") == [2, 4, 6, 8]


def test_a_file_system_without_links_gets_copies(
    overrides: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    assert command("train", *overrides, *POWER, "train.steps=2")[0] == 0
    last = tmp_path / "run/snapshots/step-00000002"
    assert find_fault(last) is None
    assert (last / "power-0.05" / UNET).stat().st_nlink == 1


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_an_average_of_any_length_is_exported_and_sampled(
    pipeline: Path, overrides: list[str], tmp_path: Path, command: Command, adapter: str
) -> None:
    """Against a run of the same seed that kept an average of this length."""
    settings = [*overrides, *POWER, "ema.snapshot_every=1", "ema.sigma_rels=[0.05,0.1,0.15]", "optim.lr=1e-2"]
    if adapter == "lora":
        settings += ["adapter=lora", f"model.pretrained={pipeline}", "model.unet={}"]
    assert command("train", *settings)[0] == 0
    run = str(tmp_path / "run")
    form, file = ("lora", LORA_FILE) if adapter == "lora" else ("diffusers", UNET)
    for step in tmp_path.glob("run/snapshots/*"):  # made of two lengths, compared with the third
        shutil.move(step / "power-0.15", tmp_path / f"kept-{step.name}")
        record = json.loads((step / "trainer.json").read_text())
        del record["averages"]["power-0.15"]
        (step / "trainer.json").write_text(json.dumps(record))
    assert command("export", run, "--format", form, "--out", str(tmp_path / "made"), "--ema", "0.15")[0] == 0
    made, wanted = load_file(tmp_path / "made" / file), load_file(tmp_path / "kept-step-00000008" / file)
    early = load_file(tmp_path / "kept-step-00000001" / file)
    raw = load_file(tmp_path / "run/checkpoints/step-00000008/weights" / file)
    assert made.keys() == wanted.keys()
    norms = [sum((made[k] - other[k]).square().sum() for k in made).sqrt() for other in (wanted, raw, early)]
    assert norms[0] < 0.05 * norms[1] and norms[0] < 0.05 * norms[2]

    out = ["--prompt", "a red cat", "--out", str(tmp_path / "a.png")]
    out += ["--steps", "2", "--height", "32", "--width", "32"]
    assert command("sample", run, *out, "--ema", "0.15", "--checkpoint", "8")[0] == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["source"] == f"{run} step 8 sigma_rel=0.15"
    for words, says in (
        (["--ema", "0.28"], "make no average of sigma_rel 0.28: the nearest is off by"),
        (["--ema", "0.5"], "argument --ema: 0.5 is a share of the run: 0.001 to 0.2887"),
        (["--ema", "0.1", "--weights", "raw"], "not allowed with argument"),
        (["--ema", "0.1", "--checkpoint", "9"], "has no snapshot of step 9; there are 1, 2, 3"),
    ):
        code, line = command("sample", run, *out, *words)
        assert code == 2 and says in line, line
    code, line = command("sample", str(pipeline), *out, "--ema", "0.1")
    assert code == 2 and "is no run folder: it has no average sigma_rel=0.1" in line
    assert sorted(path.name for path in tmp_path.glob("run/snapshots/*"))[0] == "step-00000001"
