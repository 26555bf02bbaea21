"""Adapters under the names of kohya-ss/sd-scripts (`networks/lora.py`), which most published ones have.

`lora_unet_<module with _ for .>.lora_down.weight`, `.lora_up.weight` and a scalar `.alpha`; `lora_te_` for the text
encoder, `lora_te1_` and `lora_te2_` for two. Modules have diffusers' names or, as in files for XL by those scripts,
those of the latent diffusion code base (see `ldm_keys`). DoRA's magnitudes are `.dora_scale`, [out, 1] (of
convolutions [out, 1, 1, 1]), as in LyCORIS; kohya's own scripts have none, and WebUI takes them for those of
columns.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune import UserError, first_line
from finetune.models.adapters import DOWN, MAGNITUDE, UP, Lora, canonical, component_of
from finetune.models.ldm_keys import unet_key

_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
_KEY = re.compile(r"(.+)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale)")


def to_kohya(lora: Lora) -> dict[str, Tensor]:
    """An adapter's tensors by these names."""
    made: dict[str, Tensor] = {}
    has_two = any(component_of(name) == "text_encoder_2" for name in lora.scales)
    for name, alpha in lora.alphas.items():
        prefix = _PREFIXES[component_of(name) or ""][-1 if has_two else 0]
        key = prefix + name.split(".", 1)[1].replace(".", "_")
        down, up = lora.state[name + DOWN], lora.state[name + UP]
        made[f"{key}.lora_down.weight"], made[f"{key}.lora_up.weight"] = down, up
        made[f"{key}.alpha"] = torch.tensor(alpha, dtype=down.dtype)
        if (magnitude := lora.state.get(name + MAGNITUDE)) is not None:
            made[f"{key}.dora_scale"] = magnitude.reshape(-1, *[1] * (up.ndim - 1))
    return made


def is_kohya(path: str | Path) -> bool:
    """Whether a file of safetensors has such names."""
    path = Path(path).expanduser()
    if not path.is_file():
        return False
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        return any(key.startswith(("lora_unet_", "lora_te")) for key in file.keys())  # noqa: SIM118
    return False


def read_kohya(path: str | Path, modules: Mapping[str, nn.Module]) -> Lora:
    """Read an adapter for these models (component name -> model), whose modules' names it stands for.

    A module without an alpha has alpha equal to its rank.

    Raises:
        UserError: it can't be read, is another kind of adapter (LoHa, LoKr), or is for another model.
    """
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no LoRA in safetensors: {first_line(error)}") from error
    names = _names(modules)
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise UserError(f"{path} holds {key}: of kohya's adapters LoRA and DoRA can be read, no other kind")
        if (name := names.get(found[1])) is None:
            raise UserError(f"{path} is for another model: this one has no layer {found[1]}")
        match found[2]:
            case "lora_down.weight":
                state[name + DOWN] = tensor
            case "lora_up.weight":
                state[name + UP] = tensor
            case "alpha":
                alphas[name] = float(tensor)
            case "dora_scale":
                if tensor.numel() != len(tensor):
                    raise UserError(f"{path}: the magnitudes {key} are of columns, which can't be read")
                state[name + MAGNITUDE] = tensor.flatten()
    ranks = {key.removesuffix(DOWN): len(tensor) for key, tensor in state.items() if key.endswith(DOWN)}
    if not ranks:
        raise UserError(f"{path} has no lora_down: it is no LoRA")
    return Lora(state, {name: alphas.get(name, rank) / rank for name, rank in ranks.items()})


def _names(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """What a module may be called there -> its own name, component first."""
    names: dict[str, str] = {}
    for component, root in modules.items():
        for path, layer in root.named_modules():
            if getattr(layer, "weight", None) is None:
                continue
            name = canonical(f"{component}.{path}")
            called = [name.removeprefix(f"{component}.")]
            if component == "unet":
                with contextlib.suppress(UserError):  # such a part is not in those files
                    called.append(unet_key(f"{path}.weight", root.config).removesuffix(".weight"))  # type: ignore[arg-type]
            for prefix in _PREFIXES.get(component, ()):
                names |= {prefix + each.replace(".", "_"): name for each in called}
    return names
