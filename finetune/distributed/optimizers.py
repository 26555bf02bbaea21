"""The optimizers that there are: which library makes each, what it remembers, and who can hold that in pieces.

adamw           Loshchilov & Hutter 2019 (arXiv 1711.05101), torch's fused kernel
adamw8bit       the same with moments of 8 bits (Dettmers et al. 2022, arXiv 2110.02861), bitsandbytes
adafactor       Shazeer & Stern 2018 (arXiv 1804.04235), transformers, without its own step sizes
lion            Chen et al. 2023 (arXiv 2302.06675), pytorch-optimizer
prodigy         Mishchenko & Defazio 2024 (arXiv 2306.06101), pytorch-optimizer
schedule_free   AdamW without a schedule (Defazio et al. 2024, arXiv 2405.15682), pytorch-optimizer

Weight decay is decoupled everywhere: a step takes lr * weight_decay of a weight away (Prodigy's lr is the one it
found); schedule_free takes it from the point that gradients are of.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune import UserError, first_line

KINDS = ("adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule_free")
# What the others remember is one number a weight, which lies in pieces as weights do. Adafactor's rows and columns
# and the blocks of 8 bits are of whole parameters, Prodigy's step size of a sum over all weights.
NEED_WHOLE = ("adamw8bit", "adafactor", "prodigy")
ORDERED = ("adamw8bit", "adafactor")  # rows, columns and blocks are of weights in the order of files: no NHWC
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's

_OF_A_WEIGHT: dict[str, tuple[str, ...]] = {
    "adamw": MOMENTS,
    "adamw8bit": (),
    "adafactor": (),
    "lion": ("exp_avg",),
    "prodigy": (*MOMENTS, "s", "p0"),
    "schedule_free": ("y", "z", "exp_avg_sq"),  # y is what gradients are of: the master itself
}
_OF_A_PARAMETER: dict[str, tuple[str, ...]] = {
    "adamw8bit": ("state1", "state2", "absmax1", "absmax2"),
    "adafactor": ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
}
_COUNTS: dict[str, tuple[str, ...]] = {
    "lion": ("step",),
    "prodigy": ("step", "d", "d_max", "d_numerator"),
    "schedule_free": ("step", "lr_max", "weight_sum"),
}


@dataclass(frozen=True)
class ParamGroup:
    """Trainable parameters with a learning rate of `lr_ratio` times the schedule's."""

    name: str
    parameters: dict[str, nn.Parameter]
    lr_ratio: float = 1.0


@dataclass(frozen=True)
class OptimizerSettings:
    """One of `KINDS` and its settings, without the learning rate.

    `eps` is not Adafactor's or Lion's, betas are not Adafactor's. `d0` and `d_coef` are Prodigy's: the step size
    that it begins with, and a factor of its estimate.
    """

    kind: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    d0: float = 1e-6
    d_coef: float = 1.0

    @property
    def of_a_weight(self) -> tuple[str, ...]:
        """Names of the tensors that hold one number a weight."""
        return _OF_A_WEIGHT[self.kind]

    @property
    def of_a_parameter(self) -> tuple[str, ...]:
        """Names of the tensors of other shapes, some of which a parameter has."""
        return _OF_A_PARAMETER.get(self.kind, ())


class _Guarded(torch.optim.Optimizer):
    """What torch's fused AdamW does by itself, for optimizers of other libraries.

    Gradients are divided by `grad_scale`, and nothing is done where `found_inf` is set; for that the host waits for
    the device once a step. DeepSpeed's stage 3 takes one update as several steps, each of some parameters, and each
    would count: so a step begins with its groups' `at_start`, which `begin_update` keeps.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        if self.found_inf is not None and bool(self.found_inf):
            return None
        if self.grad_scale is not None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                torch._foreach_div_(gradients, self.grad_scale)
        for group in self.param_groups:
            group.update(group.get("at_start", {}))
        return super().step(closure)


@functools.cache
def _guarded(of: Any) -> Any:
    return type(f"Guarded{of.__name__}", (_Guarded, of), {})


def make_optimizer(groups: Sequence[ParamGroup], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The library's optimizer, which takes `grad_scale` and `found_inf` as torch's fused AdamW does.

    Raises:
        UserError: its library is missing or does not work here.
    """
    lists = [{"params": list(group.parameters.values()), "lr_ratio": group.lr_ratio} for group in groups]
    betas = (settings.beta1, settings.beta2)
    common: dict[str, Any] = {"lr": 0.0, "weight_decay": settings.weight_decay}
    match settings.kind:
        case "adamw":
            return torch.optim.AdamW(lists, betas=betas, eps=settings.eps, fused=True, **common)
        case "adamw8bit":
            return _guarded(_bitsandbytes().AdamW8bit)(lists, betas=betas, eps=settings.eps, **common)
        case "adafactor":
            from transformers.optimization import Adafactor

            # Its own step sizes would be a second schedule beside the one that is a function of images seen.
            return _guarded(Adafactor)(lists, scale_parameter=False, relative_step=False, **common)
        case "lion":
            from pytorch_optimizer import Lion

            return _guarded(Lion)(lists, betas=betas, **common)
        case "prodigy":
            from pytorch_optimizer import Prodigy

            # As its authors advise for diffusion models.
            own = {"bias_correction": True, "safeguard_warmup": True, "d0": settings.d0, "d_coef": settings.d_coef}
            return _guarded(Prodigy)(lists, betas=betas, eps=settings.eps, **own, **common)
        case "schedule_free":
            from pytorch_optimizer import ScheduleFreeAdamW

            return _guarded(ScheduleFreeAdamW)(lists, betas=betas, eps=settings.eps, **common)
    raise ValueError(settings.kind)


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import optim
    except ModuleNotFoundError:
        raise UserError(
            "optim=adamw8bit needs bitsandbytes: pip install 'ldm-finetune[optim8bit]', or take optim=adamw"
        ) from None
    except Exception as error:  # its own libraries can't be loaded
        raise UserError(f"optim=adamw8bit: bitsandbytes does not work here: {first_line(error)}") from error
    return optim


