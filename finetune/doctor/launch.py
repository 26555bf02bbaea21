"""Who is who, on which machines, with which versions."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
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
from finetune import UserError, distributed, first_line
from finetune.config import Config
from finetune.distributed import World
from finetune.doctor.context import LIMITS_S, Context, odd_ones
from finetune.doctor.table import FAIL, OK, WARN, Row
from finetune.memory import size_text
from finetune.terminal import ranks_text

_CLOCKS_APART_S = 2.0
_DISTRIBUTION = "ldm-finetune"
_MATTER = ("torch", "deepspeed", "accelerate", "diffusers", "transformers", "peft", "safetensors", "wandb", "numpy")
_SEVERAL = {"SLURM_NTASKS": "SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE": "", "PMI_SIZE": "", "PMIX_SIZE": ""}
"""What other launchers say of the number of processes, and what must be set beside it for that to be about us."""


def host_name() -> str:
    """This machine, for messages and for telling machines apart: containers often share a name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:4]
    except OSError:
        boot = ""
    return f"{socket.gethostname()}{'/' if boot else ''}{boot}"


def launch_rows(config: Config) -> list[Row]:
    """What the launch asks for and this framework, whose strategies are its own, would ignore."""
    env = os.environ
    wrong: list[str] = []
    loose: list[str] = []
    strategy = config.strategy
    if env.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        if strategy.kind != "zero":
            wrong.append("accelerate was launched with a DeepSpeed plugin, which strategy=ddp ignores")
        else:
            ours = {
                "stage": str(strategy.stage),
                "offload_optimizer": strategy.offload,
                "offload_param": strategy.offload if strategy.stage == 3 else "none",
            }
            asked = {
                "stage": env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"),
                "offload_optimizer": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
                "offload_param": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
            }
            file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
            if file and file != "none":
                try:
                    zero = json.loads(Path(file).read_text()).get("zero_optimization", {})
                    asked |= {
                        "stage": str(zero.get("stage", 0)),
                        "offload_optimizer": zero.get("offload_optimizer", {}).get("device", "none"),
                        "offload_param": zero.get("offload_param", {}).get("device", "none"),
                    }
                    loose.append(f"{file} is not read but for this comparison")
                except (OSError, ValueError, AttributeError) as error:
                    wrong.append(f"the launch's DeepSpeed file {file} cannot be read ({first_line(error)})")
            wrong += [
                f"the launch's DeepSpeed plugin asks for {name}={said}, the run for {ours[name]}: it is ignored"
                for name, said in asked.items()
                if said is not None and said != ours[name]
            ]
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if env.get(name, "").lower() == "true":
            wrong.append(f"accelerate was launched with {what}, which is ignored here")
    mixed = env.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = config.train.precision
    if mixed not in ("no", "", precision) and not (precision == "auto" and mixed == "bf16"):
        loose.append(f"the launch's mixed_precision={mixed} is ignored: train.precision={precision} counts")
    if wrong:
        return [
            Row(
                "launch",
                FAIL,
                "; ".join(wrong + loose),
                "start with launchers/accelerate/one_machine.yaml (or torchrun), which leave DeepSpeed to "
                f"strategy=zero1, zero2 or zero3; strategy is kind={strategy.kind} stage={strategy.stage} now",
            )
        ]
    if loose:
        return [
            Row("launch", WARN, "; ".join(loose), "set what the run needs as overrides; drop it from the launch")
        ]
    launcher = (
        "torchrun or accelerate" if "TORCHELASTIC_RUN_ID" in env else "the environment" if "RANK" in env else ""
    )
    return [Row("launch", OK, f"ranks come from {launcher}" if launcher else "one process, no launcher")]


def process_rows(size: int) -> list[Row]:
    """One process where the launch looks like several."""
    env = os.environ
    for name, beside in _SEVERAL.items():
        said = env.get(name, "1")
        # torchrun on each node of a Slurm step is one task a node.
        if said.isdigit() and int(said) > 1 and "RANK" not in env and (not beside or beside in env):
            return [
                Row(
                    "processes",
                    FAIL,
                    f"{name}={said}, but RANK is not set: {said} processes would each train alone",
                    "start through launchers/slurm, torchrun or accelerate launch, one task a node",
                )
            ]
    nodes = env.get("SLURM_NNODES", "1")
    if "SLURM_STEP_ID" in env and nodes.isdigit() and int(nodes) > 1 and size < int(nodes):
        return [
            Row(
                "processes",
                FAIL,
                f"Slurm gave {nodes} nodes, and the run has {size} processes: nodes would be idle or train alone",
                "start torchrun on every node with one --rdzv-endpoint: launchers/slurm does",
            )
        ]
    return []


