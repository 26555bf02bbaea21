"""Learning rates and ranks of parts, from the command line to the optimizer and the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from finetune import UserError
from tests.test_train import parts_of

Command = Callable[..., tuple[int, str]]


def test_parts_have_learning_rates_of_their_own(overrides: list[str]) -> None:
    ratios = ["optim.lr_ratios.unet.up_blocks=0.5", "optim.lr_ratios.up_blocks.0=0", "optim.text_encoder_lr=2e-3"]
    config, parts = parts_of(overrides, *ratios, "optim.lr=1e-3")
    found = {}
    names = {id(p): name for name, p in parts.strategy.parameters.items()}
    parts.strategy._set_lr(config.optim.lr)
    for group in parts.strategy.optimizer.param_groups:
        found |= {names[id(p)]: group["lr"] for p in group["params"]}
    assert found.keys() == parts.strategy.parameters.keys()
    for name, lr in found.items():
        wanted = 1e-3 if name.startswith("unet.") else 2e-3
        wanted = 0.5e-3 if name.startswith("unet.up_blocks.1.") else wanted
        wanted = 0.5e-3 if name.startswith("unet.up_blocks.0.") else wanted  # as long, and more letters
        assert lr == pytest.approx(wanted), name


def test_a_run_keeps_its_ranks(pipeline: Path, overrides: list[str], command: Command, tmp_path: Path) -> None:
    """Trained, gone on with, exported; other ranks are refused by name."""
    settings = [*overrides, f"model.pretrained={pipeline}", "model.unet={}", "adapter=lora", "adapter.rank=2"]
    settings += ["adapter.ranks.up_blocks=4", "adapter.ranks.mid_block=0", "adapter.rank_stabilized=true"]
    assert command("train", *settings, "train.steps=2")[0] == 0
    code, line = command("train", *settings, "adapter.ranks.up_blocks=3")
    assert (code, "adapter.ranks was" in line) == (2, True), line
    assert command("train", *settings)[0] == 0
    out = tmp_path / "lora"
    assert command("export", str(tmp_path / "run"), "--format", "lora", "--out", str(out))[0] == 0
    with safe_open(out / "pytorch_lora_weights.safetensors", framework="pt") as file:
        ranks = {key.split(".")[1]: file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key}  # noqa: SIM118
    assert ranks == {"down_blocks": 2, "up_blocks": 4}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optim.lr_ratios.upblocks=2", "optim.lr_ratios.upblocks: no part of what is trained"),
        ("optim.lr_ratios.up_blocks=-1", "optim.lr_ratios.up_blocks=-1 must not be negative"),
        ("adapter.ranks.up_blocks=1.5", "is no whole number"),
        ("adapter.ranks.up_blocks=much", "up_blocks=much is no number"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], word: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parts_of(overrides, word)


def test_ranks_of_what_is_not_adapted_are_refused(overrides: list[str], pipeline: Path) -> None:
    """They had no effect: the part is there, but `adapter.targets` takes nothing in it."""
    lora = [*overrides, f"model.pretrained={pipeline}", "model.unet={}", "adapter=lora"]
    with pytest.raises(
        UserError, match=r"adapter\.ranks\.resnets: no part of what is trained .* such a name is .*to_q"
    ):
        parts_of(lora, "adapter.ranks.resnets=8")
    parts_of(lora, "adapter.ranks.resnets=8", "adapter.targets=[to_q,conv1]")
    parts_of(lora, "adapter.ranks.resnets=0")  # what it asks for holds
