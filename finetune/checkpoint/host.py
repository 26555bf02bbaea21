"""Host memory for snapshots: taken once, used again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 28  # torch rounds page-locked memory up to a power of two: only the last chunk is a rounded one
_GROUPS = Path("/sys/fs/cgroup")


class HostMemory:
    """`size` bytes in chunks, page-locked where `pinned` and the system allows.

    A tensor may lie across chunks; its place is counted in bytes from the first chunk's start.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.size = size
        self._views: dict[int, Tensor] = {}
        self.chunks: list[Tensor] = []
        for at in range(0, size, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, size - at)
            try:
                chunk = torch.empty(length, dtype=torch.uint8, pin_memory=pinned)
            except RuntimeError:
                if not pinned:
                    raise
                chunk, pinned = torch.empty(length, dtype=torch.uint8), False
            self.chunks.append(chunk)
        self.pinned = pinned

    def _parts(self, start: int, length: int) -> Iterator[tuple[int, Tensor]]:
        at = start
        while at < start + length:
            number, inside = divmod(at, _CHUNK_BYTES)
            part = self.chunks[number][inside : inside + start + length - at]
            yield at - start, part
            at += part.numel()

    def put(self, start: int, tensor: Tensor) -> None:
        """Copy values to byte `start`; from a GPU without waiting, on its current stream."""
        view = self._views.get(start)
        if view is None or view.shape != tensor.shape or view.dtype != tensor.dtype:
            parts = [part for _, part in self._parts(start, tensor.nbytes)]
            if len(parts) != 1:
                flat = tensor.contiguous().view(-1).view(torch.uint8)
                for at, part in self._parts(start, flat.numel()):
                    part.copy_(flat[at : at + part.numel()], non_blocking=True)
                return
            view = self._views[start] = parts[0].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor, non_blocking=True)  # of thousands of tensors: one call each

    def views(self, start: int, length: int) -> Iterator[memoryview]:
        """The bytes of a range, without a copy."""
        for _, part in self._parts(start, length):
            yield part.numpy().data


def free_host_memory() -> int:
    """Bytes that a process may still take, of the machine and of its control group (a container, a Slurm job)."""
    free = int(1e18)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, used, stat, cache in _group_files():
        try:
            # Pages of files count as used, but are given back when memory is short.
            fields = dict(line.split() for line in stat.read_text().splitlines())
            taken = int(used.read_text()) - int(fields.get(cache, 0))
            free = min(free, max(int(limit.read_text()) - taken, 0))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return free


def _group_files() -> Iterator[tuple[Path, Path, Path, str]]:
    """(limit, use, statistics, field of inactive file pages) of this process's control groups up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        folder = root / name.lstrip("/")
        for at in (folder, *folder.parents):
            if not at.is_relative_to(root):
                break
            if controllers:  # version 1
                files = (at / "memory.limit_in_bytes", at / "memory.usage_in_bytes", at / "memory.stat")
                yield *files, "total_inactive_file"
            else:
                yield at / "memory.max", at / "memory.current", at / "memory.stat", "inactive_file"
