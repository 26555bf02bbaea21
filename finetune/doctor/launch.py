"""What the launch asks for, and who is who."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from finetune import UserError, distributed, first_line
from finetune.config import Config, StrategyConfig
from finetune.distributed import World
from finetune.doctor.context import LIMITS_S, Context
from finetune.doctor.table import FAIL, OK, WARN, Row

_SEVERAL = {"SLURM_NTASKS": "SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE": "", "PMI_SIZE": "", "PMIX_SIZE": ""}
"""What other launchers say of the number of processes, and what must be set beside it for that to be about us."""


def launch_rows(config: Config) -> list[Row]:
    """What the launch asks for and this framework, whose strategies are its own, would ignore."""
    env, strategy = os.environ, config.strategy
    wrong, loose = _of_plugin(strategy)
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if env.get(name, "").lower() == "true":
            wrong.append(f"accelerate was launched with {what}, which is ignored here")
    mixed = env.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = config.train.precision
    if mixed not in ("no", "", precision) and not (precision == "auto" and mixed == "bf16"):
        loose.append(f"the launch's mixed_precision={mixed} is ignored: train.precision={precision} counts")
    if wrong:
        remedy = (
            "start with launchers/accelerate/one_machine.yaml (or torchrun), which leave DeepSpeed to "
            f"strategy=zero1, zero2 or zero3; strategy is kind={strategy.kind} stage={strategy.stage} now"
        )
        return [Row("launch", FAIL, "; ".join(wrong + loose), remedy)]
    if loose:
        remedy = "set what the run needs as overrides; drop it from the launch"
        return [Row("launch", WARN, "; ".join(loose), remedy)]
    launcher = (
        "torchrun or accelerate" if "TORCHELASTIC_RUN_ID" in env else "the environment" if "RANK" in env else ""
    )
    return [Row("launch", OK, f"ranks come from {launcher}" if launcher else "one process, no launcher")]


def _of_plugin(strategy: StrategyConfig) -> tuple[list[str], list[str]]:
    """What accelerate's DeepSpeed plugin asks for and the run doesn't, and what is ignored without harm."""
    env = os.environ
    if env.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return [], []
    if strategy.kind != "zero":
        return ["accelerate was launched with a DeepSpeed plugin, which strategy=ddp ignores"], []
    wrong: list[str] = []
    loose: list[str] = []
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
    return wrong, loose


def process_rows(size: int) -> list[Row]:
    """One process where the launch looks like several."""
    env = os.environ
    for name, beside in _SEVERAL.items():
        said = env.get(name, "1")
        # torchrun on each node of a Slurm step is one task a node.
        if said.isdigit() and int(said) > 1 and "RANK" not in env and (not beside or beside in env):
            seen = f"{name}={said}, but RANK is not set: {said} processes would each train alone"
            remedy = "start through launchers/slurm, torchrun or accelerate launch, one task a node"
            return [Row("processes", FAIL, seen, remedy)]
    nodes = env.get("SLURM_NNODES", "1")
    if "SLURM_STEP_ID" in env and nodes.isdigit() and int(nodes) > 1 and size < int(nodes):
        seen = f"Slurm gave {nodes} nodes, and the run has {size} processes: nodes would be idle or train alone"
        remedy = "start torchrun on every node with one --rdzv-endpoint: launchers/slurm does"
        return [Row("processes", FAIL, seen, remedy)]
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