def join(config: Config, rank: int, size: int) -> tuple[World, dict[str, tuple[int, int]], str]:
    """Join the ranks as a run does; if a run would refuse, join anyway where that is possible.

    Returns:
        The world, what each layer says of (rank, size), and why a run would refuse ("" if it would not).

    Raises:
        UserError: the ranks can't be joined.
    """
    refused = ""
    uses_deepspeed = config.strategy.kind == "zero"
    try:
        world = distributed.start(config.train.device, uses_deepspeed=uses_deepspeed)
    except UserError as error:
        refused = str(error)
        with _without("ACCELERATE_USE_DEEPSPEED", "SLURM_STEP_ID" if size == 1 else ""):
            try:
                world = distributed.start(config.train.device, uses_deepspeed=uses_deepspeed)
            except UserError as again:
                if not dist.is_initialized() and size > 1:
                    raise UserError(refused) from again
                world = _by_hand(config, rank, size)
    layers = {"environment": (rank, size)}
    if dist.is_initialized():
        layers["torch.distributed"] = (dist.get_rank(), dist.get_world_size())
    if size > 1:
        from accelerate import PartialState

        state = PartialState(cpu=world.device.type == "cpu")
        layers["Accelerate"] = (state.process_index, state.num_processes)
    return world, layers, refused


