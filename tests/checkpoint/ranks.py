"""Checks that need several ranks, in one launch: importing costs more than they do.

    torchrun --nproc_per_node 2 tests/checkpoint/ranks.py SETTINGS.json

SETTINGS.json holds `overrides` of a tiny run and a `folder`. Rank 0 writes what each check found to
`folder/found.json`, for the tests to judge.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

from finetune import UserError, build, distributed
from finetune.checkpoint import Checkpoints, Progress, checkpoints, find_fault, require_shared
from finetune.config import Config, compose
from finetune.distributed import MOMENTS, Control, Facts, Shard, World
from finetune.loop import Parts

STRATEGIES = {
    "ddp": ["strategy=ddp", "model.channels_last=true"],
    "zero1": ["strategy=zero1", "model.channels_last=false"],
    "zero2": ["strategy=zero2", "model.channels_last=true"],
    "zero3": ["strategy=zero3", "model.channels_last=true"],
}
KINDS = ("weights", "ema", "ema-short", "ema-power-0.1", *MOMENTS)


def make(overrides: list[str], world: World, run: Path, *more: str) -> Parts:
    config = compose("train", [*overrides, f"run.dir={run}", *more], Config)[0]
    run.mkdir(parents=True, exist_ok=True)
    return build.build(config, world, run)


def lists_of(parts: Parts) -> dict[str, list[torch.Tensor]]:
    masters = [shard.master for shard in parts.strategy.shards]
    kinds = {kind: parts.strategy.moments(kind) for kind in MOMENTS}
    return {"weights": masters, **{it.name: it.tensors for it in parts.averages}, **kinds}


def whole(shard: Shard, kind: str) -> torch.Tensor:
    """What a parameter is in files: no two elements alike that could be mistaken for each other."""
    generator = torch.Generator().manual_seed(hash_of(f"{kind} {shard.name}"))
    return torch.rand(shard.file_shape, generator=generator)


def hash_of(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())


def fill(parts: Parts) -> None:
    with torch.no_grad():
        for kind, tensors in lists_of(parts).items():
            for shard, tensor in zip(parts.strategy.shards, tensors, strict=True):
                tensor.copy_(shard.piece_of(shard.from_file(whole(shard, kind))))
    parts.strategy.set_steps_taken(7)


def zero(parts: Parts) -> None:
    with torch.no_grad():
        for tensors in lists_of(parts).values():
            for tensor in tensors:
                tensor.zero_()


def wrong_here(parts: Parts) -> list[str]:
    """What of this rank's tensors is not what `fill` made it."""
    return [
        f"{kind} {shard.name}"
        for kind, tensors in lists_of(parts).items()
        for shard, tensor in zip(parts.strategy.shards, tensors, strict=True)
        if not torch.equal(tensor, shard.piece_of(shard.from_file(whole(shard, kind))))
    ]


def wrong_in_files(parts: Parts, path: Path) -> list[str]:
    wrong = []
    read = functools.cache(load_file)
    for kind in KINDS:
        for shard in parts.strategy.shards:
            if kind in MOMENTS:
                file, key = f"optimizer/{kind}.safetensors", shard.name
            else:
                file, key = parts.checkpoints.layout.locate(shard.name)
                file = f"{kind}/{file}"
            if not torch.equal(read(path / file)[key], whole(shard, kind)):
                wrong.append(f"{kind} {shard.name}")
    return wrong


def progress_at(step: int) -> Progress:
    return Progress(step=step, images_seen=8 * step, steps_taken=7)


def everything(overrides: list[str], world: World, folder: Path) -> dict[str, Any]:
    """Each strategy saves; each reads what each has saved."""
    found: dict[str, Any] = {}
    made = {name: make(overrides, world, folder / name, *more) for name, more in STRATEGIES.items()}
    for name, parts in made.items():
        fill(parts)
        parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
        path = parts.checkpoints.folder / "step-00000001"
        plan = parts.checkpoints._plan
        assert plan is not None
        found[f"{name} saves"] = {
            "wrong": world.on_main(lambda parts=parts, path=path: wrong_in_files(parts, path)),
            "fault": world.on_main(lambda path=path: find_fault(path)),
            "bytes": world.gather(parts.checkpoints._memory.size),
            "all": sum(entry.tensor.bytes for entry in plan.entries),
        }
    for writer, source in made.items():
        for reader, parts in made.items():
            zero(parts)
            parts.checkpoints.restore(source.checkpoints.folder / "step-00000001", parts.strategy, parts.averages)
            found[f"{reader} reads {writer}"] = world.gather(wrong_here(parts))
    return found


