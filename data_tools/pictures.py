"""Read pictures and records from image shards: our own, with a manifest, or any folder of WebDataset tars."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.tars import TarSample, Unreadable, iter_tar
from data_tools.texts import sound_json, text_of
from finetune import UserError
from finetune.data.shards import IMAGE_MEMBERS, MANIFEST, MAP, MASK, Bucket, ShardError, ShardSet
from finetune.data.shards.files import WORK

__all__ = [
    "CAPTION_COLUMNS",
    "TAR_SUFFIXES",
    "Picture",
    "PictureSource",
    "Unit",
    "Unreadable",
    "caption_fields",
    "safe_key",
    "tar_stem",
]

CAPTION_COLUMNS = ("captions", "caption", "text")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MEMBERS = (*IMAGE_MEMBERS, "json", "txt")
# What img2dataset notes of the download, not of the picture.
_NO_LABELS = (*CAPTION_COLUMNS, "key", "status", "error_message", "exif", "url")


@dataclass(frozen=True)
class Picture:
    """An encoded picture of an image shard. `record` has captions and whatever else its json says.

    `maps` has the bytes of its label map and loss mask, by the names of these members. Foreign tars may mean
    anything by such names, so of these it has none: `data-tools ingest tars` is the way for them.
    """

    key: str
    data: bytes
    record: dict[str, Any]
    maps: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """One shard of a source: what is read from beginning to end by one process."""

    name: str
    samples: int | None  # None: a foreign tar, which doesn't say
    bytes: int
    bucket: Bucket | None = None  # (height, width) of all its pictures, where that is known
    changed_ns: int | None = None  # when a foreign tar was last written


@dataclass(frozen=True)
class PictureSource:
    """A folder of image shards. `samples` is None without a manifest, `bucket` unless all share one."""

    root: Path
    samples: int | None
    bucket: Bucket | None
    shards: ShardSet | None = None

    @classmethod
    def open(cls, root: Path) -> PictureSource:
        """Look at what is in `root`.

        Raises:
            UserError: no folder, no tars, an unfinished set of ours, or latents.
        """
        if (root / MANIFEST).exists():
            shards = ShardSet.open(root, "images")
            buckets = {shard.bucket for shard in shards.manifest.shards}
            return cls(root, len(shards), buckets.pop() if len(buckets) == 1 else None, shards)
        if not root.is_dir():
            raise UserError(f"no folder {root}; give a folder of image shards")
        if (root / WORK).exists():
            raise UserError(f"{root} is an unfinished set of latents; give the folder of the pictures")
        if any(root.glob("*.index.npy")) or any(root.glob(".*.tmp")):
            raise UserError(f"{root} is a set that was never finished; run its `data-tools ingest` again")
        if not any(_tars(root)):
            raise UserError(f"no shards in {root}; make them with `data-tools ingest`")
        return cls(root, None, None)

    def units(self) -> list[Unit]:
        """The shards, in their order, as they were when this was first asked."""
        return self._units

    @cached_property
    def _units(self) -> list[Unit]:
        if self.shards is not None:
            return [
                Unit(shard.name, shard.samples, shard.bytes, shard.bucket) for shard in self.shards.manifest.shards
            ]
        found = [(path.name, path.stat()) for path in _tars(self.root)]
        return [Unit(name, None, stat.st_size, changed_ns=stat.st_mtime_ns) for name, stat in found]

    def identity(self) -> str:
        """sha256 of the manifest, or of the names, sizes and times of the tars: equal only if the pictures are.

        A copy of a set with a manifest is the same set; of foreign tars, only a copy that keeps their times is.
        """
        if self.shards is not None:
            return hashlib.sha256((self.root / MANIFEST).read_bytes()).hexdigest()
        # A tar is padded to 10,240 bytes: with other captions it often has the same size.
        tars = [[unit.name, unit.bytes, unit.changed_ns] for unit in self.units()]
        return hashlib.sha256(json.dumps(tars).encode()).hexdigest()

    def read(self, unit: int) -> Iterator[Picture | Unreadable]:
        """The pictures of one shard, in its order.

        Raises:
            ShardError: a shard of a set of ours is missing, or can't be opened.
            OSError: the disk does not answer, or refuses.
        """
        if self.shards is None:
            return _read_tar(self.root / self._units[unit].name)
        return _read_shard(self.shards, unit)

    def __iter__(self) -> Iterator[Picture | Unreadable]:
        """All pictures, in the order of the shards."""
        for unit in range(len(self.units())):
            yield from self.read(unit)


def _read_shard(shards: ShardSet, number: int) -> Iterator[Picture | Unreadable]:
    shards.open_shard(number)  # its error ends the run: one line, not as many rejects as it has pictures
    for sample_id in range(*shards.starts[number : number + 2].tolist()):
        try:
            sample = shards.read(sample_id)
        except ShardError as error:
            yield Unreadable(f"sample {sample_id}", str(error))
        else:
            maps = {name: sample[name] for name in (MAP, MASK) if name in sample}
            yield _picture(sample.pop("__key__"), sample, maps)


def whole_numbers(value: Any, count: int) -> list[int] | None:
    """A record's `original_size` or `crop`: so many numbers of pixels, the last a height and a width; else None."""
    if not isinstance(value, list) or len(value) != count:
        return None
    sound = all(type(number) is int and 0 <= number < 1 << 31 for number in value) and 0 not in value[-2:]
    return value if sound else None


