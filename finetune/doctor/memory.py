"""What a run needs against what is there, on the device and in host memory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from finetune import memory
from finetune.build import OUT_OF_MEMORY
from finetune.build.needs import Needs, Weight, needs_of
from finetune.doctor.context import Context
from finetune.doctor.table import FAIL, OK, WARN, Row
from finetune.loop import Parts
from finetune.memory import size_text

_TIGHT = 0.9


def estimate(parts: Parts, world_size: int, *, offload: str = "none") -> Needs:
    """Of this rank, from what was built."""
    strategy = parts.strategy
    needs = needs_of(
        [Weight(whole_numel(p), p.element_size(), p.requires_grad) for p in strategy.module.parameters()],
        strategy.settings,
        world_size=world_size,
        stage=getattr(strategy, "stage", 0),
        offload=offload,
        accumulation=parts.accumulation,
        averages=len(parts.averages),
        owned=sum(shard.master.numel() for shard in strategy.shards),
        own=sum(tensor.nbytes for of_shard in strategy.own_state() for tensor in of_shard.values()),
    )
    copies = getattr(strategy, "copies", None)
    if copies is not None:
        needs.device["weights"] += copies.nbytes
    return needs


def whole_numel(parameter: Any) -> int:
    """Elements of a parameter, which ZeRO-3 may have taken to pieces."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def expected_of(context: Context) -> Needs:
    """The estimate of what was built."""
    assert context.parts is not None
    return estimate(context.parts, context.size, offload=context.config.strategy.offload)


def memory_rows(context: Context, expected: Needs) -> list[Row]:
    """The estimate, and the peak of the steps made so far, against what each machine has."""
    outcomes = context.exchange("hosts", "memory", lambda: _measure(context, expected))
    if rows := context.failures("memory", outcomes, "see the rows above"):
        return rows
    seen = [outcome.value for outcome in outcomes]
    return [_device_row(context, seen), _host_row(context, seen)]


def _measure(context: Context, expected: Needs) -> dict[str, Any]:
    world = context.joined()
    host_now, host_capacity = host_memory()
    found: dict[str, Any] = {
        "text": expected.text(),
        "device": sum(expected.device.values()),
        "host": sum(expected.host.values()),
        "copy": expected.host["checkpoint copy"],
        "host_now": host_now,
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


def host_memory() -> tuple[int, int]:
    """Bytes: held by this process now, and what its machine or cgroup may use.

    Pages of files, mapped weights above all, are left out: ranks share them, and the system takes them back.
    """
    import psutil

    held = psutil.Process().memory_info().rss
    with contextlib.suppress(OSError):  # no /proc
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        held = sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    return held, memory.limit_bytes()


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
        return sum(each["host_now"] + each["copy"] for each in ranks)

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