class Slow:
    """Writes wait on ranks that say so, until they are let go."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        original = os.pwrite

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            assert self.opened.wait(100)
            return original(descriptor, data, offset)

        self.original, os.pwrite = original, pwrite

    def end(self) -> None:
        self.opened.set()
        os.pwrite = self.original


def slow_disk(overrides: list[str], world: World, folder: Path) -> dict[str, Any]:
    """Rank 1's disk is slow: both go on, skip the same save, and publish the first one when it is written."""
    parts = make(overrides, world, folder / "slow", "strategy=zero2")
    control, said = Control(world), list[str]()
    parts.checkpoints.say = said.append
    fill(parts)
    checkpoints._PATIENCE_SECONDS = 0.0
    slow = Slow() if world.rank == 1 else None
    steps_to_publish = 0
    for step in range(1, 2000):
        facts = control.exchange(Facts(saving=parts.checkpoints.state))
        parts.checkpoints.advance(facts.saving)
        if step in (1, 4, 6):
            parts.checkpoints.begin(progress_at(step), parts.strategy, parts.averages)
            for tensors in lists_of(parts).values():
                for tensor in tensors:
                    tensor.add_(1.0)
        if step == 10 and slow is not None:
            slow.end()
        if step > 10 and not facts.saving and not any(world.gather(parts.checkpoints.state)):
            steps_to_publish = step
            break
        threading.Event().wait(0.01)
    control.last()
    parts.checkpoints.finish()
    checkpoints._PATIENCE_SECONDS = 10.0
    names = world.on_main(lambda: sorted(os.listdir(parts.checkpoints.folder)))
    wrong = world.on_main(lambda: wrong_in_files(parts, parts.checkpoints.folder / "step-00000001"))
    return {"said": said, "names": names, "wrong": wrong, "steps": steps_to_publish}


def one_rank_fails(overrides: list[str], world: World, folder: Path) -> dict[str, Any]:
    """Rank 1's disk is full: all are told who it was, and the next save is well."""
    parts = make(overrides, world, folder / "fails", "strategy=zero3")
    said = list[str]()
    parts.checkpoints.say = said.append
    fill(parts)
    original = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if world.rank == 1:
        os.pwrite = full
    parts.checkpoints.begin(progress_at(1), parts.strategy, parts.averages)
    parts.checkpoints.finish()
    try:
        parts.checkpoints.save(progress_at(2), parts.strategy, parts.averages)
        error = None
    except UserError as caught:
        error = str(caught)
    os.pwrite = original
    left = world.on_main(lambda: os.listdir(parts.checkpoints.folder))
    parts.checkpoints.save(progress_at(3), parts.strategy, parts.averages)
    wrong = world.on_main(lambda: wrong_in_files(parts, parts.checkpoints.folder / "step-00000003"))
    return {"said": said, "errors": world.gather(error), "left": left, "wrong": wrong}


def another_disk(overrides: list[str], world: World, folder: Path) -> dict[str, Any]:
    """Rank 1 writes to a folder of its own: noticed before anything is published."""
    parts = make(overrides, world, folder / "apart", "strategy=ddp")
    said = list[str]()
    parts.checkpoints.say = said.append
    fill(parts)
    if world.rank == 1:
        parts.checkpoints.folder = folder / "elsewhere"
    parts.checkpoints.begin(progress_at(1), parts.strategy, parts.averages)
    parts.checkpoints.finish()
    return {"said": said, "names": world.on_main(lambda: os.listdir(parts.checkpoints.folder))}


def little_memory(overrides: list[str], world: World, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("ddp", "zero3"):
        parts = make(overrides, world, folder / f"little-{name}", *STRATEGIES[name])
        fill(parts)
        limit = 100_000 if world.rank else 150_000  # the smallest counts
        kept = Checkpoints(parts.checkpoints.run, parts.checkpoints.layout, keep=1, memory_bytes=limit)
        kept.save(progress_at(1), parts.strategy, parts.averages)
        assert kept._plan is not None
        wrong = world.on_main(lambda parts=parts, kept=kept: wrong_in_files(parts, kept.folder / "step-00000001"))
        found[name] = {"wrong": wrong, "rounds": kept._plan.rounds, "bytes": world.gather(kept._memory.size)}
    return found


def shared(overrides: list[str], world: World, folder: Path) -> dict[str, Any]:
    for rank in range(2):
        (folder / f"of-{rank}").mkdir(exist_ok=True)
    world.barrier()

    def outcome(path: Path) -> str | None:
        try:
            require_shared(world, path, seconds=0.3)
        except UserError as error:
            return str(error)
        return None

    seen = world.gather(outcome(folder))
    apart = world.gather(outcome(folder / f"of-{world.rank}"))
    missing = world.gather(outcome(folder if world.is_main else folder / "nowhere"))
    left = world.on_main(lambda: [name for name in os.listdir(folder) if "seen" in name])
    return {"seen": seen, "apart": apart, "missing": missing, "left": left}


CHECKS: list[Callable[[list[str], World, Path], dict[str, Any]]] = [
    everything, slow_disk, one_rank_fails, another_disk, little_memory, shared
]  # fmt: skip


def drive(overrides: list[str], folder: Path) -> int:
    world = distributed.start("cpu", uses_deepspeed=True)
    found = {check.__name__: check(overrides, world, folder) for check in CHECKS}
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    distributed.stop()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text())
    sys.exit(drive(settings["overrides"], Path(settings["folder"])))
