"""How a run's work is spread: batches over ranks, weights and moments by a strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import UserError
from finetune.config import Config
from finetune.distributed import DataParallel, OptimizerSettings, ParamGroup, Strategy, World, ZeRO
from finetune.models.parts import flat, part_of, require_parts
from finetune.objective import LatentDiffusion


def precision(wanted: str, world: World) -> str:
    """`auto` becomes bf16 where all ranks have GPUs that multiply it, else fp32. Collective.

    On most CPUs bf16 is several times slower.
    """
    if wanted != "auto":
        return wanted
    device = world.device
    multiplies = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if all(world.gather(multiplies)) else "fp32"


def batch_sizes(config: Config, world: World) -> tuple[int, int]:
    """(micro-batch, accumulation steps) of each rank.

    Raises:
        UserError: the global batch can't be cut so.
    """
    total, size = config.train.global_batch, world.size
    share, rest = divmod(total, size)
    if rest or share == 0:
        raise UserError(
            f"train.global_batch={total} cannot be shared by {size} processes: take a multiple of {size}, such as "
            f"{max(round(total / size), 1) * size}, with a learning rate of its own (optim.lr)"
        )
    micro = min(config.train.micro_batch or share, share)
    if share % micro:
        raise UserError(
            f"train.micro_batch={micro} does not divide the {share} samples of each rank "
            f"(train.global_batch={total} over {size} processes)"
        )
    return micro, share // micro


def make_strategy(
    config: Config, world: World, model: LatentDiffusion, micro_batch: int, accumulation: int, *, is_fast: bool
) -> Strategy:
    """The strategy, which owns the weights from here on. `is_fast`: the U-Net runs on our kernels."""
    parameters = {
        name: {f"{name}.{key}": p for key, p in part.named_parameters() if p.requires_grad}
        for name, part in {"unet": model.unet, **model.conditioner.parts()}.items()
    }
    groups = _groups(config, parameters)
    names = ("kind", "beta1", "beta2", "eps", "weight_decay", "d0", "d_coef")
    common: dict[str, Any] = {
        "optimizer": OptimizerSettings(**{name: getattr(config.optim, name) for name in names}),
        "max_grad_norm": config.optim.max_grad_norm,
        "precision": precision(config.train.precision, world),
    }
    graphs = is_fast and config.model.graphs
    if config.strategy.kind == "ddp":
        casts_once = is_fast and accumulation > 1 and config.adapter.kind == "full"  # an adapter's weights are few
        reduce_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.strategy.reduce_dtype]
        return DataParallel(
            world, model, groups, **common, graphs=graphs, casts_once=casts_once, reduce_dtype=reduce_dtype
        )
    return ZeRO(
        world,
        model,
        groups,
        **common,
        stage=config.strategy.stage,
        offload=config.strategy.offload != "none",
        offload_folder=None if config.strategy.offload_path is None else Path(config.strategy.offload_path),
        micro_batch=micro_batch,
        accumulation=accumulation,
        graphs=graphs,
    )


def _groups(config: Config, parameters: dict[str, dict[str, nn.Parameter]]) -> list[ParamGroup]:
    """Parameters of a component that have one learning rate."""
    text_lr, own = config.optim.text_encoder_lr, flat(config.optim.lr_ratios)
    require_parts("optim.lr_ratios", own, [name for named in parameters.values() for name in named])
    groups: list[ParamGroup] = []
    for component, named in parameters.items():
        is_text = component.startswith("text_encoder")
        usual = text_lr / config.optim.lr if is_text and text_lr is not None else 1.0
        by_ratio: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in named.items():
            by_ratio.setdefault(own.get(part_of(name, own) or "", usual), {})[name] = parameter
        groups += [ParamGroup(component, some, ratio) for ratio, some in sorted(by_ratio.items(), reverse=True)]
    return groups
