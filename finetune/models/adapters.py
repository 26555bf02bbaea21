"""Low-rank adapters, through peft: W' = W + (alpha / rank) B A (Hu et al. 2021, arXiv 2106.09685, section 4.1).

DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5) gives each output a magnitude of its own: W' = m V / ||V|| with
V = W + (alpha / rank) B A, where the norm is of a row, the weights of one output.

A convolution [out, in, h, w] has an A of [rank, in, h, w] and a B of [out, rank, 1, 1]: its weights are taken for a
matrix [out, in h w].

On disk they have the layout of diffusers' `pytorch_lora_weights.safetensors`: `unet.<module>.lora_A.weight`
[rank, in], `unet.<module>.lora_B.weight` [out, rank], `unet.<module>.lora_magnitude_vector.weight` ([out];
of a convolution [1, out, 1, 1]), and likewise `text_encoder.text_model.…`. Rank and alpha stand in the file's
metadata under `lora_adapter_metadata`, as arguments of peft's `LoraConfig` behind the component's name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune import UserError, first_line
from finetune.models.parts import part_of
from finetune.models.weight_files import write_weights
from finetune.rng import fold

LORA_FILE = "pytorch_lora_weights.safetensors"
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # attention's projections
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

_ADAPTER = "default"
_METADATA = "lora_adapter_metadata"
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"
_PARAMETER = re.compile(r"(.+)\.(lora_[AB]|lora_magnitude_vector)(?:\.[^.]+)?\.weight")


def add_lora(
    module: nn.Module,
    rank: int,
    alpha: float,
    *,
    dropout: float = 0.0,
    target_modules: Sequence[str] = UNET_TARGETS,
    ranks: Mapping[str, int] | None = None,
    rank_stabilized: bool = False,
    dora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Freeze a diffusers or transformers model and give it a trainable adapter that changes nothing at first.

    A has Kaiming's uniform distribution as in peft, drawn for each tensor from (`seed`, its name); B is zero, and
    DoRA's magnitudes are the norms of W's rows. All are float32, whatever the model's dtype. torch's global
    generator stays as it was.

    Args:
        target_modules: a module whose name is one of these, or ends with one behind a dot, is adapted.
        ranks: by part of the model (see `parts.part_of`), instead of `rank`, with alpha in the same ratio; 0 leaves
            a part as it is.
        rank_stabilized: the update's factor is alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732, theorem
            3.2).
        dora: weights have magnitudes of their own.

    Returns:
        The names of the trainable parameters, in the model's order.

    Raises:
        UserError: no module has one of these names, one is no linear layer or convolution, or rank, alpha or
            dropout is out of range.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise UserError(f"LoRA needs rank >= 1, alpha > 0 and 0 <= dropout < 1; got {rank}, {alpha} and {dropout}")
    layers, ranks = dict(module.named_modules()), ranks or {}
    own = {name: ranks.get(part_of(name, ranks) or "", rank) for name in targeted(module, target_modules)}
    own = {name: value for name, value in own.items() if value > 0}
    for name in own:
        if not isinstance(layers[name], nn.Linear | nn.Conv2d):
            inside = [
                inner for inner, layer in layers[name].named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
            ]
            few = f": take layers in it, such as {', '.join(inside[:3])}" if inside else ""
            raise UserError(
                f"LoRA target {name} is no linear layer or convolution, but {type(layers[name]).__name__}{few}"
            )
    if not own:
        raise UserError("LoRA with rank 0 everywhere trains nothing: raise adapter.rank or adapter.ranks")
    module.requires_grad_(False)
    from peft import LoraConfig  # slow to import, and needed here alone

    with torch.random.fork_rng(devices=[]):  # peft draws weights that are drawn anew below
        cast(Any, module).add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type] # peft divides it, whatever it is
                lora_dropout=dropout,
                target_modules=list(own),
                rank_pattern={name: value for name, value in own.items() if value != rank},
                alpha_pattern={name: alpha * value / rank for name, value in own.items() if value != rank},  # type: ignore[misc]
                use_rslora=rank_stabilized,
                use_dora=dora,
            ),
            adapter_name=_ADAPTER,
        )
    trainable = []
    for name, parameter in module.named_parameters():
        if _PARAMETER.fullmatch(name) is None:
            continue
        parameter.data = _initial(name, parameter, seed).to(parameter.device)
        parameter.requires_grad_(True)
        trainable.append(name)
    return trainable


def targeted(module: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Names of the modules that `add_lora` takes for these targets.

    Raises:
        UserError: a target is no module's.
    """
    names = [name for name, _ in module.named_modules()]
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise UserError(f"LoRA target {target!r} is no module of {type(module).__name__}")
    targets = tuple(f".{target}" for target in target_modules)
    return [name for name in names if f".{name}".endswith(targets)]


