"""The machines of all ranks: devices, versions, code, config, clocks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from packaging.requirements import Requirement

import finetune
from finetune.doctor.context import Context, odd_ones
from finetune.doctor.table import FAIL, OK, WARN, Row
from finetune.memory import size_text
from finetune.terminal import ranks_text

_CLOCKS_APART_S = 2.0
_DISTRIBUTION = "ldm-finetune"
_MATTER = ("torch", "deepspeed", "accelerate", "diffusers", "transformers", "peft", "safetensors", "wandb", "numpy")


def host_name() -> str:
    """This machine, for messages and for telling machines apart: containers often share a name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:4]
    except OSError:
        boot = ""
    return f"{socket.gethostname()}{'/' if boot else ''}{boot}"


def host_rows(context: Context) -> list[Row]:
    """Devices, versions, code, config and clocks of all ranks."""
    outcomes = context.exchange("hosts", "looking at the machines", lambda: facts(context))
    if rows := context.failures("devices", outcomes, "see that torch and its drivers work on that machine"):
        return rows
    seen = [outcome.value for outcome in outcomes]
    # All ranks leave the exchange within its polling: what is left is the difference of their clocks.
    clocks = context.exchange("hosts", "clocks", time.time)
    return [
        _device_row(context, seen),
        _version_row(context, seen),
        _config_row(context, seen),
        _clock_row(context, [each.value for each in clocks]),
    ]


def facts(context: Context) -> dict[str, Any]:
    """What one rank sees of its machine and its software."""
    world = context.joined()
    found: dict[str, Any] = {
        "host": context.board.hosts[context.rank],
        "device": world.device.type,
        "versions": versions(),
        "code": code_sha256(),
        "config": config_sha256(context),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "driver": _driver(),
    }
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        major, minor = torch.cuda.get_device_capability(world.device)
        free, total = torch.cuda.mem_get_info(world.device)
        architectures = torch.cuda.get_arch_list()
        runs = any(
            int(name.split("_")[1].rstrip("af")) // 10 == major
            and int(name.split("_")[1].rstrip("af")) % 10 <= minor
            for name in architectures
            if name.startswith("sm_") and name.split("_")[1].rstrip("af").isdigit()
        ) or any(name.startswith("compute_") for name in architectures)
        found |= {
            "gpu": properties.name,
            "uuid": str(properties.uuid),
            "capability": (major, minor),
            "runs": runs or bool(torch.version.hip),
            "free": free,
            "total": total,
        }
    return found


