"""Tiny runs with every optimizer under the strategies that it goes with, saved, gone on with, and compared.

    torchrun --nproc_per_node 2 tests/strategies/optimizing.py FOLDER

Writes runs to FOLDER/OPTIMIZER/STRATEGY and, gone on with under another strategy, FOLDER/OPTIMIZER/FROM-STRATEGY.
Two groups of parameters have learning rates of their own, gradients are clipped, and one step is skipped.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune import distributed
from finetune.checkpoint import Checkpoints, Layout, Progress
from finetune.distributed import NEED_WHOLE, DataParallel, OptimizerSettings, ParamGroup, Strategy, World, ZeRO

STEPS, SAVED, SKIPPED = 6, 3, 1
SETTINGS = {
    kind: OptimizerSettings(kind, beta2=0.99, weight_decay=0.1, d0=1e-3 if kind == "prodigy" else 1e-6)
    for kind in distributed.KINDS
}
ZEROS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_files")


class Net(nn.Module):
    """Its matrix is large enough for 8 bits, and has an odd number of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 6, 3), nn.Linear(23, 179)

    def save_config(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.unet = Net()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        net = self.unet
        h = net.conv(x_BCHW).flatten(1)[:, :23]
        return (net.out(h) - x_BCHW.mean((1, 2, 3))[:, None]).square().mean(1)


def learning_rate(kind: str, number: int) -> float:
    return (1.0 if kind == "prodigy" else 1e-2) * min(1.0, (number + 1) / 2)


def pictures(number: int) -> Tensor:
    """A global batch of 4; that of the skipped step is broken."""
    x_BCHW = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(number))
    if number == SKIPPED:
        x_BCHW[3, 0, 0, 0] = float("inf")
    return x_BCHW


def make(world: World, kind: str, name: str = "ddp") -> Strategy:
    model = Model()
    named = dict(model.named_parameters())
    ratio = 1.0 if kind == "prodigy" else 0.5
    groups = [
        ParamGroup("unet", {name: p for name, p in named.items() if ".out." in name}),
        ParamGroup("unet", {name: p for name, p in named.items() if ".conv." in name}, ratio),
    ]
    common: dict[str, Any] = {"optimizer": SETTINGS[kind], "max_grad_norm": 0.1, "precision": "fp32"}
    if name == "ddp":
        return DataParallel(world, model, groups, **common)
    common |= {"stage": int(name[4]), "offload": name.endswith(("_offload", "_files"))}
    folder = Path(tempfile.gettempdir()) if name.endswith("_files") else None
    return ZeRO(world, model, groups, **common, offload_folder=folder, micro_batch=2, accumulation=1)


def step(strategy: Strategy, number: int) -> None:
    """Two micro-batches, by one rank or two."""
    world = strategy.world
    micros = pictures(number).chunk(2)
    mine = [micros[world.rank]] if world.size == 2 else micros
    for place, x_BCHW in enumerate(mine):
        strategy.backward((x_BCHW,), global_batch=4, last=place == len(mine) - 1)
    strategy.step(learning_rate(strategy.settings.kind, number))


def run(folder: Path, strategy: Strategy, start: Path | None = None) -> None:
    """From `start`, the folder of a run that was saved after `SAVED` steps, or from the beginning."""
    checkpoints = Checkpoints(folder, Layout({"unet": strategy.module.unet}), keep=2)
    first = 0
    if start is not None:
        path = start / "checkpoints" / f"step-{SAVED:08d}"
        checkpoints.restore(path, strategy, ())
        first = SAVED
    for number in range(first, STEPS):
        step(strategy, number)
        if number + 1 in (SAVED, STEPS):
            at = number + 1
            progress = Progress(at, 4 * at, strategy.steps_taken, optimizer=strategy.counts())
            checkpoints.save(progress, strategy, ())


def saved(folder: Path, at: int = STEPS) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by file and key."""
    root = folder / "checkpoints" / f"step-{at:08d}"
    files = {str(path.relative_to(root)): load_file(path) for path in root.rglob("*.safetensors")}
    return {f"{file}:{key}": tensor for file, tensors in files.items() for key, tensor in tensors.items()}


def main(folder: Path) -> None:
    world = distributed.start("cpu", uses_deepspeed=True)
    for kind in distributed.KINDS:
        names = ("ddp",) if kind in NEED_WHOLE else ("ddp", *ZEROS)
        for name in names:
            if kind == "adamw" and name != "ddp":
                continue  # tests/strategies has whole runs of it
            run(folder / kind / name, make(world, kind, name))
        if kind in ("lion", "schedule_free"):
            for start, name in (("ddp", "zero3"), ("zero2", "zero2"), ("zero3", "ddp"), ("zero1", "zero3_offload")):
                run(folder / kind / f"{start}-{name}", make(world, kind, name), folder / kind / start)
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
