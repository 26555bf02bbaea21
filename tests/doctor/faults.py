"""Seeds faults and runs the doctor on each, many times within one set of launched processes.

    python faults.py OUT CASE ... -- OVERRIDES

Each case writes OUT/CASE.json on rank 0, its rows, and OUT/CASE.RANK.code. The process group stays for the
next case. A fault is a context manager that patches one thing in the program, on the ranks that it is about.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed import comm as gathering

from finetune import UserError, build, distributed, loop
from finetune.data.loader import Data, Loader
from finetune.distributed import DataParallel
from finetune.doctor import board, command, context, examine, files, network, pieces, weights

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
Fault = Callable[[list[str]], "contextlib.AbstractContextManager[Any]"]


@contextlib.contextmanager
def healthy(overrides: list[str]) -> Iterator[None]:
    yield


def strategy(name: str, then: Fault = healthy) -> Fault:
    """Another strategy, and a fault under it."""

    @contextlib.contextmanager
    def seeded(overrides: list[str]) -> Iterator[None]:
        overrides += [f"strategy={name}"]
        with then(overrides):
            yield

    return seeded


def lora(then: Fault = healthy) -> Fault:
    """Adapters on a pretrained model, whose other weights are frozen."""

    @contextlib.contextmanager
    def seeded(overrides: list[str]) -> Iterator[None]:
        overrides += [
            "adapter=lora",
            "adapter.rank=2",
            f"model.pretrained={os.environ['PIPELINE']}",
            "model.unet={}",
        ]
        with then(overrides):
            yield

    return seeded


def wide(then: Fault = healthy) -> Fault:
    """A model with weights so large that ZeRO-3 takes them apart."""

    @contextlib.contextmanager
    def seeded(overrides: list[str]) -> Iterator[None]:
        overrides += ["model.unet.block_out_channels=[16,128]"]
        with then(overrides):
            yield

    return seeded


def environment(**variables: str) -> Fault:
    def seeded(overrides: list[str]) -> contextlib.AbstractContextManager[Any]:
        return mock.patch.dict(os.environ, variables)

    return seeded


def patched(owner: Any, name: str, make: Callable[[Any], Any], ranks: tuple[int, ...] = (0, 1)) -> Fault:
    """`owner.name` replaced by what `make` makes of it."""

    def seeded(overrides: list[str]) -> contextlib.AbstractContextManager[Any]:
        if RANK not in ranks:
            return contextlib.nullcontext()
        return mock.patch.object(owner, name, make(getattr(owner, name)))

    return seeded


def after_build(change: Callable[[Any], None], ranks: tuple[int, ...] = (1,)) -> Fault:
    """A built run that is changed on some ranks."""

    def make(real: Any) -> Any:
        def built(*args: Any) -> Any:
            parts = real(*args)
            with torch.no_grad():
                change(parts)
            return parts

        return built

    return patched(build, "build", make, ranks)


def one_weight(parts: Any) -> None:
    next(p for p in parts.strategy.module.parameters() if p.ndim == 4).data[0, 0, 0, 0] += 1e-3


def one_master(parts: Any) -> None:
    next(shard for shard in parts.strategy.shards if shard.master.numel()).master[0] += 0.25


def one_piece(parts: Any) -> None:
    mine = next(shard.name for shard in parts.strategy.shards if shard.master.numel())
    weights.parameters_of(parts.strategy)[mine].ds_tensor.data[0] += 0.25


def gathers_other_bits(real: Any) -> Any:
    """As a bad link or driver does: what this rank's steps use is not what the ranks hold.

    Small weights, which ZeRO-3 keeps whole, come as they are.
    """

    def gather(output: torch.Tensor, *args: Any, **settings: Any) -> Any:
        handle = real(output, *args, **settings)
        if output.numel() > 100_000:
            if handle is not None:
                handle.wait()
            output[0] += 1e-3
        return handle

    return gather


def frozen(parts: Any) -> None:
    """Under LoRA: the base weights differ, which no gradient shows."""
    next(p for p in parts.strategy.module.parameters() if not p.requires_grad).data[0] += 0.25


def drifting(real: Any) -> Any:
    def step(self: Any, lr: float) -> Any:
        stats = real(self, lr)
        self.shards[0].master[0] += 1e-3
        return stats

    return step


def rank_0_reads_for_all(real: Any) -> Any:
    def loader(self: Any, **settings: Any) -> Any:
        return real(self, **(settings | {"rank": 0}))

    return loader


def rank_0_rows_under_own_clock(real: Any) -> Any:
    """The draws differ, the pictures don't: nothing shows it but the sample ids."""

    def read(self: Any, step: int, offset: int) -> Any:
        first, self.first = self.first, 0
        try:
            batch = real(self, step, offset)
        finally:
            self.first = first
        return replace(batch, clock=batch.clock + first)

    return read