def _tars(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.name.endswith(TAR_SUFFIXES) and path.name[0] != ".")


def tar_stem(name: str) -> str:
    """The name of a tar, or its path, without its suffix: laion.00000 of laion.00000.tar."""
    return re.sub(r"\.(tar|tar\.gz|tgz)$", "", name)


def _read_tar(path: Path) -> Iterator[Picture | Unreadable]:
    for item in iter_tar(path, wanted=_MEMBERS.__contains__):
        match item:
            case TarSample(key, members):
                yield _picture(safe_key(tar_stem(path.name), key), members)
            case Unreadable():
                yield item


def safe_key(tar: str, key: str) -> str:
    """A key for our shards from one of a foreign tar; the tar's name keeps keys of several tars apart."""
    # Or else key 0 of a_1 and key 1_0 of a would both be a_1_0. No name has a NUL, so that the key is hashed then.
    seam = "\0" if "_" in tar else "_"
    joined = f"{tar}{seam}{key}"
    safe = re.sub(r"[^A-Za-z0-9_-]", "-", joined).lstrip("_")
    if safe == joined and len(safe) <= 80:
        return safe
    # A file's name may have bytes that are no UTF-8, which Python keeps as surrogates.
    return f"{safe[:60]}-{hashlib.sha256(joined.encode(errors='surrogatepass')).hexdigest()[:16]}"


def caption_fields(record: dict[str, Any]) -> list[Any]:
    """What a record says of its captions: its list `captions` alone, or else all that is called like one.

    Records of ours have such a list, and may have a `caption` or `text` beside it that was not chosen for one.
    """
    captions = record.get("captions")
    return [captions] if isinstance(captions, list) else [record.get(name) for name in CAPTION_COLUMNS]


def _picture(key: str, members: dict[str, Any], maps: dict[str, bytes] | None = None) -> Picture | Unreadable:
    data = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
    if data is None:
        return Unreadable(key, "no picture")
    record: Any = {}
    if "json" in members:
        try:
            record = sound_json(json.loads(members["json"]))
        except (ValueError, RecursionError) as error:
            return Unreadable(key, f"json is not JSON ({error})")
        if not isinstance(record, dict):
            return Unreadable(key, "json is no object")
    try:
        captions = _captions(record, members.get("txt"))
    except ValueError as error:
        return Unreadable(key, f"its caption, {error}")
    return Picture(key, data, {"captions": captions, **_labels(record)}, maps or {})


def _captions(record: dict[str, Any], text: bytes | None) -> list[str]:
    captions: list[Any] = []
    for value in caption_fields(record):
        captions += [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not captions and text is not None:
        captions = [text_of(text)]
    cleaned = (" ".join(caption.split()) for caption in captions if isinstance(caption, str))
    return list(dict.fromkeys(caption for caption in cleaned if caption))


def _labels(record: dict[str, Any]) -> dict[str, Any]:
    labels = {name: value for name, value in record.items() if name not in _NO_LABELS}
    height, width = labels.get("original_height"), labels.get("original_width")
    if "original_size" not in labels and isinstance(height, int) and isinstance(width, int):
        labels["original_size"] = [height, width]  # img2dataset: the size before it resized
    return labels
