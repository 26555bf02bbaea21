"""Which file and key a trained parameter has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.models.adapters import LORA_FILE, lora_key, lora_metadata

_UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Layout:
    """How trained parameters are named in files.

    `components` maps `unet`, `text_encoder` and what else a task has to modules, whose configuration stands beside
    their weights if they have one; `lora_alphas` is None for full fine-tuning, else alpha by adapted module.
    """

    components: Mapping[str, nn.Module]
    lora_alphas: Mapping[str, float] | None = None

    def locate(self, name: str) -> tuple[str, str]:
        """(file, key) of a parameter, as `unet.conv_in.weight`, inside `weights/` or `ema/`."""
        component, _, key = name.partition(".")
        if self.lora_alphas is not None and not self._is_own(component):
            return LORA_FILE, lora_key(name)
        if component == "text_encoder" and not key.startswith("text_model."):
            key = f"text_model.{key}"  # the names of transformers 4, which 5 reads as well
        return f"{component}/{_UNET_WEIGHTS if component == 'unet' else _WEIGHTS}", key

    @staticmethod
    def _is_own(component: str) -> bool:
        """Whether a component is the task's own, which is trained as a whole beside an adapter too."""
        return component != "unet" and not component.startswith("text_encoder")

    def metadata(self, file: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """What stands in the header of a file of weights that holds tensors of these shapes by key."""
        if self.lora_alphas is None or Path(file).name != LORA_FILE:
            return {"format": "pt"}
        return lora_metadata(
            {key: torch.empty(tuple(shape), device="meta") for key, shape in shapes.items()}, self.lora_alphas
        )

    def write_configs(self, folder: Path, files: Sequence[str]) -> None:
        """Put the configuration of its model beside each of `files`, weights under `folder`."""
        if self.lora_alphas is not None:
            return
        for component in sorted({file.split("/")[0] for file in files}):
            (folder / component).mkdir(parents=True, exist_ok=True)
            _write_config(self.components[component], folder / component)


def _write_config(module: Any, folder: Path) -> None:
    if hasattr(module, "save_config"):  # diffusers
        module.save_config(folder)
    elif hasattr(module, "config"):  # transformers; a task's own parts are told by `task.json`
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(folder)