def matrix_of(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory as a matrix [out, everything else], for what keeps rows and columns.

    Adafactor splits the last two dimensions, which of a convolution are its 3 by 3 places: it would save a third.
    """
    return nn.Parameter(parameter.data.view(len(parameter), -1)) if parameter.ndim > 2 else parameter


def start(optimizer: torch.optim.Optimizer, keys: Iterable[Tensor], settings: OptimizerSettings) -> None:
    """Make the optimizer's state now, so that fresh and resumed runs go the same way through its code.

    Args:
        keys: the tensors that it updates, float32, with the values that training starts from.
    """
    kind = settings.kind
    places = {
        id(p): (i, j) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])
    }
    for key in keys:
        state: dict[str, Any]
        if kind == "adamw8bit":
            group, place = places[id(key)]
            optimizer.init_state(optimizer.param_groups[group], key, group, place)  # type: ignore[attr-defined]
            state = optimizer.state[key]
            state |= {name: _in_words(state[name]) for name in ("state1", "state2")}
        elif kind == "adafactor" and key.ndim > 1:
            rows, columns = key.new_zeros(key.shape[:-1]), key.new_zeros(key.shape[:-2] + key.shape[-1:])
            state = {"step": 0, "RMS": 0, "exp_avg_sq_row": rows, "exp_avg_sq_col": columns}
        elif kind == "adafactor":
            state = {"step": 0, "RMS": 0, "exp_avg_sq": torch.zeros_like(key.detach())}
        else:
            copied = ("z", "p0")
            state = {
                name: key.detach().clone() if name in copied else torch.zeros_like(key.detach())
                for name in settings.of_a_weight
                if name != "y"
            }
            if kind == "adamw":  # the fused one counts steps on the parameter's device
                state["step"] = torch.zeros((), dtype=torch.float32, device=key.device)
        optimizer.state[key] = state
    for group_ in optimizer.param_groups:
        if kind == "prodigy":
            group_["d_numerator"] = torch.zeros(1, device=group_["params"][0].device)
        elif "step" in _COUNTS.get(kind, ()):
            group_["step"] = 0
    begin_update(optimizer, settings)


def _in_words(tensor: Tensor) -> Tensor:
    """The same zeros; of bytes, in memory of whole words of 4, which checkpoints are written in."""
    if tensor.dtype != torch.uint8:
        return tensor
    return tensor.new_zeros(-(-tensor.numel() // 4) * 4)[: tensor.numel()].view(tensor.shape)


def begin_update(optimizer: torch.optim.Optimizer, settings: OptimizerSettings) -> None:
    """Call before each update, however many of the optimizer's steps that takes (see `_Guarded`)."""
    if settings.kind in NEED_WHOLE:
        return
    for group in optimizer.param_groups:
        group["at_start"] = {name: group[name] for name in _COUNTS.get(settings.kind, ())}


def own_state(optimizer: torch.optim.Optimizer, key: Tensor, settings: OptimizerSettings) -> dict[str, Tensor]:
    """What is of other shapes than the parameter `key`, by name, contiguous and in whole words of 4 bytes."""
    found = {name: optimizer.state[key].get(name) for name in settings.of_a_parameter}
    return {name: _words_of(tensor) for name, tensor in found.items() if tensor is not None}


def _words_of(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8:
        return tensor
    return tensor.new_empty(0).set_(tensor.untyped_storage())  # type: ignore[call-overload] # the padding too


def counts(optimizer: torch.optim.Optimizer, settings: OptimizerSettings) -> list[dict[str, float]]:
    """What the optimizer counts for each of its groups, beside the number of steps of AdamW and its kin."""
    names = _COUNTS.get(settings.kind, ())
    return [{name: float(group[name]) for name in names} for group in optimizer.param_groups] if names else []


def load_counts(
    optimizer: torch.optim.Optimizer, settings: OptimizerSettings, saved: Sequence[Mapping[str, float]]
) -> None:
    """The reverse of `counts`.

    Raises:
        UserError: they are of other groups of parameters.
    """
    names = _COUNTS.get(settings.kind, ())
    if names and len(saved) != len(optimizer.param_groups):
        raise UserError(
            f"the checkpoint has {len(saved)} groups of parameters with learning rates of their own, the run "
            f"{len(optimizer.param_groups)}: put optim.lr_ratios and optim.text_encoder_lr back as they were"
        )
    for group, values in zip(optimizer.param_groups, saved, strict=False):
        for name in names:
            if isinstance(group[name], Tensor):
                group[name] = torch.full_like(group[name], values[name])
            else:
                group[name] = int(values[name]) if name == "step" else values[name]


def steps_taken(optimizer: torch.optim.Optimizer, settings: OptimizerSettings) -> int:
    """Steps so far; skipped ones don't count."""
    if settings.kind in _COUNTS:
        first = 1 if settings.kind == "prodigy" else 0  # it counts from 1
        return int(optimizer.param_groups[0]["step"]) - first
    return int(next(iter(optimizer.state.values()))["step"])


def set_steps_taken(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, steps: int) -> None:
    """The reverse of `steps_taken`, for optimizers that count by parameter; the others have it among `counts`."""
    if settings.kind in _COUNTS:
        return
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(steps)
        else:
            state["step"] = steps
