"""Read pictures and records from image shards: our own, with a manifest, or any folder of WebDataset tars."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import UserError
from finetune.data.shards import IMAGE_MEMBERS, MANIFEST, Bucket, Manifest, ShardError, ShardSet

_MEMBERS = (*IMAGE_MEMBERS, "json", "txt")
# What img2dataset notes of the download, not of the picture.
_NO_LABELS = ("captions", "caption", "text", "key", "status", "error_message", "exif", "url")


@dataclass(frozen=True)
class Picture:
    """An encoded picture of an image shard. `record` has captions and whatever else its json says."""

    key: str
    data: bytes
    record: dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """A sample that can't be read: where it is, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class PictureSource:
    """A folder of image shards. `samples` is None without a manifest, `bucket` unless all share one."""

    root: Path
    samples: int | None
    bucket: Bucket | None

    @classmethod
    def open(cls, root: Path) -> PictureSource:
        """Look at what is in `root`.

        Raises:
            UserError: no folder, no tars, an unfinished set of ours, or latents.
        """
        if (root / MANIFEST).exists():
            shards = ShardSet.open(root, "images")
            buckets = {shard.bucket for shard in shards.manifest.shards}
            return cls(root, len(shards), buckets.pop() if len(buckets) == 1 else None)
        if not root.is_dir():
            raise UserError(f"no folder {root}; give a folder of image shards")
        if any(root.glob("*.index.npy")) or any(root.glob(".*.tmp")):
            raise UserError(f"{root} is a set that was never finished; run its `data-tools ingest` again")
        if not any(root.glob("*.tar")):
            raise UserError(f"no shards in {root}; make them with `data-tools ingest`")
        return cls(root, None, None)

    def __iter__(self) -> Iterator[Picture | Unreadable]:
        """Pictures in the order of the shards."""
        return self._iter_set() if self.samples is not None else self._iter_tars()

    def _iter_set(self) -> Iterator[Picture | Unreadable]:
        shards = ShardSet(self.root, Manifest.load(self.root))
        for sample_id in range(len(shards)):
            try:
                sample = shards.read(sample_id)
            except ShardError as error:
                yield Unreadable(f"sample {sample_id}", str(error))
            else:
                yield _picture(sample.pop("__key__"), sample)

    def _iter_tars(self) -> Iterator[Picture | Unreadable]:
        for path in sorted(self.root.glob("*.tar")):
            last: tuple[str, dict[str, bytes]] | None = None
            try:
                with tarfile.open(path, "r:") as tar:
                    for info in tar:
                        folder, slash, name = info.name.rpartition("/")
                        stem, _, member = name.partition(".")
                        key = folder + slash + stem
                        if not info.isreg() or key.startswith("__"):
                            continue
                        if last is None or last[0] != key:
                            if last is not None:
                                yield _picture(safe_key(path.stem, last[0]), last[1])
                            last = (key, {})
                        if member.lower() in _MEMBERS:
                            file = tar.extractfile(info)
                            last[1][member.lower()] = file.read() if file is not None else b""
                    # tarfile takes a file that is cut between members, or in a header, for a whole one.
                    if path.stat().st_size < tar.offset + tarfile.BLOCKSIZE:
                        raise EOFError("it ends without an end mark")
            except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
                yield Unreadable(path.name, f"not a whole tar ({error}); what came before was used")
                last = None  # its members may be incomplete
            if last is not None:
                yield _picture(safe_key(path.stem, last[0]), last[1])


def safe_key(tar: str, key: str) -> str:
    """A key for our shards from one of a foreign tar; the tar's name keeps keys of several tars apart."""
    joined = f"{tar}_{key}"
    safe = re.sub(r"[^A-Za-z0-9_-]", "-", joined).lstrip("_")
    if safe == joined and len(safe) <= 80:
        return safe
    return f"{safe[:60]}-{hashlib.sha256(joined.encode()).hexdigest()[:16]}"


def _picture(key: str, members: dict[str, Any]) -> Picture | Unreadable:
    data = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
    if data is None:
        return Unreadable(key, "no picture")
    record: Any = {}
    if "json" in members:
        try:
            record = json.loads(members["json"])
        except ValueError as error:
            return Unreadable(key, f"json is not JSON ({error})")
        if not isinstance(record, dict):
            return Unreadable(key, "json is no object")
    return Picture(key, data, {"captions": _captions(record, members.get("txt")), **_labels(record)})


def _captions(record: dict[str, Any], text: bytes | None) -> list[str]:
    captions: list[str] = []
    for field in ("captions", "caption", "text"):
        value = record.get(field)
        captions += [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not captions and text is not None:
        captions = [text.decode("utf-8", "replace")]
    cleaned = (" ".join(caption.split()) for caption in captions if isinstance(caption, str))
    return list(dict.fromkeys(caption for caption in cleaned if caption))


def _labels(record: dict[str, Any]) -> dict[str, Any]:
    labels = {name: value for name, value in record.items() if name not in _NO_LABELS}
    height, width = labels.get("original_height"), labels.get("original_width")
    if "original_size" not in labels and isinstance(height, int) and isinstance(width, int):
        labels["original_size"] = [height, width]  # img2dataset: the size before it resized
    return labels