def once_per_process(real: Any) -> Any:
    def rate(images_seen: int, **settings: Any) -> float:
        return real(images_seen * SIZE, **settings)

    return rate


def prepared_scheduler(real: Any) -> Any:
    """As Accelerate's prepared scheduler does: a LambdaLR stepped once for each process after the optimizer."""

    def step(self: Any, lr: float) -> Any:
        stats = real(self, lr)
        for group in self.optimizer.param_groups:
            group["lr"] *= SIZE
        return stats

    return step


def data_parallel_instead(real: Any) -> Any:
    """A plugin that the launch ignored: what runs is not DeepSpeed."""

    def make(config: Any, *args: Any, **settings: Any) -> Any:
        changed = replace(config, strategy=replace(config.strategy, kind="ddp"))
        return real(changed, *args, **settings)

    return make


@contextlib.contextmanager
def other_folder(overrides: list[str]) -> Iterator[None]:
    """A relative run.dir, and ranks that stand in different folders."""
    here = Path.cwd()
    own = OUT / f"standing-{RANK}"
    own.mkdir(exist_ok=True)
    os.chdir(own)
    overrides += ["run.dir=runs/mine"]
    try:
        yield
    finally:
        os.chdir(here)
        left = sorted(str(path) for path in own.rglob("*"))
        assert left == [], left


@contextlib.contextmanager
def own_mount(overrides: list[str]) -> Iterator[None]:
    """The same path on every rank, and another disk behind it on rank 1 (in a mount namespace of its own)."""
    folder = OUT / "mounted"
    folder.mkdir(exist_ok=True)
    overrides += [f"run.dir={folder}"]
    if RANK != 1:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)

    def call(code: int) -> None:
        if code != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    here = os.getcwd()
    call(libc.unshare(0x00020000))
    call(libc.mount(b"none", b"/", None, ctypes.c_ulong(0x4000 | 0x40000), None))
    call(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), None))
    try:
        yield
    finally:
        call(libc.unshare(0x200))  # threads made since share this one's root and folder, and may not stay behind
        call(libc.setns(before, 0x00020000))
        os.chdir(here)


def no_lock(real: Any) -> Any:
    return lambda *_: None


def forgets_moments(real: Any) -> Any:
    def resume(*args: Any, **settings: Any) -> Any:
        progress = real(*args, **settings)
        for tensor in args[2].strategy.moments("exp_avg"):
            tensor.zero_()
        return progress

    return resume


