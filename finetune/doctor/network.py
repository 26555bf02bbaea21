"""Bandwidth and latency between ranks, and which machine is slow."""

from __future__ import annotations

import time
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from finetune.doctor.context import Context, skipped
from finetune.doctor.table import OK, WARN, Row

_LARGE_BYTES = 64 << 20
_FIRST_BYTES = 1 << 20
_FIRST_MAY_TAKE_S = 0.5  # the large one takes 64 times that
_REPEATS = 3
_SMALL_REPEATS = 20
_PAIR_BYTES = 16 << 20
_MOST_ROUNDS = 15  # of pairs of machines: a full tournament up to 16 of them
_SLOW_HOST = 0.5  # of the median machine's speed

# (backend, one machine?) -> GB/s of bus bandwidth that are absurdly low, and what is usual.
_USUAL = {
    ("nccl", True): (4.0, "usual: 10 to 25 over PCIe, 150 to 450 over NVLink"),
    ("nccl", False): (1.0, "usual: 1 over 10 Gb Ethernet, 10 to 50 and more a GPU over InfiniBand or RoCE"),
    ("gloo", True): (0.1, "usual: 0.5 to 5"),
    ("gloo", False): (0.05, "usual: 0.1 over 1 Gb, 1 over 10 Gb Ethernet"),
}
_SLOW_LATENCY_S = {"nccl": 2e-3, "gloo": 0.1}


def network_rows(context: Context) -> list[Row]:
    """All-reduce of 64 MiB and of a few bytes, on the device's backend and on gloo; pairs of machines."""
    world = context.joined()
    if world.size == 1:
        return skipped(["bandwidth"], "one process")
    hosts = list(dict.fromkeys(context.board.hosts))
    rows: list[Row] = []
    for device in dict.fromkeys((world.device, torch.device("cpu"))):
        backend = "nccl" if device.type == "cuda" else "gloo"
        name = "bandwidth" if device == world.device else "gloo"
        first = context.exchange(
            "network", f"{backend} all-reduce", partial(_seconds, device, _FIRST_BYTES, 1), collective=True
        )
        remedy = _remedy(backend, len(hosts) == 1)
        if failed := context.failures(name, first, remedy):
            return [*rows, *failed]
        small = context.exchange(
            "network", f"{backend} latency", partial(_seconds, device, 8, _SMALL_REPEATS), collective=True
        )
        count, slowest = _FIRST_BYTES, max(each.value for each in first)
        if device == world.device and slowest < _FIRST_MAY_TAKE_S:
            large = context.exchange(
                "network",
                f"{backend} all-reduce",
                partial(_seconds, device, _LARGE_BYTES, _REPEATS),
                collective=True,
            )
            count, slowest = _LARGE_BYTES, max(each.value for each in large)
        # Each rank sends and receives 2 (n - 1) / n of the bytes, whatever the algorithm at least.
        speed = 2 * (world.size - 1) / world.size * count / slowest / 1e9
        latency = max(each.value for each in small)
        low, usual = _USUAL[backend, len(hosts) == 1]
        text = (
            f"{backend} all-reduce of {count >> 20} MiB: {speed:.2f} GB/s bus bandwidth; "
            f"latency {latency * 1e6:.0f} us"
        )
        if device == world.device and speed < low:
            rows.append(Row(name, WARN, f"{text} ({usual})", remedy))
        elif latency > _SLOW_LATENCY_S[backend]:
            rows.append(Row(name, WARN, f"{text} (usual latency: 10 to 1,000 us)", remedy))
        else:
            rows.append(Row(name, OK, text))
    if len(hosts) > 1:
        rows.append(_pairs_row(context, hosts))
    return rows


def _remedy(backend: str, one_host: bool) -> str:
    if backend == "nccl" and one_host:
        return "look at nvidia-smi topo -m, at other jobs on these GPUs, and at NCCL_P2P_DISABLE, NCCL_DEBUG=INFO"
    if backend == "nccl":
        return (
            "see with NCCL_DEBUG=INFO that NCCL uses InfiniBand or the fast network; NCCL_SOCKET_IFNAME and "
            "NCCL_IB_HCA choose it"
        )
    return "choose the fast network with GLOO_SOCKET_IFNAME; busy cores slow it as well (OMP_NUM_THREADS)"


def _seconds(device: torch.device, count: int, repeats: int) -> float:
    """Seconds of one all-reduce of `count` bytes, after one to warm up."""
    tensor = torch.ones(max(1, count // 4), device=device)
    dist.all_reduce(tensor)
    _wait(tensor)
    started = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    _wait(tensor)
    return (time.perf_counter() - started) / repeats


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def rounds_of(count: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each of `count` meets another, so that all pairs meet once (the circle method)."""
    seats = list(range(count + count % 2))  # the last may be nobody
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[i], seats[-1 - i]) for i in range(len(seats) // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def _pairs_row(context: Context, hosts: list[str]) -> Row:
    """Machines send each other 16 MiB, in pairs: one that is slow with all is the slow one."""
    world = context.joined()
    leaders = [context.board.hosts.index(host) for host in hosts]
    speeds: dict[tuple[int, int], float] = {}
    for pairs in rounds_of(len(hosts))[:_MOST_ROUNDS]:
        mine = next((pair for pair in pairs if world.rank in (leaders[pair[0]], leaders[pair[1]])), None)

        def meet(pair: tuple[int, int] | None = mine) -> float | None:
            if pair is None:
                return None
            a, b = (leaders[each] for each in pair)
            seconds = _ping(b if world.rank == a else a, world.rank == a, world.device)
            return 2 * _PAIR_BYTES / seconds / 1e9

        outcomes = context.exchange("network", "pairs of machines", meet, collective=True)
        if rows := context.failures("machines", outcomes, _remedy("nccl", False)):
            return rows[0]
        speeds |= {pair: outcomes[leaders[pair[0]]].value for pair in pairs}
    by_host = [max(speed for pair, speed in speeds.items() if host in pair) for host in range(len(hosts))]
    text = f"pairs of {len(hosts)} machines: {min(speeds.values()):.2f} to {max(speeds.values()):.2f} GB/s"
    middle = sorted(by_host)[len(by_host) // 2]
    slow = [
        f"{hosts[number]} ({speed:.2f} GB/s)" for number, speed in enumerate(by_host) if speed < _SLOW_HOST * middle
    ]
    if slow:
        remedy = "leave that machine out (Slurm: --exclude) and have its network card and cable looked at"
        return Row("machines", WARN, f"{text}; slow with all others: {', '.join(slow[:8])}", remedy)
    return Row("machines", OK, text)


def _ping(peer: int, first: bool, device: torch.device) -> float:
    """Seconds of 16 MiB there and back, after once to warm up."""
    tensor = torch.ones(_PAIR_BYTES // 4, device=device)
    for _ in range(2):
        started = time.perf_counter()
        for send in (first, not first):
            dist.send(tensor, peer) if send else dist.recv(tensor, peer)
        _wait(tensor)
        seconds = time.perf_counter() - started
    return seconds
