"""What a run needs against what is there, on the device and in host memory."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch

from finetune import memory
from finetune.build import OUT_OF_MEMORY
from finetune.doctor.context import Context
from finetune.doctor.table import FAIL, OK, WARN, Row, size_text
from finetune.loop import Parts

_TIGHT = 0.9


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, by what they are for, in the device's memory and in the host's.

    Activations are not in it: they depend on the batch, and the two steps measure them.
    """

    device: dict[str, int]
    host: dict[str, int]

    def text(self) -> str:
        return ", ".join(f"{name} {size_text(count)}" for name, count in self.device.items() if count)


def estimate(parts: Parts, world_size: int, *, offload: str = "none") -> Estimate:
    """Weights, gradients, masters, moments and averages of this rank, from the tensors themselves.

    ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3): stage 1 spreads masters and moments over the ranks,
    stage 2 gradients too, stage 3 weights too. `offload`: with `cpu` what the optimizer has, and under stage 3 the
    weights, are in host memory; with `nvme` masters and moments are in files.
    """
    strategy = parts.strategy
    stage: int = getattr(strategy, "stage", 0)
    owned = sum(shard.master.numel() for shard in strategy.shards)
    # ZeRO's sums of what a rank owns, in float32. Under stage 1 gradients wait for the step's last micro-batch. (A
    # CUDA graph keeps gradients as well, and is given up where memory is short.)
    is_summed = stage > 0 and offload == "none"
    weights, gradients = 0, 4 * owned if is_summed else 0
    for parameter in strategy.module.parameters():
        count = whole_numel(parameter)
        width = parameter.element_size()
        weights += width * (math.ceil(count / world_size) if stage == 3 else count)
        if parameter.requires_grad and (not is_summed or (stage == 1 and parts.accumulation > 1)):
            gradients += width * (math.ceil(count / world_size) if stage >= 2 else count)
    copies = getattr(strategy, "copies", None)
    weights += 0 if copies is None else copies.nbytes
    kinds = strategy.settings.of_a_weight
    own = sum(tensor.nbytes for of_shard in strategy.own_state() for tensor in of_shard.values())
    moments = 4 * owned * (len(kinds) - ("y" in kinds)) + own  # y is the master
    optimizer = {"masters": 4 * owned if stage else 0, "moments": moments}
    average = {"average": 4 * owned * len(parts.averages)}
    device: dict[str, int] = {"gradients": gradients}
    host: dict[str, int] = {}
    is_offloaded = offload != "none"
    (host if is_offloaded and stage == 3 else device).update({"weights": weights})
    (host if is_offloaded else device).update(average if offload == "nvme" else optimizer | average)
    # A checkpoint is written from a copy in host memory: masters, averages and moments.
    saved = 4 * (1 + len(kinds) + len(parts.averages))
    host["checkpoint copy"] = saved * math.ceil(trained_numel(parts) / world_size) + math.ceil(own / world_size)
    return Estimate(device, host)


def whole_numel(parameter: Any) -> int:
    """Elements of a parameter, which ZeRO-3 may have taken to pieces."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def trained_numel(parts: Parts) -> int:
    return sum(math.prod(shard.shape) for shard in parts.strategy.shards)


def expected_of(context: Context) -> Estimate:
    """The estimate of what was built."""
    assert context.parts is not None
    return estimate(context.parts, context.size, offload=context.config.strategy.offload)


def memory_rows(context: Context, expected: Estimate) -> list[Row]:
    """The estimate, and the peak of the steps made so far, against what each machine has."""
    outcomes = context.exchange("hosts", "memory", lambda: _measure(context, expected))
    if rows := context.failures("memory", outcomes, "see the rows above"):
        return rows
    seen = [outcome.value for outcome in outcomes]
    return [_device_row(context, seen), _host_row(context, seen)]


def _measure(context: Context, expected: Estimate) -> dict[str, Any]:
    world = context.joined()
    host_now, host_peak, host_capacity = host_memory()
    found: dict[str, Any] = {
        "text": expected.text(),
        "device": sum(expected.device.values()),
        "host": sum(expected.host.values()),
        "copy": expected.host["checkpoint copy"],
        "host_now": host_now,
        "host_peak": host_peak,
        "host_capacity": host_capacity,
    }
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        # What torch does not count: CUDA's context, NCCL's buffers, and other processes.
        others = total - free - torch.cuda.memory_reserved(world.device)
        found |= {
            "peak": context.peak_bytes + others,
            "reserved": context.reserved_bytes + others,
            "capacity": total,
        }
    return found


def host_memory() -> tuple[int, int, int]:
    """Bytes: resident in this process now, at most so far, and what this process's machine or cgroup may use."""
    import psutil

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return psutil.Process().memory_info().rss, peak, memory.limit_bytes()


def _device_row(context: Context, seen: list[dict[str, Any]]) -> Row:
    if "peak" not in seen[0]:
        text = f"on the CPU: estimated a rank, without activations: {seen[0]['text']}"
        return Row("memory", FAIL, text, OUT_OF_MEMORY) if context.is_full else Row("memory", OK, text)
    worst = max(range(len(seen)), key=lambda rank: seen[rank]["peak"] / seen[rank]["capacity"])
    it = seen[worst]
    text = (
        f"estimated {size_text(it['device'])} a GPU without activations ({it['text']}); measured peak "
        f"{size_text(it['peak'])} of {size_text(it['capacity'])} on {context.named([worst])} "
        f"({size_text(it['reserved'])} with torch's reserve)"
    )
    if context.is_full:
        return Row("memory", FAIL, f"{text}, when the steps found no more", OUT_OF_MEMORY)
    if it["peak"] > it["capacity"] or it["device"] > it["capacity"]:
        return Row("memory", FAIL, text, OUT_OF_MEMORY)
    if it["peak"] > _TIGHT * it["capacity"]:
        return Row("memory", WARN, f"{text}: tight, other pictures or samples may not fit", OUT_OF_MEMORY)
    return Row("memory", OK, text)


def _host_row(context: Context, seen: list[dict[str, Any]]) -> Row:
    """All ranks of a machine share its memory."""
    by_host: dict[str, list[dict[str, Any]]] = {}
    for host, each in zip(context.board.hosts, seen, strict=True):
        by_host.setdefault(host, []).append(each)

    def needed(ranks: list[dict[str, Any]]) -> int:
        return sum(max(each["host_peak"], each["host_now"] + each["copy"]) for each in ranks)

    host = max(by_host, key=lambda name: needed(by_host[name]) / by_host[name][0]["host_capacity"])
    ranks = by_host[host]
    need, capacity = needed(ranks), ranks[0]["host_capacity"]
    now, copies = (sum(each[what] for each in ranks) for what in ("host_now", "copy"))
    text = (
        f"{len(ranks)} rank(s) on {host} use {size_text(now)} and need up to {size_text(need)} (a checkpoint's "
        f"copy: {size_text(copies)}) of {size_text(capacity)}"
    )
    remedy = "ask for more memory (Slurm: --mem), use more machines, or put less there (no offload, adapter=lora)"
    if need > capacity:
        return Row("host memory", FAIL, text, remedy)
    if need > _TIGHT * capacity:
        return Row("host memory", WARN, text, remedy)
    return Row("host memory", OK, text)
