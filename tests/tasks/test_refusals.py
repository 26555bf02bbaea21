"""Tasks, models and data that contradict each other are refused with a reason; a padded model begins as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.models.unet import build_unet, pad_input
from tests.conftest import UNET, metrics

Command = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["task=layout_to_image", "task.options.classes=3"], "boxes"),
        (["task=class_to_image", "task.options.classes=3"], "class"),
        (
            ["task=semantic_synthesis", "task.options.labels=3"],
            "task=semantic_synthesis needs map.png of each sample",
        ),
        (["task=inpainting"], "task=inpainting needs hole.npy of each sample"),
        (["task=super_resolution"], "task=super_resolution needs lowres.png of each sample"),
        (["data.loss_masks=true"], "data.loss_masks=true needs mask.png and"),
        (["task=unconditional"], "this one attends to 32 features"),
        (
            ["task=class_to_image", "task.options.clases=3"],
            "unknown key task.options.clases: did you mean classes?",
        ),
        (["task=class_to_image", "task.options.classes=many"], "task.options"),
        (["task.name=class_to_imag"], "is not known: choose one of class_to_image,"),
        (["task.dropout=1.5"], "task.dropout=1.5 is a probability"),
    ],
)
def test_contradictions_of_task_and_data_are_refused(
    overrides: list[str], command: Command, more: list[str], says: str
) -> None:
    code, line = command("train", *overrides, *more)
    assert code == 2 and says in line


def test_a_model_of_four_channels_is_padded_on_request_alone(
    overrides: list[str], labelled: Path, pipeline: Path, tmp_path: Path, command: Command
) -> None:
    settings = [*overrides, f"data.shards={labelled}", "task=inpainting", f"model.pretrained={pipeline}"]
    settings += ["model.unet={}", "train.steps=2", "checkpoint.every=1"]
    code, line = command("train", *settings)
    assert code == 2
    assert (
        "takes 4 channels, the shards hold latents of 4 and task=inpainting adds 5: give model.pad_input=true"
        in line
    )
    code, line = command("train", *settings, "model.pad_input=true", "adapter=lora")
    assert code == 2 and "adapter=lora does not train" in line
    assert command("train", *settings, "model.pad_input=true") == (0, "")
    assert command("train", *settings, "model.pad_input=true", "train.steps=3") == (0, "")
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3]
    code, line = command("sample", str(tmp_path / "run"), "--prompt", "x", "--out", str(tmp_path / "x.png"))
    assert code == 2 and "--image FILE is missing" in line


def test_zero_weights_change_nothing_and_learn() -> None:
    unet = build_unet(UNET, seed=0)
    z, more = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8)
    context, times = torch.randn(2, 3, 16), torch.tensor([3, 700])
    before = unet(z, times, context).sample
    pad_input(unet, 9)
    assert unet.config.in_channels == 9
    after = unet(torch.cat([z, more], dim=1), times, context).sample
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    after.square().mean().backward()
    assert unet.conv_in.weight.grad[:, 4:].abs().sum() > 0