def lora_alphas(component: str, module: nn.Module) -> dict[str, float]:
    """Alpha of each adapted module, by its name in the file: what makes alpha / rank the factor that is used."""
    found: dict[str, float] = {}
    for name, layer in module.named_modules():
        if isinstance(getattr(layer, "scaling", None), dict) and _ADAPTER in layer.scaling:
            found[canonical(f"{component}.{name}")] = layer.scaling[_ADAPTER] * layer.r[_ADAPTER]  # type: ignore[index,operator]
    return found


def lora_key(name: str) -> str:
    """The name in `pytorch_lora_weights.safetensors` of a LoRA parameter as torch names it, behind its component.

    `unet.<module>.lora_A.default.weight` is `unet.<module>.lora_A.weight` there.

    Raises:
        ValueError: it is no LoRA parameter of a known component.
    """
    match = _PARAMETER.fullmatch(name)
    if match is None or component_of(name) is None:
        raise ValueError(f"{name} is no LoRA parameter of {' or '.join(COMPONENTS)}")
    return canonical(f"{match[1]}.{match[2]}.weight")


def lora_metadata(state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, str]:
    """The safetensors metadata from which diffusers' `load_lora_weights` takes rank, alpha and targets.

    Args:
        state: tensors in the file's layout.
        alphas: alpha of each module, by its name in the file: `unet.mid_block.….to_q`.
    """
    entries: dict[str, Any] = {}
    for component in COMPONENTS:
        ranks: dict[str, int] = {}
        used: dict[str, float] = {}
        for key, tensor in sorted(state.items()):
            if not key.startswith(f"{component}.") or not key.endswith(DOWN):
                continue
            # Readers match a target at the end of a module's name: right with `text_model.` and without.
            name = key.removeprefix(f"{component}.").removeprefix("text_model.").removesuffix(DOWN)
            ranks[name] = tensor.shape[0]
            used[name] = float(alphas[key.removesuffix(DOWN)])
        if not ranks:
            continue
        rank, usual = _most_common(ranks.values()), _most_common(used.values())
        config = {
            "r": rank,
            "lora_alpha": usual,
            "target_modules": list(ranks),
            "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {name: value for name, value in used.items() if value != usual},
        }
        if any(key.startswith(f"{component}.") and key.endswith(MAGNITUDE) for key in state):
            config["use_dora"] = True
        entries |= {f"{component}.{name}": value for name, value in config.items()}
    return {"format": "pt", _METADATA: json.dumps(entries, sort_keys=True)}


@dataclass(frozen=True)
class Lora:
    """An adapter as read from a file: tensors in the file's layout, and alpha / rank for each module."""

    state: dict[str, Tensor]
    scales: dict[str, float]  # by module, component first: `unet.mid_block.….to_q`

    def times(self, strength: float) -> Lora:
        """The adapter whose update counts so many times, as peft scales it."""
        return Lora(self.state, {name: scale * strength for name, scale in self.scales.items()})

    @property
    def alphas(self) -> dict[str, float]:
        """Alpha by module."""
        return {name: scale * self.state[name + DOWN].shape[0] for name, scale in self.scales.items()}


