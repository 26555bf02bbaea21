"""Where a command computes: its place among the processes that were started, and its device."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune import UserError, first_line

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher started. One that was started alone is 0 of 1."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def find(cls) -> Place:
        """From what torchrun, accelerate and srun leave in the environment."""

        def number(*names: str, default: int) -> int:
            texts = (os.environ.get(name, "").partition("(")[0].partition(",")[0] for name in names)
            return next((int(text) for text in texts if text.isdigit()), default)

        return cls(
            number("RANK", "SLURM_PROCID", default=0),
            number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1),
            number("LOCAL_RANK", "SLURM_LOCALID", default=0),
            number("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", default=1),
        )


def choose_device(name: str) -> torch.device:
    """The torch device of --device; `auto` is this process's GPU among those of its machine. A GPU becomes current.

    Raises:
        UserError: no such device here.
    """
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", Place.find().local_rank % torch.cuda.device_count())
    else:
        try:
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # which `meta` can't, nor a GPU that is broken
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"--device {name} can't be used here ({first_line(error)}); try --device auto"
            ) from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and Triton's kernels go to the current one, whatever tensors say
    return device


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: a GPU if any)")
