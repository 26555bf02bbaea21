"""What a rank's memory has to hold whatever its batches are: known before weights are moved, and exactly after."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from finetune import UserError, by_all, memory
from finetune.build.averages import profiles
from finetune.build.strategy import precision
from finetune.config import Config
from finetune.distributed import OptimizerSettings, World
from finetune.memory import size_text


class Weight(NamedTuple):
    """A parameter: elements of all ranks, bytes of each, whether it is trained."""

    numel: int
    width: int
    is_trained: bool


@dataclass(frozen=True)
class Needs:
    """Bytes of one rank, by what they are for, in the device's memory and in the host's.

    Activations are not in it: they depend on the batch.
    """

    device: dict[str, int]
    host: dict[str, int]

    def text(self) -> str:
        return ", ".join(f"{name} {size_text(count)}" for name, count in self.device.items() if count)


def needs_of(
    weights: Iterable[Weight],
    optimizer: OptimizerSettings,
    *,
    world_size: int,
    stage: int,
    offload: str,
    accumulation: int,
    averages: int,
    owned: int | None = None,
    own: int = 0,
) -> Needs:
    """Weights, gradients, masters, moments and averages of a rank.

    ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3): stage 1 spreads masters and moments over the ranks,
    stage 2 gradients too, stage 3 weights too.

    Args:
        stage: 0 without ZeRO. offload: with `cpu` what the optimizer has, and under stage 3 the weights, are in
            host memory; with `nvme` masters and moments are in files.
        averages: how many. owned: trained weights of this rank, where that is known.
        own: bytes of what the optimizer keeps in other shapes than weights.
    """
    weights = list(weights)
    trained = sum(weight.numel for weight in weights if weight.is_trained)
    if owned is None:
        owned = math.ceil(trained / world_size) if stage else trained
    # ZeRO's sums of what a rank owns, in float32. Under stage 1 gradients wait for the step's last micro-batch. (A
    # CUDA graph keeps gradients as well, and is given up where memory is short.)
    is_summed = stage > 0 and offload == "none"
    held, gradients = 0, 4 * owned if is_summed else 0
    for numel, width, is_trained in weights:
        share = math.ceil(numel / world_size)
        held += width * (share if stage == 3 else numel)
        if is_trained and (not is_summed or (stage == 1 and accumulation > 1)):
            gradients += width * (share if stage >= 2 else numel)
    kinds = optimizer.of_a_weight
    moments = 4 * owned * (len(kinds) - ("y" in kinds)) + own  # y is the master
    of_optimizer = {"masters": 4 * owned if stage else 0, "moments": moments}
    average = {"average": 4 * owned * averages}
    device: dict[str, int] = {"gradients": gradients}
    host: dict[str, int] = {}
    is_offloaded = offload != "none"
    (host if is_offloaded and stage == 3 else device).update({"weights": held})
    (host if is_offloaded else device).update(average if offload == "nvme" else of_optimizer | average)
    # A checkpoint is written from a copy in host memory: masters, averages and moments.
    saved = 4 * (1 + len(kinds) + averages)
    host["checkpoint copy"] = saved * math.ceil(trained / world_size) + math.ceil(own / world_size)
    return Needs(device, host)


def require_memory(config: Config, world: World, module: nn.Module, accumulation: int) -> None:
    """Refuse what no batch would fit beside, before weights are moved and ranks are ended one by one. Collective.

    Args:
        module: the model as it was loaded, in this process's memory.

    Raises:
        UserError: some rank's device, or some machine, has less than its share of weights, gradients, moments and
            averages takes; on all ranks.
    """
    is_zero, offload = config.strategy.kind == "zero", config.strategy.offload
    rounds = is_zero and precision(config.train.precision, world) != "fp32"
    needs = needs_of(
        [Weight(p.numel(), 2 if rounds else p.element_size(), p.requires_grad) for p in module.parameters()],
        OptimizerSettings(kind=config.optim.kind),
        world_size=world.size,
        stage=config.strategy.stage if is_zero else 0,
        offload=offload,
        accumulation=accumulation,
        averages=len(profiles(config.ema)),
    )
    device = sum(needs.device.values())
    if offload != "none":  # gradients leave as they come
        device -= needs.device["gradients"]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    host = ranks * (sum(needs.host.values()) - needs.host["checkpoint copy"])
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        short = _short(device, torch.cuda.mem_get_info(world.device)[1], f"rank {world.rank}'s GPU", needs)
    else:
        host, short = host + ranks * device, None
    short = short or _short(host, memory.limit_bytes(), f"the {ranks} rank(s) of a machine", needs)
    told = [one for one in world.gather(short) if one is not None]
    if told:
        raise by_all(UserError(told[0]))


def _short(wanted: int, there: int, whose: str, needs: Needs) -> str | None:
    if wanted <= there:
        return None
    return (
        f"{whose} would hold {size_text(wanted)} beside activations, and {size_text(there)} are there (a rank: "
        f"{needs.text()}): use strategy=zero2 or zero3 on more processes, strategy=zero3_offload, or adapter=lora"
    )