def save_lora(path: str | Path, state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> None:
    """Write tensors in the file's layout, with their metadata (see `lora_metadata`), to `path`.

    A path that does not end in `.safetensors` is a folder; the file in it has diffusers' name.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / LORA_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(path, state, lora_metadata(state, alphas))


def read_lora(path: str | Path) -> Lora:
    """Read an adapter from a file or from a folder that holds `pytorch_lora_weights.safetensors`.

    diffusers' older names (`….to_q.lora.down.weight`, `….lora_linear_layer.up.weight`) are read too. A file
    without metadata has alpha equal to rank, as diffusers takes it.

    Raises:
        UserError: no such file, no safetensors, or another tool's format.
    """
    path = Path(path).expanduser()
    path = path / LORA_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no LoRA at {path}; give a .safetensors file or a folder with {LORA_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            state = {canonical(_renew(key)): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            settings = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no LoRA in safetensors: {first_line(error)}") from error
    foreign = next((key for key in state if component_of(key) is None or not _PARAMETER.fullmatch(key)), None)
    if foreign is not None or not state:
        what = f"holds {foreign}" if foreign else "is empty"
        raise UserError(f"{path} {what}; only LoRAs in diffusers' layout (unet.….lora_A.weight) can be read")
    ranks = {key.removesuffix(DOWN): len(down) for key, down in state.items() if key.endswith(DOWN)}
    return Lora(state, {name: _scale(name, rank, settings) for name, rank in ranks.items()})


@torch.no_grad()
def merge_lora(modules: Mapping[str, nn.Module], lora: Lora) -> None:
    """Put an adapter into the weights of `modules` (component name -> model), computed in float32.

    Raises:
        UserError: the adapter is for another model, or not whole.
    """
    for key in lora.state:
        name = key.removesuffix(UP).removesuffix(MAGNITUDE)
        if not key.endswith(DOWN) and name not in lora.scales:
            raise UserError(f"this LoRA is not whole: there is no lora_A for {name}")
    for name, scale in lora.scales.items():
        component = component_of(name)
        path = name.removeprefix(f"{component}.")
        root = modules.get(component or "")
        layer = None if root is None else _submodule(root, path)
        weight = getattr(layer, "weight", None)
        down, up = lora.state[name + DOWN], lora.state.get(name + UP)
        if weight is None or up is None:
            lack = "lora_B for" if up is None else "layer"
            raise UserError(f"this LoRA is for another model: there is no {lack} {name}")
        if (up.shape[0], *down.shape[1:]) != tuple(weight.shape) or up.shape[1] != len(down):
            shapes = f"{list(up.shape)} x {list(down.shape)} for a weight of {list(weight.shape)}"
            raise UserError(f"this LoRA is for another model: {name} has {shapes}")
        update = (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape) * scale
        merged = weight.float() + update.to(weight.device)
        if (magnitude := lora.state.get(name + MAGNITUDE)) is not None:
            if magnitude.numel() != len(weight):
                shapes = f"{magnitude.numel()} magnitudes for a weight of {list(weight.shape)}"
                raise UserError(f"this LoRA is for another model: {name} has {shapes}")
            scale_O = magnitude.float().flatten().to(weight.device) / merged.flatten(1).norm(dim=1)
            merged *= scale_O.view(-1, *[1] * (merged.ndim - 1))
        weight.copy_(merged)


def _initial(name: str, given: nn.Parameter, seed: int) -> Tensor:
    if ".lora_magnitude_vector." in name:  # peft makes it of the weights
        return given.detach().float()
    if ".lora_B." in name:
        return torch.zeros(given.shape)
    generator = torch.Generator().manual_seed(fold(seed, f"lora {name}"))
    return nn.init.kaiming_uniform_(torch.empty(given.shape), a=5**0.5, generator=generator)


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def component_of(key: str) -> str | None:
    head = key.split(".", 1)[0]
    return head if head in COMPONENTS else None


def canonical(key: str) -> str:
    # transformers 5 dropped `text_model.` from CLIP's names; files keep it, for readers with version 4.
    if key.startswith("text_encoder.") and not key.startswith("text_encoder.text_model."):
        return "text_encoder.text_model." + key.removeprefix("text_encoder.")
    return key


def _renew(key: str) -> str:
    key = f"{key}.weight" if key.endswith(MAGNITUDE.removesuffix(".weight")) else key  # peft leaves it out
    for old, new in (("lora.down", "lora_A"), ("lora.up", "lora_B")):
        key = key.replace(f".{old}.weight", f".{new}.weight")
        key = key.replace(f".lora_linear_layer.{old.removeprefix('lora.')}.weight", f".{new}.weight")
    return key


def _alpha(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    component = component_of(name)
    path = name.removeprefix(f"{component}.")
    for pattern, value in (settings.get(f"{component}.alpha_pattern") or {}).items():
        if re.search(rf"(?:^|\.){pattern.removeprefix('^')}$", path):  # as peft matches them
            return float(value)
    return float(settings.get(f"{component}.lora_alpha", rank))


def _scale(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Alpha over the rank, or over its root where the file says so (see `add_lora`'s `rank_stabilized`)."""
    is_stabilized = settings.get(f"{component_of(name)}.use_rslora")
    return _alpha(name, rank, settings) / (rank**0.5 if is_stabilized else rank)


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    for candidate in (path, path.removeprefix("text_model.")):
        try:
            return root.get_submodule(candidate)
        except AttributeError:
            continue
    return None