def versions() -> dict[str, str]:
    """Versions of what matters, by name; "-" for what is not there."""
    found = {"finetune": finetune.__version__, "python": platform.python_version()}
    for name in _MATTER:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            found["cudnn"] = str(torch.backends.cudnn.version())
            if dist.is_available() and dist.is_nccl_available():
                found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def code_sha256() -> str:
    """Of the sources of this package."""
    root = Path(finetune.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def config_sha256(context: Context) -> str:
    return hashlib.sha256(OmegaConf.to_yaml(context.composed).encode()).hexdigest()[:12]


def _driver() -> str:
    """NVIDIA's driver on this machine, or ""."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    return next((word for word in first.split() if word[:1].isdigit() and "." in word), "?")


def _device_row(context: Context, seen: list[dict[str, Any]]) -> Row:
    kinds = odd_ones([each["device"] for each in seen])
    if len(kinds) > 1:
        said = "; ".join(f"{context.named(ranks)}: {kind}" for kind, ranks in kinds.items())
        return _devices(FAIL, f"the ranks use different devices: {said}", "see why torch finds no GPU there")
    hosts = list(dict.fromkeys(each["host"] for each in seen))
    where = f"{len(hosts)} machine{'s' if len(hosts) > 1 else ''}"
    if "cpu" not in kinds:
        return _gpu_fault(context, seen) or _gpu_row(context, seen, where)
    idle = next((each for each in seen if each["driver"] or each["gpus"]), None)
    if idle is not None and context.config.train.device != "cpu":
        return _devices(
            FAIL,
            f"{idle['host']} has NVIDIA's driver {idle['driver']}, but torch {torch.__version__} sees none",
            "install torch for CUDA (no +cpu build), look at CUDA_VISIBLE_DEVICES and nvidia-smi, or set "
            "train.device=cpu",
        )
    return _devices(OK, f"{context.size} on CPU, {where}, {os.cpu_count()} cores here")


def _devices(result: str, seen: str, remedy: str = "") -> Row:
    return Row("devices", result, seen, remedy)


def _gpu_fault(context: Context, seen: list[dict[str, Any]]) -> Row | None:
    """GPUs that cannot be trained on so."""
    shared = {uuid: ranks for uuid, ranks in odd_ones([each["uuid"] for each in seen]).items() if len(ranks) > 1}
    if shared:
        said = "; ".join(f"{ranks_text(ranks)} are on GPU {uuid}" for uuid, ranks in shared.items())
        remedy = "start one process a GPU: --nproc-per-node, CUDA_VISIBLE_DEVICES, --gpus-per-task"
        return _devices(FAIL, said, remedy)
    lame = [rank for rank, each in enumerate(seen) if not each["runs"]]
    if lame:
        return _devices(
            FAIL,
            f"torch {torch.__version__} was not built for {seen[lame[0]]['gpu']} ({context.named(lame)}): "
            f"it has {' '.join(torch.cuda.get_arch_list())}",
            "install a torch build for this GPU",
        )
    return None


def _gpu_row(context: Context, seen: list[dict[str, Any]], where: str) -> Row:
    """GPUs that work, and what slows them down."""
    models = odd_ones([each["gpu"] for each in seen])
    text = ", ".join(f"{len(ranks)} x {name}" for name, ranks in models.items())
    text += f", {where}, {size_text(seen[0]['total'])} each"
    if len(models) > 1:
        said = "; ".join(f"{context.named(ranks)}: {name}" for name, ranks in models.items())
        return _devices(WARN, said, "every step waits for the slowest GPU: choose nodes of one kind")
    drivers = odd_ones([each["driver"] for each in seen])
    if len(drivers) > 1:
        said = "; ".join(f"{context.named(ranks)}: driver {name}" for name, ranks in drivers.items())
        return _devices(WARN, f"{text}; {said}", "bring the machines to one driver")
    busy = [rank for rank, each in enumerate(seen) if each["free"] < 0.9 * each["total"]]
    if busy:
        free = size_text(min(seen[rank]["free"] for rank in busy))
        return _devices(WARN, f"{text}; {ranks_text(busy)}: only {free} free", "see nvidia-smi for who uses them")
    gpus = seen[0]["gpus"]
    if context.size == 1 and gpus > 1:
        remedy = f"start with torchrun --nproc-per-node {gpus} -m finetune.train ..."
        return _devices(WARN, f"{gpus} GPUs here, and one process uses one of them", remedy)
    if context.config.train.precision == "bf16" and seen[0]["capability"] < (8, 0):
        return _devices(WARN, f"{text}: bf16 is emulated there", "train.precision=fp16 or fp32")
    return _devices(OK, f"{text}, driver {seen[0]['driver'] or '?'}")


def _version_row(context: Context, seen: list[dict[str, Any]]) -> Row:
    mine: Mapping[str, str] = seen[0]["versions"]
    text = ", ".join(f"{name} {version}" for name, version in mine.items())
    apart = []
    for name in sorted(set().union(*(each["versions"] for each in seen))):
        said = odd_ones([each["versions"].get(name, "-") for each in seen])
        if len(said) > 1:
            apart.append(f"{name}: " + ", ".join(f"{v} on {context.named(ranks)}" for v, ranks in said.items()))
    if apart:
        return Row("versions", FAIL, "; ".join(apart), "install the same environment on every machine")
    if unfit := _unfit(mine):
        return Row("versions", WARN, f"{'; '.join(unfit)} ({text})", "install what requirements.lock names")
    return Row("versions", OK, text)


def _unfit(installed: Mapping[str, str]) -> list[str]:
    """Packages outside of what ours asks for."""
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires(_DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        return []  # run from a clone that is not installed
    found = []
    for each in wanted:
        version = installed.get(each.name)
        if version is None or (each.marker is not None and not each.marker.evaluate({"extra": ""})):
            continue
        if version == "-" or not each.specifier.contains(version, prereleases=True):
            found.append(f"{each.name} is {version}, wanted is {each.specifier}")
    return found


def _config_row(context: Context, seen: list[dict[str, Any]]) -> Row:
    codes, configs = (odd_ones([each[what] for each in seen]) for what in ("code", "config"))
    wrong = []
    if len(codes) > 1:
        wrong.append("different code: " + "; ".join(f"{context.named(r)} has {sha}" for sha, r in codes.items()))
    if len(configs) > 1:
        mine = dict(_flat(OmegaConf.to_container(context.composed)))
        all_values = [
            each.value for each in context.exchange("hosts", "comparing the configs", lambda: sorted(mine.items()))
        ]
        keys = sorted(set().union(*({key for key, _ in values} for values in all_values)))
        tables = [dict(values) for values in all_values]
        for key in keys:
            said = odd_ones([repr(table.get(key)) for table in tables])
            if len(said) > 1:
                context.apart.append(key)
                values = ", ".join(f"{value} on {context.named(ranks)}" for value, ranks in said.items())
                wrong.append(f"{key} is {values}")
    if wrong:
        return Row("config", FAIL, "; ".join(wrong[:6]), "give every rank the same overrides, code and environment")
    return Row("config", OK, f"the same on all ranks (config {seen[0]['config']}, code {seen[0]['code']})")


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _flat(value, f"{prefix}{'.' if prefix else ''}{name}")
    else:
        yield prefix, str(node)


def _clock_row(context: Context, times: list[float]) -> Row:
    apart = max(times) - min(times)
    if apart <= _CLOCKS_APART_S:
        return Row("clocks", OK, f"within {apart:.1f} s of each other")
    middle = sorted(times)[len(times) // 2]
    off = {rank: at - middle for rank, at in enumerate(times) if abs(at - middle) > _CLOCKS_APART_S / 2}
    said = ", ".join(f"{context.named([rank])} {seconds:+.1f} s" for rank, seconds in list(off.items())[:8])
    return Row(
        "clocks", WARN, f"the machines' clocks are {apart:.1f} s apart: {said}", "run NTP (chrony) on all of them"
    )
