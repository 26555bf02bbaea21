"""The processes of one measurement: torchrun starts them, this watches them, and they time their steps together.

A script that measures over ranks calls `launch` for each variant; torchrun then calls it again with `--worker` and
what it is told as JSON, and rank 0 leaves its result in the file named there. NVLink multicast is off unless
`NCCL_NVLS_ENABLE` says otherwise: some hosts refuse it, and NCCL then fails at its first collective.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.distributed import World

BLOCK = 4  # steps between two looks at the clock
_ENDING_S = 60.0  # torchrun leaves its workers 30 s before it kills them


def launch(
    module: str,
    told: Mapping[str, Any],
    processes: int,
    limit_s: float,
    *,
    nodes: int = 1,
    gpus: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Start a variant's processes and wait: its result with `host_gib`, or `error`, what went wrong.

    Args:
        module: called as `python -m MODULE --worker JSON` in each process.
        told: to each, with `out`, the file in which rank 0 leaves its result.
        processes: in all; with `nodes`, that many torchrun agents start equal shares, each with GPUs of its own.
        gpus: those to take, as `visible_gpus` names them; all by default.
    """
    before = peak = used_gib()
    code: int | None = None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        out = Path(folder) / "result.json"
        worker = ["-m", module, "--worker", json.dumps({**told, "out": str(out)})]
        agents = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *place, *worker],
                cwd=Path(__file__).parent.parent,
                env={"NCCL_NVLS_ENABLE": "0", **os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for place, environment in _places(processes, nodes, gpus)
        ]
        try:
            deadline = time.monotonic() + limit_s
            while time.monotonic() < deadline:
                codes = [agent.poll() for agent in agents]
                peak = max(peak, used_gib())
                if any(codes) or None not in codes:
                    code = next((one for one in codes if one), 0)
                    break
                time.sleep(0.1)
        finally:
            for agent in agents:
                end(agent)
        if code == 0:
            return {**json.loads(out.read_text()), "host_gib": peak - before}
        log.seek(0)
        text = log.read()
    sys.stderr.write(text[-6000:])
    if code is None:
        return {"error": f"took longer than {limit_s:g} s"}
    lines = [line.strip() for line in text.splitlines() if "Error" in line and "ChildFailedError" not in line]
    return {"error": (lines[-1] if lines else f"exit code {code}")[-300:]}


def require_gpus(parser: argparse.ArgumentParser, counts: Sequence[int]) -> None:
    """Refuse `--gpus` of none, or of more than there are; without any they are processes of the CPU's."""
    there = torch.cuda.device_count()
    if min(counts) < 1 or (there and max(counts) > there):
        said = f"there are {there}" if there else "take at least 1"
        parser.error(f"--gpus {','.join(map(str, counts))}: {said}")


def visible_gpus() -> list[str]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` would name them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(map(str, range(torch.cuda.device_count()))) if visible is None else visible.split(",")


def _places(processes: int, nodes: int, gpus: Sequence[str] | None) -> list[tuple[list[str], dict[str, str]]]:
    """(arguments, environment) of each node's torchrun."""
    each, rest = divmod(processes, nodes)
    assert rest == 0
    arguments = ["--nproc_per_node", str(each)]
    if nodes == 1:
        environment = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        return [(["--standalone", *arguments], environment)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments += ["--nnodes", str(nodes), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    gpus = visible_gpus() if gpus is None else gpus
    return [
        (
            [*arguments, "--node_rank", str(node)],
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus[node * each : (node + 1) * each])},
        )
        for node in range(nodes)
    ]


def end(launcher: subprocess.Popen[Any]) -> None:
    """End torchrun and its workers, if it still runs."""
    if launcher.poll() is not None:
        return
    # Workers have sessions of their own: a kill would leave them on the GPUs, beside the next variant.
    launcher.terminate()
    try:
        launcher.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def used_gib() -> float:
    """Memory of this machine in use, page-locked memory too, without what it only caches."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return (total - available) / 2**20


def waiter(device: torch.device) -> Callable[[], None]:
    """A function that waits for all that the device was given."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def timed_blocks(world: World, step: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each block of `BLOCK` steps, for about `seconds` in all; collective. The first is to warm up."""
    wait = waiter(world.device)
    taken: list[float] = []
    blocks = 2
    while len(taken) < blocks:
        wait()
        before = time.perf_counter()
        for _ in range(BLOCK):
            step()
        wait()
        taken.append(time.perf_counter() - before)
        if len(taken) == 1:  # all ranks do as many
            blocks = world.broadcast(max(2, 1 + round(seconds / taken[0])))
    return taken[1:]


def peak_gib(world: World) -> tuple[float, float]:
    """The most that tensors, and torch's allocator, took on any rank's GPU since the last reset; collective."""
    on_gpu = world.device.type == "cuda"
    mine = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if on_gpu else (0, 0)
    allocated, reserved = zip(*world.gather(mine), strict=True)
    return max(allocated) / 2**30, max(reserved) / 2**30