def out_of_memory(real: Any) -> Any:
    def step(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return step


def unreadable(real: Any) -> Any:
    def open_data(*_: Any, **__: Any) -> Any:
        raise UserError("/data/latents holds no manifest.json")

    return open_data


def defect(real: Any) -> Any:
    def rows(context: Any) -> Any:
        raise KeyError("a defect of the doctor's own")

    return rows


@contextlib.contextmanager
def another_seed(overrides: list[str]) -> Iterator[None]:
    overrides += [f"seed={RANK}"]
    yield


def state() -> Any:
    from accelerate import PartialState

    return PartialState


def full_disk(real: Any) -> Any:
    return lambda path: real(path)._replace(free=1 << 20)


def sleeps(real: Any) -> Any:
    def read(self: Any, step: int, offset: int) -> Any:
        if step > 0:
            time.sleep(1e6)
        return real(self, step, offset)

    return read


def dies(real: Any) -> Any:
    def step(self: Any, lr: float) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    return step


def fails(real: Any) -> Any:
    def step(self: Any, lr: float) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    return step


def two_machines(real: Any) -> Any:
    return lambda: f"node{RANK}"


def slow_clock(real: Any) -> Any:
    class Clock:
        def __getattr__(self, name: str) -> Any:
            return (lambda: real.time() - 60 * RANK) if name == "time" else getattr(real, name)

    return Clock()


def both(*faults: Fault) -> Fault:
    @contextlib.contextmanager
    def seeded(overrides: list[str]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for fault in faults:
                stack.enter_context(fault(overrides))
            yield

    return seeded


PLUGIN = {"ACCELERATE_USE_DEEPSPEED": "true"}
CASES: dict[str, Fault] = {
    "healthy": healthy,
    "healthy-zero2": strategy("zero2"),
    "healthy-zero3": strategy("zero3"),
    "healthy-lora": strategy("zero1", lora()),
    "plugin": environment(**PLUGIN),
    "plugin-stage": strategy("zero2", environment(**PLUGIN, ACCELERATE_DEEPSPEED_ZERO_STAGE="3")),
    "plugin-inside": strategy("zero2", patched(build, "make_strategy", data_parallel_instead)),
    "accelerate-counts-one": lambda _: mock.patch.dict(
        state()._shared_state, {"num_processes": 1, "process_index": 0}
    ),
    "equal-data": patched(Data, "loader", rank_0_reads_for_all),
    "equal-rows": patched(Loader, "_read", rank_0_rows_under_own_clock),
    "weights": after_build(one_weight),
    "weights-zero2": strategy("zero2", after_build(one_weight)),
    "master-zero2": strategy("zero2", after_build(one_master)),
    "piece-zero3": strategy("zero3", after_build(one_piece)),
    "gather-zero3": strategy("zero3", wide(patched(gathering, "all_gather_into_tensor", gathers_other_bits, (1,)))),
    "healthy-gather": strategy("zero3", wide()),
    "frozen": lora(after_build(frozen)),
    "drift": patched(DataParallel, "step", drifting, ranks=(1,)),
    "lr": patched(loop, "learning_rate", once_per_process),
    "lr-scheduler": patched(DataParallel, "step", prepared_scheduler),
    "folder": other_folder,
    "mount": own_mount,
    "locks": patched(files.fcntl, "flock", no_lock, ranks=(1,)),
    "moments": patched(loop, "resume", forgets_moments),
    "memory": patched(loop, "optimizer_step", out_of_memory),
    "data": patched(build, "open_data", unreadable, ranks=(1,)),
    "config": another_seed,
    "space": patched(shutil, "disk_usage", full_disk),
    "machines": both(patched(examine.hosts, "host_name", two_machines), patched(examine.hosts, "time", slow_clock)),
    "sleeps": patched(Loader, "_read", sleeps, ranks=(1,)),
    "dies": patched(DataParallel, "step", dies, ranks=(1,)),
    "defect": patched(examine.saving, "run_rows", defect, ranks=(1,)),
    "fails": patched(DataParallel, "step", fails, ranks=(1,)),
}


def quick() -> None:
    """Bounds and sizes for tiny runs on busy cores."""
    network._LARGE_BYTES = 2 << 20
    files._WRITE_BYTES, files._SLOW_MB_S, files._SEEN_WITHIN_S = 1 << 20, 0.0, 0.5
    pieces._READ_SECONDS, pieces._MARGIN = 0.05, 0.0
    board.GRACE_S, board.TICK_S = 6.0, 0.5
    context.LIMITS_S["steps"] = 30.0
    network._USUAL.update({key: (0.0, usual) for key, (_, usual) in network._USUAL.items()})
    network._SLOW_LATENCY_S.update(nccl=10.0, gloo=10.0)


def main(out: Path, cases: list[str], overrides: list[str]) -> None:
    quick()
    real_show, real_stop = examine.show, distributed.stop
    examine.distributed = mock.Mock(wraps=distributed, stop=lambda: None)  # the group stays for the next case
    for case in cases:
        rows: list[dict[str, str]] = []

        def show(shown: list[Any], seconds: float, case: str = case, rows: list[dict[str, str]] = rows) -> None:
            rows[:] = [asdict(row) for row in shown]
            (out / f"{case}.json").write_text(json.dumps({"seconds": seconds, "rows": rows}))
            print(f"=== {case}")
            real_show(shown, seconds)

        examine.show = show
        if case == "sleeps":
            context.LIMITS_S["steps"] = 6.0
        mine = [*overrides, f"run.dir={out / 'run' / case}"]
        with CASES[case](mine):
            code = command.main(mine)
        (out / f"{case}.{RANK}.code").write_text(str(code))
    real_stop()


if __name__ == "__main__":
    OUT = Path(sys.argv[1])
    split = sys.argv.index("--")
    main(OUT, sys.argv[2:split], sys.argv[split + 1 :])
