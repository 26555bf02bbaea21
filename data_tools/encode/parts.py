"""What one unit comes to: a folder with the unit's latents, ready to be copied into shards.

../../done/NNNNN.json   counts, statistics, rejects; written last
rows.npy        int64 [samples, 2 + 2 * members], by bucket: where a sample starts in its bucket's file, how
                long it is, then offset (from that start) and size of each member, -1 of one that it lacks
keys.npy        uint64 [samples], a hash of each key
007.bin         the samples of bucket 7 of the table, each as it will stand in a tar
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_tools.encode.work import Work
from finetune.data.shards import Bucket, ShardError
from finetune.data.shards.files import NAME_BYTES, key_hash, naming, npy_bytes, parse_npy, split_name
from finetune.data.shards.writer import check_names, tar_blocks

_COPY_BYTES = 16 << 20


@dataclass
class Tally:
    """What became of a unit's pictures. `buckets` and `crop_loss` are by number of the bucket in the table."""

    seen: int = 0
    excluded: int = 0
    redone: int = 0
    enlarged: int = 0
    boxes: int = 0
    boxes_lost: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    rejects: list[list[str]] = field(default_factory=list)
    buckets: dict[str, int] = field(default_factory=dict)
    crop_loss: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Any] = field(default_factory=dict)


def folder_of(work: Work, unit: int) -> Path:
    """The folder of a unit's part."""
    return work.root / "parts" / f"{unit:05d}"


def bin_name(bucket: int) -> str:
    """The file of a bucket in a part."""
    return f"{bucket:03d}.bin"


class PartWriter:
    """Writes the part of a claimed unit; whatever an earlier process left of it is deleted."""

    def __init__(self, work: Work, unit: int, table: Sequence[Bucket], members: Sequence[str]) -> None:
        self.work, self.unit, self.members = work, unit, list(members)
        self.folder = folder_of(work, unit)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._numbers = {bucket: number for number, bucket in enumerate(table)}
        self._files: dict[int, IO[bytes]] = {}
        self._ends: dict[int, int] = {}
        self._rows: dict[int, list[list[int]]] = {}
        self._hashes: dict[int, list[int]] = {}
        self._keys: set[str] = set()

    def write(self, key: str, members: Mapping[str, bytes], bucket: Bucket) -> int:
        """Add one sample; gives the number of its bucket.

        Raises:
            ShardError: a bad name, or a key that was there before.
        """
        check_names(key, members)
        if key in self._keys:
            raise ShardError(f"sample key {key!r} occurs twice; keys must differ")
        blocks, places = tar_blocks(key, members)
        number = self._numbers[bucket]
        path = self.folder / bin_name(number)
        with naming(path):
            if number not in self._files:
                self._files[number] = path.open("wb", buffering=1 << 20)
            self._files[number].write(blocks)
        start = self._ends.get(number, 0)
        self._ends[number] = start + len(blocks)
        row = [start, len(blocks)]
        for member in self.members:
            row += places.get(member, (-1, -1))
        self._rows.setdefault(number, []).append(row)
        self._hashes.setdefault(number, []).append(key_hash(key))
        self._keys.add(key)
        return number

    def finish(self, tally: Tally) -> None:
        """Make it last, and mark the unit as done."""
        for file in self._files.values():
            with naming(Path(file.name)):
                file.flush()
                os.fsync(file.fileno())
                file.close()
        order = sorted(self._rows)
        rows = [row for number in order for row in self._rows[number]]
        hashes = [value for number in order for value in self._hashes[number]]
        columns = 2 + 2 * len(self.members)
        for name, array in (
            ("rows.npy", np.array(rows, np.int64).reshape(-1, columns)),
            ("keys.npy", np.array(hashes, np.uint64)),
        ):
            with naming(self.folder / name), (self.folder / name).open("wb") as file:
                file.write(npy_bytes(array))
                file.flush()
                os.fsync(file.fileno())
        tally.buckets = {str(number): len(self._rows[number]) for number in order}
        self.work.publish(f"done/{self.unit:05d}.json", asdict(tally))

    def close(self) -> None:
        """Let go of the files; without `finish`, what they hold is nobody's."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk, which closing meets again
                pass


@dataclass(frozen=True)
class Part:
    """A finished part, for reading."""

    folder: Path
    tally: Tally

    @classmethod
    def load(cls, work: Work, unit: int) -> Part:
        """The part of a unit that is done."""
        return cls(folder_of(work, unit), Tally(**work.read(f"done/{unit:05d}.json")))

    def rows(self, bucket: int) -> np.ndarray:
        """Rows of a bucket's samples, int64 [samples, 2 + 2 * members]."""
        return self._span(np.load(self.folder / "rows.npy", mmap_mode="r"), bucket)

    def keys(self) -> np.ndarray:
        """Hashes of all keys, uint64 [samples], by bucket."""
        return np.load(self.folder / "keys.npy")  # type: ignore[no-any-return]

    def latents(self, bucket: int, without: Container[int]) -> Iterator[np.ndarray]:
        """The latents of a bucket, float16 [1, 2C, h, w] each, but for some rows."""
        rows = self.rows(bucket)
        with (self.folder / bin_name(bucket)).open("rb") as file:
            for number, (start, _, offset, size) in enumerate(rows[:, :4].tolist()):
                if number not in without:
                    file.seek(start + offset)
                    latent_2Chw = parse_npy(file.read(size))
                    if latent_2Chw is None:
                        raise ShardError(f"{file.name} is damaged; delete the folder of latents and encode again")
                    yield latent_2Chw[None]

    def place(self, position: int) -> tuple[int, int]:
        """(bucket, row in it) of a position in `keys`."""
        for number, samples in self.tally.buckets.items():
            if position < samples:
                return int(number), position
            position -= samples
        raise IndexError(position)

    def key(self, bucket: int, row: int) -> str:
        """A sample's key, from the header of its first member, which is its latent."""
        start = int(self.rows(bucket)[row, 0])
        with (self.folder / bin_name(bucket)).open("rb") as file:
            file.seek(start)
            return split_name(file.read(NAME_BYTES).rstrip(b"\0").decode())[0]

    def _span(self, array: np.ndarray, bucket: int) -> np.ndarray:
        start = sum(samples for number, samples in self.tally.buckets.items() if int(number) < bucket)
        return np.asarray(array[start : start + self.tally.buckets.get(str(bucket), 0)])


def read_runs(folder: Path, rows: np.ndarray, bucket: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Some neighbouring samples of a part as `write_shard` takes them, a bounded number of bytes at a time."""
    with (folder / bin_name(bucket)).open("rb", buffering=0) as file:
        first = 0
        while first < len(rows):
            begin = int(rows[first, 0])
            ends = rows[first:, 0] + rows[first:, 1]
            count = max(int(np.searchsorted(ends, begin + _COPY_BYTES, side="right")), 1)
            some = rows[first : first + count]
            file.seek(begin)
            size = int(ends[count - 1]) - begin
            data = file.read(size)
            while len(data) < size and (more := file.read(size - len(data))):
                data += more
            if len(data) != size:
                raise ShardError(f"{file.name} was cut short; delete the folder of latents and encode again")
            places = some[:, 2:].reshape(len(some), -1, 2).copy()
            places[..., 0] += np.where(places[..., 0] >= 0, (some[:, 0] - begin)[:, None], 0)
            yield data, places
            first += count