def _by_hand(config: Config, rank: int, size: int) -> World:
    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and local >= torch.cuda.device_count():
        raise UserError(f"local rank {local} has no GPU of its own; start one process a GPU")
    return World(rank, size, local, torch.device("cuda", local) if on_gpu else torch.device("cpu"))


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """The environment without some variables, for a while."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def rank_rows(context: Context) -> list[Row]:
    """Join, and compare what all layers say."""
    outcomes = context.board.exchange(
        "ranks", lambda: _joined(context), limit_s=LIMITS_S["hosts"] * 2, collective=True
    )
    remedy = "start with a file of launchers/accelerate/, torchrun or launchers/slurm"
    if rows := context.failures("ranks", outcomes, remedy):
        context.world = None
        return rows
    wrong = []
    for rank, outcome in enumerate(outcomes):
        layers, refused = outcome.value
        if refused:
            remedy = "see what it says"
        if any(layer != (rank, context.size) for layer in layers.values()):
            said = ", ".join(f"{name} says rank {r} of {n}" for name, (r, n) in layers.items())
            wrong.append(f"{context.named([rank])}: {said}")
        elif refused and rank == 0:
            wrong.append(f"finetune train would refuse to start: {refused}")
    if wrong:
        return [Row("ranks", FAIL, "; ".join(wrong[:4]), remedy)]
    if context.size == 1:
        return [Row("ranks", OK, "one process, rank 0 of 1")]
    names = ", ".join(outcomes[0].value[0])
    return [Row("ranks", OK, f"{context.size} of {context.size}; {names} agree on rank and world size")]


def _joined(context: Context) -> tuple[dict[str, tuple[int, int]], str]:
    context.world, layers, refused = join(context.config, context.rank, context.size)
    return layers, refused


def host_rows(context: Context) -> list[Row]:
    """Devices, versions, code, config and clocks of all ranks."""
    outcomes = context.exchange("hosts", "looking at the machines", lambda: facts(context))
    if rows := context.failures("devices", outcomes, "see that torch and its drivers work on that machine"):
        return rows
    seen = [outcome.value for outcome in outcomes]
    # All ranks leave the exchange within its polling: what is left is the difference of their clocks.
    clocks = context.exchange("hosts", "clocks", time.time)
    return [
        *_device_rows(context, seen),
        *_version_rows(context, seen),
        *_config_rows(context, seen),
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


def _device_rows(context: Context, seen: list[dict[str, Any]]) -> list[Row]:
    kinds = odd_ones([each["device"] for each in seen])
    if len(kinds) > 1:
        said = "; ".join(f"{context.named(ranks)}: {kind}" for kind, ranks in kinds.items())
        return [
            Row("devices", FAIL, f"the ranks use different devices: {said}", "see why torch finds no GPU there")
        ]
    hosts = list(dict.fromkeys(each["host"] for each in seen))
    where = f"{len(hosts)} machine{'s' if len(hosts) > 1 else ''}"
    if "cpu" in kinds:
        idle = next((each for each in seen if each["driver"] or each["gpus"]), None)
        if idle is not None and context.config.train.device != "cpu":
            return [
                Row(
                    "devices",
                    FAIL,
                    f"{idle['host']} has NVIDIA's driver {idle['driver']}, but torch {torch.__version__} sees none",
                    "install torch for CUDA (no +cpu build), look at CUDA_VISIBLE_DEVICES and nvidia-smi, or set "
                    "train.device=cpu",
                )
            ]
        return [Row("devices", OK, f"{context.size} on CPU, {where}, {os.cpu_count()} cores here")]
    shared = {uuid: ranks for uuid, ranks in odd_ones([each["uuid"] for each in seen]).items() if len(ranks) > 1}
    if shared:
        said = "; ".join(f"{ranks_text(ranks)} are on GPU {uuid}" for uuid, ranks in shared.items())
        return [
            Row(
                "devices",
                FAIL,
                said,
                "start one process a GPU: --nproc-per-node, CUDA_VISIBLE_DEVICES, --gpus-per-task",
            )
        ]
    lame = [rank for rank, each in enumerate(seen) if not each["runs"]]
    if lame:
        return [
            Row(
                "devices",
                FAIL,
                f"torch {torch.__version__} was not built for {seen[lame[0]]['gpu']} ({context.named(lame)}): "
                f"it has {' '.join(torch.cuda.get_arch_list())}",
                "install a torch build for this GPU",
            )
        ]
    models = odd_ones([each["gpu"] for each in seen])
    text = ", ".join(f"{len(ranks)} x {name}" for name, ranks in models.items())
    text += f", {where}, {size_text(seen[0]['total'])} each"
    drivers = odd_ones([each["driver"] for each in seen])
    if len(models) > 1:
        said = "; ".join(f"{context.named(ranks)}: {name}" for name, ranks in models.items())
        return [Row("devices", WARN, said, "every step waits for the slowest GPU: choose nodes of one kind")]
    if len(drivers) > 1:
        said = "; ".join(f"{context.named(ranks)}: driver {name}" for name, ranks in drivers.items())
        return [Row("devices", WARN, f"{text}; {said}", "bring the machines to one driver")]
    busy = [rank for rank, each in enumerate(seen) if each["free"] < 0.9 * each["total"]]
    if busy:
        free = size_text(min(seen[rank]["free"] for rank in busy))
        return [
            Row(
                "devices", WARN, f"{text}; {ranks_text(busy)}: only {free} free", "see nvidia-smi for who uses them"
            )
        ]
    if context.size == 1 and seen[0]["gpus"] > 1:
        return [
            Row(
                "devices",
                WARN,
                f"{seen[0]['gpus']} GPUs here, and one process uses one of them",
                f"start with torchrun --nproc-per-node {seen[0]['gpus']} -m finetune.train ...",
            )
        ]
    if context.config.train.precision == "bf16" and seen[0]["capability"] < (8, 0):
        return [Row("devices", WARN, f"{text}: bf16 is emulated there", "train.precision=fp16 or fp32")]
    return [Row("devices", OK, f"{text}, driver {seen[0]['driver'] or '?'}")]


def _version_rows(context: Context, seen: list[dict[str, Any]]) -> list[Row]:
    mine: Mapping[str, str] = seen[0]["versions"]
    text = ", ".join(f"{name} {version}" for name, version in mine.items())
    apart = []
    for name in sorted(set().union(*(each["versions"] for each in seen))):
        said = odd_ones([each["versions"].get(name, "-") for each in seen])
        if len(said) > 1:
            apart.append(f"{name}: " + ", ".join(f"{v} on {context.named(ranks)}" for v, ranks in said.items()))
    if apart:
        return [Row("versions", FAIL, "; ".join(apart), "install the same environment on every machine")]
    unfit = _unfit(mine)
    if unfit:
        return [Row("versions", WARN, f"{'; '.join(unfit)} ({text})", "install what requirements.lock names")]
    return [Row("versions", OK, text)]


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


def _config_rows(context: Context, seen: list[dict[str, Any]]) -> list[Row]:
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
        return [
            Row("config", FAIL, "; ".join(wrong[:6]), "give every rank the same overrides, code and environment")
        ]
    return [Row("config", OK, f"the same on all ranks (config {seen[0]['config']}, code {seen[0]['code']})")]


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
