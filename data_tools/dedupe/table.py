"""The rows of all pictures brought together, and who is kept for whom."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.dedupe.fingerprints import CELLS, Part
from data_tools.dedupe.leaders import distances, find_leaders
from finetune.data.shards.files import naming

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Table:
    """All pictures, in two orders: place, as they stand in the sets, and rank, the preferred first.

    `place_of` is the place of each rank. Hashes and digests are by rank, cells and keys by place; all but the
    first are on disk.
    """

    place_of: np.ndarray  # int64 [N]
    hashes: np.ndarray  # uint64 [N, 4]
    digests: np.ndarray  # uint64 [N, 2]
    cells: np.ndarray  # uint8 [N, 64, 3]
    key_ends: np.ndarray  # int64 [N + 1]: where keys end in `key_bytes`
    key_bytes: np.ndarray  # uint8
    starts: np.ndarray  # int64 [parts + 1]: the first place of each part

    def __len__(self) -> int:
        return len(self.place_of)

    def key(self, place: int) -> str:
        """The key of the picture at a place."""
        low, high = self.key_ends[place : place + 2].tolist()
        return bytes(self.key_bytes[low:high]).decode("ascii")

    def part_of(self, place: int) -> int:
        """The part that a place is in."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    @classmethod
    def gather(cls, parts: list[Part], work: Path) -> Table:
        """Bring the parts together in files under `work`."""
        starts = np.cumsum([0, *(part.count for part in parts)], dtype=np.int64)
        count = int(starts[-1])
        pixels = np.empty(count, np.int64)
        for part, start in zip(parts, starts[:-1], strict=True):
            pixels[start : start + part.count] = part.rows()["pixels"]
        place_of = np.argsort(-pixels, kind="stable")
        del pixels
        rank_of = np.empty(count, np.int64)
        rank_of[place_of] = np.arange(count)

        hashes, digests = _on_disk(work / "hashes", "<u8", count, 4), _on_disk(work / "digests", "<u8", count, 2)
        cells = _on_disk(work / "cells", "u1", count, CELLS * CELLS, 3)
        key_ends = _on_disk(work / "key_ends", "<i8", count + 1)
        with naming(work / "keys"), (work / "keys").open("wb") as file:
            file.write(b"\0")  # a map must not be empty
            key_ends[0] = 1
            for part, start in zip(parts, starts[:-1].tolist(), strict=True):
                rows, keys = part.rows(), part.keys()
                ranks = rank_of[start : start + part.count]
                hashes[ranks], digests[ranks] = rows["hash"], rows["digest"]
                cells[start : start + part.count] = rows["cells"]
                key_ends[start + 1 : start + part.count + 1] = key_ends[start] + np.cumsum(
                    [len(key) for key in keys], dtype=np.int64
                )
                file.write("".join(keys).encode("ascii"))
        key_bytes = np.memmap(work / "keys", np.uint8, "r")
        return cls(place_of, hashes, digests, cells, key_ends, key_bytes, starts)


def _on_disk(path: Path, dtype: str, *shape: int) -> np.ndarray:
    """An array in a new file, which has all its room: on a full disk writing to a map would kill the process."""
    with naming(path), path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, "r+", shape=shape)


@dataclass(frozen=True)
class Found:
    """For each place, the place of the picture that is kept for it (itself if it is kept), and how they differ."""

    kept: np.ndarray  # int64 [N]
    distance: np.ndarray  # uint8 [N]: bits; 0 of those that are kept
    exact: np.ndarray  # bool [N]: the same pixels as the kept one's; False of those that are kept


def find_duplicates(table: Table, distance: int | None, colour: int) -> Found:
    """Who is kept for whom; with `distance` None by equal pixels alone."""
    count = len(table)
    first = _first_equal(table.digests)
    if distance is None:
        leader = first
    else:

        def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            """No cell's mean over the channels differs by more than `colour`."""
            good = np.empty(len(a), bool)
            for low in range(0, len(a), _CHUNK):
                a_n643 = table.cells[table.place_of[a[low : low + _CHUNK]]].astype(np.int16)
                b_n643 = table.cells[table.place_of[b[low : low + _CHUNK]]].astype(np.int16)
                worst_n = np.abs(a_n643 - b_n643).sum(axis=2).max(axis=1)
                good[low : low + _CHUNK] = worst_n <= 3 * colour
            return good

        # Equal pictures have equal hashes and colours: whoever stands for the first stands for all.
        leader = find_leaders(table.hashes, distance, alike, among=first == np.arange(count))[first]
    found = Found(np.empty(count, np.int64), np.empty(count, np.uint8), np.empty(count, bool))
    for low in range(0, count, _CHUNK):
        rank = np.arange(low, min(low + _CHUNK, count))
        lead, place = leader[rank], table.place_of[rank]
        found.kept[place] = table.place_of[lead]
        found.distance[place] = distances(table.hashes[rank], table.hashes[lead])
        found.exact[place] = (table.digests[rank] == table.digests[lead]).all(axis=1) & (rank != lead)
    return found


def _first_equal(digests_N2: np.ndarray) -> np.ndarray:
    """For each row the first one that equals it, int64 [N]."""
    order = np.lexsort((digests_N2[:, 1], digests_N2[:, 0]))  # stable: equal rows stay in their order
    new = np.ones(len(order), bool)
    for low in range(0, len(order), _CHUNK):
        rows = digests_N2[order[max(low - 1, 0) : low + _CHUNK]]
        new[max(low, 1) : low + _CHUNK] = (rows[1:] != rows[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return first
