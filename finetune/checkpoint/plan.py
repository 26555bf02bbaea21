"""Where in a checkpoint's files each tensor lies, who writes it, and in how many rounds. Pure functions.

Every rank computes the same plan, so each can write its tensors to their places without asking the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

PAGE_BYTES = 4096
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


@dataclass(frozen=True)
class Member:
    """One tensor: of parameter number `index` in list number `kind` (weights, say), by `key` in `file`.

    Its bytes are whole words of 4: sums over files are of words.
    """

    kind: int
    index: int
    file: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """A tensor, the `offset` of its first byte in the file, the rank that writes it, and in which round."""

    tensor: Member
    offset: int
    owner: int
    round: int


@dataclass(frozen=True)
class Plan:
    """`entries` in order of files; the files' `headers` and whole `sizes` in bytes; the number of `rounds`."""

    entries: list[Entry]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    rounds: int

    def of(self, rank: int, round: int) -> list[Entry]:
        """What a rank writes in a round."""
        return [entry for entry in self.entries if entry.owner == rank and entry.round == round]

    def bytes_of(self, rank: int) -> int:
        """Host memory that a rank needs: what it owns in its largest round."""
        return max((sum(e.tensor.bytes for e in self.of(rank, r)) for r in range(self.rounds)), default=0)


def make_plan(
    tensors: Sequence[Member],
    metadata: Mapping[str, Mapping[str, str]],
    holders: Sequence[int | None],
    world_size: int,
    limit_bytes: int | None = None,
) -> Plan:
    """Lay tensors out in safetensors files and share the writing out.

    Args:
        tensors: in any order of files; inside a file their order is kept as far as the layout allows.
        metadata: of each file's header.
        holders: for each tensor the rank that owns it because it holds most of it already, or None for any.
        limit_bytes: of host memory a rank; what doesn't fit in is written in further rounds. A larger tensor has a
            round of its own.
    """
    files: dict[str, list[tuple[Member, int | None]]] = {}
    for tensor, holder in zip(tensors, holders, strict=True):
        files.setdefault(tensor.file, []).append((tensor, holder))
    placed: list[tuple[Member, int]] = []
    wanted: list[int | None] = []
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for file, held in files.items():
        # Whole pages first, so that few pages are written by two ranks: network file systems lock or merge those.
        held.sort(key=lambda pair: pair[0].bytes % PAGE_BYTES != 0)
        headers[file] = header([tensor for tensor, _ in held], metadata.get(file, {}))
        at = len(headers[file])
        for tensor, holder in held:
            placed.append((tensor, at))
            wanted.append(holder)
            at += tensor.bytes
        sizes[file] = at
    owners = share([tensor.bytes for tensor, _ in placed], wanted, world_size)
    rounds = _rounds([tensor.bytes for tensor, _ in placed], owners, limit_bytes)
    entries = [Entry(t, at, o, r) for (t, at), o, r in zip(placed, owners, rounds, strict=True)]
    return Plan(entries, headers, sizes, max(rounds, default=0) + 1)


def header(tensors: Sequence[Member], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file up to its data: length (8 bytes, little-endian), JSON, and spaces up to a whole page."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for tensor in tensors:
        described[tensor.key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.bytes],
        }
        at += tensor.bytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def share(sizes: Sequence[int], holders: Sequence[int | None], world_size: int) -> list[int]:
    """An owner for each item: its holder, else ranks take consecutive runs of about equal size."""
    total = sum(size for size, holder in zip(sizes, holders, strict=True) if holder is None)
    owners: list[int] = []
    at = 0
    for size, holder in zip(sizes, holders, strict=True):
        if holder is not None:
            owners.append(holder)
            continue
        middle = at + size / 2
        owners.append(min(int(world_size * middle / total), world_size - 1) if total else 0)
        at += size
    return owners


def _rounds(sizes: Sequence[int], owners: Sequence[int], limit_bytes: int | None) -> list[int]:
    """A round for each item, so that no owner has more than the limit in one round."""
    now: dict[int, tuple[int, int]] = {}  # owner -> (round, bytes in it)
    rounds: list[int] = []
    for size, owner in zip(sizes, owners, strict=True):
        current, used = now.get(owner, (0, 0))
        if limit_bytes is not None and used and used + size > limit_bytes:
            current, used = current + 1, 0
        now[owner] = (current, used + size)
        rounds.append(current)
    return rounds
