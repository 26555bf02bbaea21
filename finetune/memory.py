"""Memory of this machine, as far as this process's control groups (a container, a Slurm job) let it have it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune import first_line

_SHORTAGES = ("DefaultCPUAllocator: ", "Storage size calculation overflowed", "integer multiplication overflow")
_GROUPS, _PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Group:
    """Files of a control group; `cache` is the field of `stat` that counts pages of files nobody uses."""

    limit: Path
    used: Path
    stat: Path
    cache: str


def size_text(count: float) -> str:
    """Bytes as "1.5 GiB" or "12 MiB"."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.{1 if count < 100 * unit else 0}f} {name}"
    return f"{count / 1024:.0f} KiB"


@contextlib.contextmanager
def shortage_told() -> Iterator[None]:
    """Inside, what torch and Python have other words for when memory is short is `torch.OutOfMemoryError` as well.

    The CPU's allocator, and sizes whose product no integer holds, raise a plain `RuntimeError`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        text = str(error)
        if not isinstance(error, MemoryError) and not any(words in text for words in _SHORTAGES):
            raise
        asked = re.search(r"allocate (\d+) bytes", text)
        line = f"{int(asked[1]) / 2**30:.1f} GiB asked for" if asked else first_line(error)
        raise torch.OutOfMemoryError(line) from error


def free_bytes() -> int:
    """What a process may still take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group in _groups():
        try:
            # Pages of files count as used, but are given back when memory is short.
            fields = dict(line.split() for line in group.stat.read_text().splitlines())
            taken = int(group.used.read_text()) - int(fields.get(group.cache, 0))
            free = min(free, max(int(group.limit.read_text()) - taken, 0))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return free


def limit_bytes() -> int:
    """What all processes here may use together."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group in _groups():
        try:
            limit = min(limit, int(group.limit.read_text()))
        except (OSError, ValueError):
            continue
    return limit


def _groups() -> Iterator[_Group]:
    """This process's control groups of memory, up to the root."""
    try:
        lines = _PROCESS.read_text().splitlines()
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
                files = at / "memory.limit_in_bytes", at / "memory.usage_in_bytes", at / "memory.stat"
                yield _Group(*files, "total_inactive_file")
            else:
                yield _Group(at / "memory.max", at / "memory.current", at / "memory.stat", "inactive_file")
