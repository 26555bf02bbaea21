"""What is known of each picture: its row, kept in SHARDS/.dedupe, a file a shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools.dedupe.leaders import HASH_BITS
from data_tools.output import FINGERPRINTS
from data_tools.pictures import Picture, PictureSource, Unreadable
from data_tools.workers import CrashError, Workers
from finetune import UserError
from finetune.data.shards import write_atomic
from finetune.data.shards.images import PictureError, decode_rgb

_VERSION = 1
CELLS = 8
ROW = np.dtype([("digest", "<u8", 2), ("hash", "<u8", 4), ("pixels", "<u8"), ("cells", "u1", (CELLS * CELLS, 3))])


@dataclass(frozen=True)
class Part:
    """What is known of the pictures of one shard: a file in SHARDS/.dedupe.

    A line of JSON, rows of `ROW`, and the pictures' keys, one a line.
    """

    source: PictureSource
    unit: int
    path: Path
    start: int  # of its rows, in bytes
    count: int
    unreadable: int

    def rows(self) -> np.ndarray:
        """[count] of `ROW`."""
        return np.memmap(self.path, ROW, "r", self.start, (self.count,)) if self.count else np.zeros(0, ROW)

    def keys(self) -> list[str]:
        """One for each row."""
        with self.path.open("rb") as file:
            file.seek(self.start + self.count * ROW.itemsize)
            return file.read().decode("ascii").splitlines()

    @classmethod
    def load(cls, source: PictureSource, unit: int, name: str) -> Part | None:
        """What is known of the shard as it is now; None if there is nothing, or something else, or half of it."""
        path = _part_path(source, name)
        state = _state(source, unit, name)
        try:
            with path.open("rb") as file:
                line = file.readline(10_000)
            head = json.loads(line)
            count, unreadable = int(head["count"]), int(head["unreadable"])
            start = len(line)
            whole = head["state"] == state and path.stat().st_size == start + head["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls(source, unit, path, start, count, unreadable) if whole else None


def _save(path: Path, state: dict[str, Any], rows: list[bytes], keys: list[str], unreadable: int) -> None:
    """Write a part's file: whole, or not at all."""
    body = b"".join(rows) + "".join(key + "\n" for key in keys).encode("ascii")
    head = {"state": state, "count": len(keys), "unreadable": unreadable, "bytes": len(body)}
    write_atomic(path, json.dumps(head, sort_keys=True).encode() + b"\n" + body)


def _part_path(source: PictureSource, name: str) -> Path:
    return source.root / FINGERPRINTS / f"{name}.known"


def _state(source: PictureSource, unit: int, name: str) -> dict[str, Any]:
    """What a shard's file must have been made from, to be used."""
    if source.shards is not None:
        what: Any = source.shards.manifest.shards[unit].sha256
    else:
        stat = (source.root / name).stat()
        what = [stat.st_size, stat.st_mtime_ns]
    return {"version": _VERSION, "shard": what}


Item = tuple[int, int, Picture | Unreadable | None]
"""Source, unit, and a sample of it; None ends the unit."""


def look(sources: list[PictureSource], workers: int) -> list[Part]:
    """Decode what is not known yet, and return all parts in the order of sources and shards."""
    names = [[unit.name for unit in source.units()] for source in sources]
    units = [(number, unit) for number, mine in enumerate(names) for unit in range(len(mine))]

    def load(number: int, unit: int) -> Part | None:
        return Part.load(sources[number], unit, names[number][unit])

    todo = [at for at in units if load(*at) is None]
    states = {}  # as it was before it was read

    def items() -> Iterator[Item]:
        for number, unit in todo:
            states[number, unit] = _state(sources[number], unit, names[number][unit])
            for sample in sources[number].read(unit):
                yield number, unit, sample
            yield number, unit, None

    rows: list[bytes] = []
    keys: list[str] = []
    unreadable = 0
    with Workers(workers if todo else 0) as pool, tqdm(unit="picture", disable=None) as bar:
        for (number, unit, sample), row in pool.map(
            fingerprint, items(), catch=(PictureError, CrashError), name=_name
        ):
            if sample is None:
                path = _part_path(sources[number], names[number][unit])
                _save(path, states.pop((number, unit)), rows, keys, unreadable)
                rows, keys, unreadable = [], [], 0
                continue
            bar.update()
            if isinstance(row, bytes) and isinstance(sample, Picture):
                rows.append(row)
                keys.append(sample.key)
            else:
                unreadable += 1
    parts = []
    for number, unit in units:
        part = load(number, unit)
        if part is None:
            where = sources[number].root / names[number][unit]
            raise UserError(f"{where} changed while it was read; run it again")
        parts.append(part)
    return parts


def _name(item: Item) -> str:
    return item[2].key if isinstance(item[2], Picture) else "a shard's end"


def fingerprint(item: Item) -> bytes | None:
    """A picture's row as bytes; None of what is no picture. Runs in worker processes.

    Raises:
        PictureError: it can't be decoded.
    """
    import imagehash

    sample = item[2]
    if not isinstance(sample, Picture):
        return None
    image = decode_rgb(sample.data)
    row = np.zeros((), ROW)
    size = image.height.to_bytes(8, "little") + image.width.to_bytes(8, "little")
    digest = hashlib.sha256(size + image.tobytes()).digest()
    row["digest"] = np.frombuffer(digest[:16], "<u8")
    row["pixels"] = image.height * image.width
    bits = imagehash.phash(image, hash_size=16).hash
    assert bits.size == HASH_BITS
    row["hash"] = np.packbits(bits.ravel()).view("<u8")
    row["cells"] = np.asarray(image.resize((CELLS, CELLS), Image.Resampling.BOX)).reshape(-1, 3)
    return row.tobytes()
