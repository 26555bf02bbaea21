"""Whether all ranks have the same weights: checksums of every bit, taken where the tensors lie."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finetune.distributed import Shard, Strategy
from finetune.doctor.context import Context, odd_ones
from finetune.doctor.table import FAIL, OK, Row
from finetune.loop import Parts

_CHUNK = 1 << 23  # elements whose checksum is taken at once: 64 MiB of int64


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """Of all bits and their places: any one difference changes it.

    Args:
        tensor: of any shape, dtype and device; it is summed there, modulo 2^64.
    """
    flat = tensor.detach().contiguous().view(-1)
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.view(widths[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _CHUNK):
        piece = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(piece), device=flat.device)
        # Odd factors, so that no change of one element is lost; int64 wraps around.
        total += (piece * (places * -7046029254386353131 | 1)).sum()
    return int(total)


@dataclass
class Weights:
    """Checksums at one moment, on one rank.

    Attributes:
        working: by name, of what forward passes use, and of the average under DDP. Under ZeRO-3 of what a gather
            brings, but for the small parameters that every rank keeps whole.
        masters: by name, of this rank's shards.
        apart: trained parameters whose working weights are not their rounded masters.
        owned: elements of this rank's shards.
        finite: all masters are finite numbers.
    """

    working: dict[str, int] = field(default_factory=dict)
    masters: dict[str, int] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    owned: int = 0
    finite: bool = True

    def digest(self) -> str:
        return hashlib.sha256(repr(sorted(self.working.items())).encode()).hexdigest()[:12]

    def masters_digest(self) -> str:
        return hashlib.sha256(repr(sorted(self.masters.items())).encode()).hexdigest()[:12]


@torch.no_grad()
def weights_of(parts: Parts, *, gather: bool = True) -> Weights:
    """Checksums of everything that ranks must agree on; collective.

    Args:
        gather: put ZeRO-3's pieces together, one parameter at a time; else they are left out of `working`.
    """
    strategy, found = parts.strategy, Weights()
    strategy.settle()
    stage: int = getattr(strategy, "stage", 0)
    parameters = parameters_of(strategy)
    for name, parameter in parameters.items():
        if not hasattr(parameter, "ds_numel") or parameter.data.numel() == parameter.ds_numel:
            found.working[name] = checksum(parameter.data)
        elif gather:
            found.working[name] = _gathered(parameter)
    for name, buffer in strategy.module.named_buffers():
        found.working[name] = checksum(buffer)
    if parts.average is not None and stage == 0:
        for shard, tensor in zip(strategy.shards, parts.average.tensors, strict=True):
            found.working[f"average of {shard.name}"] = checksum(tensor)
    for shard in strategy.shards:
        if not shard.master.numel():
            continue
        found.masters[shard.name] = checksum(shard.master)
        found.owned += shard.master.numel()
        found.finite = found.finite and bool(torch.isfinite(shard.master).all())
        if stage and not _rounded(parameters[shard.name], shard, stage):
            found.apart.append(shard.name)
    return found


def _gathered(parameter: Any) -> int:
    from deepspeed import zero  # takes seconds, and is here when there is such a parameter

    with zero.GatheredParameters([parameter]):
        return checksum(parameter.data)


def parameters_of(strategy: Strategy) -> dict[str, Any]:
    """All parameters by the names that shards have."""
    model: Any = strategy.module
    return {
        f"{name}.{key}": parameter
        for name, part in {"unet": model.unet, **model.conditioner.parts()}.items()
        for key, parameter in part.named_parameters()
    }


def _rounded(parameter: Any, shard: Shard, stage: int) -> bool:
    """Whether a piece of the working weights is its master, rounded."""
    count = shard.master.numel()
    if stage == 3:
        working = parameter.ds_tensor.data.view(-1)[:count]
        whole = parameter.data.reshape(-1)
        if len(whole) == parameter.ds_numel and not torch.equal(
            whole[shard.start : shard.start + count], working.to(whole.device)
        ):
            return False
    else:
        working = parameter.data.view(-1)[shard.start : shard.start + count]
    return torch.equal(working.to(shard.master.device), shard.master.reshape(-1).to(working.dtype))


def keep(box: list[Weights], weights: Weights) -> tuple[str, list[str], int, bool]:
    box.append(weights)
    return weights.digest(), weights.apart[:4], weights.owned, weights.finite


def equal_rows(context: Context, mine: Weights, outcomes: Sequence[Any], when: str) -> list[Row]:
    """Rows on one moment's weights; `outcomes` are of `keep`."""
    parts = context.parts
    assert parts is not None
    remedy = (
        "the ranks train different models: see that all load the same files in the same environment; if a rank "
        "goes apart during the steps, its GPU or memory may be faulty: leave its machine out"
    )
    digests = odd_ones([outcome.value[0] for outcome in outcomes])
    wrong = []
    if len(digests) > 1:
        # Only now the names: thousands of checksums from each rank are not for every run.
        tables = [each.value for each in context.exchange("weights", "comparing the weights", lambda: mine.working)]
        agreed = next(iter(digests.values()))[0]
        for ranks in list(digests.values())[1:5]:
            odd = [name for name, value in tables[agreed].items() if tables[ranks[0]].get(name) != value]
            wrong.append(
                f"{context.named(ranks)} differ{'s' if len(ranks) == 1 else ''} from rank {agreed} in "
                f"{len(odd)} of {len(tables[agreed])} tensors{f', first {odd[0]}' if odd else ''}"
            )
    for rank, outcome in enumerate(outcomes):
        _, apart, _, finite = outcome.value
        if apart:
            wrong.append(f"{context.named([rank])}: working weights are not the rounded masters in {apart[0]}")
        if not finite:
            wrong.append(f"{context.named([rank])}: some weights are not finite numbers")
    owned = sum(outcome.value[2] for outcome in outcomes)
    whole = sum(shard.shape.numel() for shard in parts.strategy.shards)
    copies = context.size if all(shard.is_whole for shard in parts.strategy.shards) else 1
    if owned != copies * whole:
        wrong.append(f"the ranks' shards hold {owned} elements, the trained weights are {copies * whole}")
    if wrong:
        return [Row("weights", FAIL, f"{when}: {'; '.join(wrong[:4])}", remedy)]
    return [Row("weights", OK, when)]


def moved_names(parts: Parts, before: Weights, after: Weights) -> tuple[list[str], list[str]]:
    """Names of masters on this rank that the steps changed, and of frozen parameters that changed."""
    moved = [name for name, value in after.masters.items() if before.masters[name] != value]
    trained = {shard.name for shard in parts.strategy.shards}
    frozen = [
        name
        for name in parameters_of(parts.strategy)
        if name not in trained and before.working[name] != after.working[name]
    ]
    return moved, frozen


def moved_rows(context: Context, seen: list[tuple[list[str], list[str]]]) -> list[Row]:
    if frozen := [(rank, names[0]) for rank, (_, names) in enumerate(seen) if names]:
        rank, name = frozen[0]
        return [Row("weights", FAIL, f"{context.named([rank])}: the frozen {name} was changed", "report this")]
    if not any(moved for moved, _ in seen):
        return [
            Row(
                "weights",
                FAIL,
                "the steps changed no weight",
                "look at the learning rate below, and at whether the loss is finite",
            )
        ]
    return [Row("weights", OK, "moved")]
