"""Several averages of one run: kept, saved, gone on with, and chosen from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import UserError
from finetune.ema import HalfLife, Power
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
        (["ema.kind=cosine"], "ema.kind=cosine is not known: choose one of halflife, power"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        parts_of(overrides, *words)
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
        out = tmp_path / name
        options = ["--format", "diffusers", "--out", str(out), "--weights", weights]
        assert command("export", str(calm), *options)[0] == 0
        exported = load_file(out / UNET)["conv_in.weight"]
        assert torch.equal(exported, load_file(last / name / UNET)["conv_in.weight"])
    code, line = command("export", str(calm), *options[:-1], "ema:none", "--overwrite")
    assert code == 2
    assert "has no average ema:none: choose ema or ema:long or ema:power-0.1 or ema:short or raw" in line
    code, line = command("export", str(calm), *options[:-1], "best")
    assert (code, "best is not known: choose ema, ema:NAME or raw" in line) == (2, True), line
