"""Is a set of shards what its manifest says?"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from finetune.data.shards.files import (
    EMPTY_TEXT,
    IMAGE_MEMBERS,
    KEY,
    LATENT,
    MANIFEST,
    MEMBER,
    TEMPORARY,
    TEXT,
    WORK,
    ShardError,
    index_name,
    key_hash,
    npy_bytes,
    parse_npy,
    split_name,
)
from finetune.data.shards.labels import (
    CLASSES,
    HOLE,
    LOWRES,
    MAP,
    MASK,
    MASKED,
    parse_boxes,
    parse_classes,
    png_header,
)
from finetune.data.shards.manifest import Bucket, EncoderInfo, Kind, Manifest, ShardInfo, TextInfo

_MOST_PROBLEMS = 1000  # of a shard, that are named


@dataclass(frozen=True)
class Problem:
    """Something wrong: in which file, with which sample (None: with the file as a whole), what."""

    file: str
    sample: str | None
    what: str

    def __str__(self) -> str:
        where = self.file if self.sample is None else f"{self.file}: sample {self.sample}"
        return f"{where}: {self.what}"


Checked = tuple[np.ndarray, list[Problem]]
"""Of a shard: uint64 hashes of its keys, and what is wrong with it."""
Each = Callable[[Callable[[ShardInfo], Checked], Sequence[ShardInfo]], Iterable[Checked]]


def verify(
    root: str | os.PathLike[str],
    progress: Callable[[int], object] | None = None,
    check: Callable[[str, bytes], str | None] | None = None,
    each: Each = map,
) -> list[Problem]:
    """Check a whole set: names, sizes, checksums, tars against indexes, records, latents, keys.

    Args:
        progress: called with the number of bytes just checked.
        check: called with each member's name and bytes; returns what is wrong with them, or None. The way to
            decode pictures, which this module doesn't know.
        each: like `map`, over the shards; may use other processes.
    """
    root = Path(root)
    try:
        manifest = Manifest.load(root)
    except ShardError as error:
        return [Problem(MANIFEST, None, str(error))]
    problems = [*_verify_folder(root, manifest)]
    key_hashes: list[np.ndarray] = []
    shards = [shard for shard in manifest.shards if (root / shard.name).is_file()]
    look = functools.partial(_verify_shard, root, dataclasses.replace(manifest, shards=[]), check)
    for shard, (hashes, found) in zip(shards, each(look, shards), strict=True):
        problems += found
        key_hashes.append(hashes)
        if progress:
            progress(shard.bytes)
    problems += _verify_keys(root, manifest, key_hashes)
    return problems


def _verify_folder(root: Path, manifest: Manifest) -> Iterator[Problem]:
    names = [shard.name for shard in manifest.shards]
    if not names:
        yield Problem(MANIFEST, None, "lists no shards")
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(MANIFEST, None, f"lists {name} {count} times")
    known = {MANIFEST, *names, *(index_name(name) for name in names)}
    for name in sorted(known):
        if not (root / name).is_file():
            yield Problem(name, None, "missing")
    for path in sorted(root.iterdir()):
        if path.name not in known and (path.suffix == ".tar" or path.name.endswith(".index.npy")):
            yield Problem(path.name, None, "not in the manifest")
        elif TEMPORARY.fullmatch(path.name):
            yield Problem(path.name, None, "left by a writer that was stopped; delete it")
        elif path.name == WORK:
            yield Problem(
                path.name, None, "left by an encoder that was stopped; run the same `data-tools encode` again"
            )
    if manifest.text is not None:
        yield from _verify_empty_text(root, manifest.text)
    if manifest.classes is not None:
        yield from _verify_classes(root, manifest.classes)
    data = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    for field in ("samples", "bytes"):
        total = getattr(manifest, field)
        if field in data and data[field] != total:
            yield Problem(MANIFEST, None, f"{field} is {data[field]}, the shards sum to {total}")


def _verify_empty_text(root: Path, text: TextInfo) -> Iterator[Problem]:
    try:
        array = parse_npy((root / EMPTY_TEXT).read_bytes())
    except OSError:
        yield Problem(EMPTY_TEXT, None, "missing")
        return
    if array is None:
        yield Problem(EMPTY_TEXT, None, "not a numpy array")
    elif array.dtype != np.float16 or array.shape != (text.length, text.width):
        want = [text.length, text.width]
        yield Problem(EMPTY_TEXT, None, f"{array.dtype} {list(array.shape)}, the text encoder needs float16 {want}")
    elif not np.isfinite(array).all():
        yield Problem(EMPTY_TEXT, None, "values that are not finite")


def _verify_classes(root: Path, sha256: str) -> Iterator[Problem]:
    try:
        data = (root / CLASSES).read_bytes()
    except OSError:
        yield Problem(CLASSES, None, "missing")
        return
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        yield Problem(CLASSES, None, f"sha256 is {found[:12]}..., the manifest says {sha256[:12]}...")
    try:
        parse_classes(data)
    except ShardError as error:
        yield Problem(CLASSES, None, str(error).removeprefix(f"{CLASSES} "))


def _classes(root: Path, manifest: Manifest) -> int | None:
    """How many classes have names; None where none have, or where that can't be known."""
    if manifest.classes is None:
        return None
    with contextlib.suppress(OSError, ShardError):
        return len(parse_classes((root / CLASSES).read_bytes()))
    return None


def _verify_shard(
    root: Path,
    manifest: Manifest,
    check: Callable[[str, bytes], str | None] | None,
    shard: ShardInfo,
) -> Checked:
    path = root / shard.name
    classes = _classes(root, manifest)
    problems: list[Problem] = []

    def report(what: str, sample: str | None = None, file: str = shard.name) -> None:
        problems.append(Problem(file, sample, what))

    size = path.stat().st_size
    if size != shard.bytes:
        report(f"{size} bytes, the manifest says {shard.bytes}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        report(f"sha256 is {digest.hexdigest()[:12]}..., the manifest says {shard.sha256[:12]}...")

    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, "r:", ignore_zeros=False) as tar:
            for info in tar:
                key, member = split_name(info.name)
                if not info.isreg() or not KEY.fullmatch(key) or not MEMBER.fullmatch(member):
                    report(f"member {info.name!r} is no sample's regular file")
                    continue
                if info.offset_data + info.size > size:
                    report(f"{member} ends at byte {info.offset_data + info.size} of {size}", key)
                    break
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                if member in samples[-1][1]:
                    report(f"{member} occurs twice", key)
                samples[-1][1][member] = (info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        report(f"not a whole tar after {len(samples)} samples ({error})")
    if len(samples) != shard.samples:
        report(f"{len(samples)} samples, the manifest says {shard.samples}")

    _verify_index(root, manifest, shard, samples, problems)

    with path.open("rb") as file:
        for key, places in samples:
            for what in _verify_sample(file, manifest, shard, places, check, classes):
                report(what, key)
    hashes = np.fromiter((key_hash(key) for key, _ in samples), np.uint64, len(samples))
    if (more := len(problems) - _MOST_PROBLEMS) > 0:
        problems[_MOST_PROBLEMS:] = [Problem(shard.name, None, f"{more:,} more problems")]
    return hashes, problems


def _verify_index(
    root: Path,
    manifest: Manifest,
    shard: ShardInfo,
    samples: list[tuple[str, dict[str, tuple[int, int]]]],
    problems: list[Problem],
) -> None:
    name = index_name(shard.name)
    if not (root / name).is_file():
        return
    try:
        data = (root / name).read_bytes()
    except OSError as error:
        problems.append(Problem(name, None, f"can't be read ({error.strerror})"))
        return
    index = parse_npy(data)
    if index is None:
        problems.append(Problem(name, None, "not a numpy array"))
        return
    if index.dtype != np.int64 or index.shape != (shard.samples, len(manifest.members), 2):
        want = [shard.samples, len(manifest.members), 2]
        problems.append(Problem(name, None, f"{index.dtype} {list(index.shape)}, needs int64 {want}"))
        return
    if data != npy_bytes(index):
        problems.append(Problem(name, None, "has bytes that no index has"))
    for (key, places), row in zip(samples, index.tolist(), strict=False):
        told = {m: tuple(place) for m, place in zip(manifest.members, row, strict=True) if place[0] >= 0}
        if told != places:
            wrong = sorted(m for m in told.keys() | places.keys() if told.get(m) != places.get(m))
            problems.append(Problem(name, key, f"offsets of {', '.join(wrong)} are not those of the tar"))


def _verify_sample(
    file: IO[bytes],
    manifest: Manifest,
    shard: ShardInfo,
    places: dict[str, tuple[int, int]],
    check: Callable[[str, bytes], str | None] | None,
    classes: int | None,
) -> Iterator[str]:
    if manifest.kind == "latents":
        needed = (LATENT, "json", TEXT) if manifest.text is not None else (LATENT, "json")
        missing = [member for member in needed if member not in places]
    else:
        missing = [] if any(member in places for member in IMAGE_MEMBERS) else ["picture"]
    if missing:
        yield f"no {' and no '.join(missing)}"
    for member, (offset, size) in places.items():
        file.seek(offset)
        data = file.read(size)
        if member == LATENT and manifest.encoder and shard.bucket:
            yield from _verify_latent(data, manifest.encoder, shard.bucket)
        elif member == "json":
            yield from _verify_record(data, manifest.kind, classes)
        elif member == TEXT and manifest.text and "json" in places:
            file.seek(places["json"][0])
            yield from _verify_text(data, manifest.text, _captions(file.read(places["json"][1])))
        elif manifest.kind == "latents" and manifest.encoder and shard.bucket:
            yield from _verify_optional(member, data, manifest.encoder, shard.bucket, places)
        if check is not None and (what := check(member, data)):
            yield f"{member}: {what}"


def _verify_latent(data: bytes, encoder: EncoderInfo, bucket: Bucket) -> Iterator[str]:
    shape = (2 * encoder.channels, bucket[0] // encoder.downsample, bucket[1] // encoder.downsample)
    array = parse_npy(data)
    if array is None:
        yield f"{LATENT} is not a numpy array"
    elif array.dtype != np.float16 or array.shape != shape:
        yield f"{LATENT} is {array.dtype} {list(array.shape)}, its bucket needs float16 {list(shape)}"
    elif not np.isfinite(array).all():
        yield f"{LATENT} has values that are not finite"
    elif (array[encoder.channels :] < 0).any():
        yield f"{LATENT} has negative standard deviations"


def _verify_optional(
    member: str, data: bytes, encoder: EncoderInfo, bucket: Bucket, places: dict[str, tuple[int, int]]
) -> Iterator[str]:
    if member in (MAP, MASK, LOWRES):
        header = png_header(data)
        if header is None:
            yield f"{member} is no PNG"
            return
        height, width, bits, kind = header
        if (bits, kind) != ((8, 2) if member == LOWRES else (8, 0)):
            yield f"{member} is not 8-bit {'RGB' if member == LOWRES else 'grey'}"
        factor = max(bucket[0] // height, 1) if member == LOWRES and height else 1
        if (factor * height, factor * width) != bucket:
            yield f"{member} is {height}x{width}, its bucket is {bucket[0]}x{bucket[1]}"
    elif member in (HOLE, MASKED):
        cells = tuple(side // encoder.downsample for side in bucket)
        want = cells if member == HOLE else (2 * encoder.channels, *cells)
        dtype = np.uint8 if member == HOLE else np.float16
        array = parse_npy(data)
        if array is None:
            yield f"{member} is not a numpy array"
        elif array.dtype != dtype or array.shape[1:] != want or not len(array):
            needs = f"{np.dtype(dtype)} [holes, {', '.join(map(str, want))}]"
            yield f"{member} is {array.dtype} {list(array.shape)}, its bucket needs {needs}"
        elif member == HOLE and array.max() > 1:
            yield f"{HOLE} has values other than 0 and 1"
        elif member == MASKED and not np.isfinite(array).all():
            yield f"{MASKED} has values that are not finite"
        elif member == MASKED and (array[:, encoder.channels :] < 0).any():
            yield f"{MASKED} has negative standard deviations"
        if (other := HOLE if member == MASKED else MASKED) not in places:
            yield f"{member} without {other}"


def _verify_text(data: bytes, text: TextInfo, captions: int | None) -> Iterator[str]:
    """States of captions: a row for each, or one, the empty caption's, where there are none."""
    array = parse_npy(data)
    if array is None:
        yield f"{TEXT} is not a numpy array"
    elif array.dtype != np.float16 or array.shape[1:] != (text.length, text.width) or not len(array):
        want = f"[captions, {text.length}, {text.width}]"
        yield f"{TEXT} is {array.dtype} {list(array.shape)}, the text encoder needs float16 {want}"
    elif captions is not None and len(array) != max(captions, 1):
        yield f"{TEXT} has {len(array)} rows for {captions} captions"
    elif not np.isfinite(array).all():
        yield f"{TEXT} has values that are not finite"


def _captions(record: bytes) -> int | None:
    """The number of captions; None if the record is damaged, which is said elsewhere."""
    try:
        captions = json.loads(record).get("captions", [])
    except (ValueError, AttributeError, RecursionError):
        return None
    return len(captions) if isinstance(captions, list) else None


def _verify_record(data: bytes, kind: Kind, classes: int | None) -> Iterator[str]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        yield f"json is not JSON ({error})"
        return
    if not isinstance(record, dict):
        yield "json is no object"
        return
    captions = record.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        yield "json: captions is no list of strings"
    lengths = {"original_size": 2, "crop": 4} if kind == "latents" else {}
    for field, length in lengths.items():
        value = record.get(field)
        if not isinstance(value, list) or len(value) != length or not all(type(n) is int for n in value):
            yield f"json: {field} is not {length} whole numbers"
        elif min(value) < 0 or 0 in value[-2:]:  # both end with a height and a width
            yield f"json: {field} {value} is impossible"
    if kind == "latents" and not isinstance(record.get("flipped", False), bool):
        yield f"json: flipped is {record['flipped']!r}, not true or false"
    if classes is None:  # then `class` and `boxes` may be anybody's labels
        return
    label, boxes = record.get("class", 0), parse_boxes(record.get("boxes", []))
    if type(label) is not int or not 0 <= label < classes:
        yield f"json: class is {label!r}, {CLASSES} has 0 to {classes - 1}"
    if boxes is None:
        yield "json: boxes are not [class, x0, y0, x1, y1] with fractions of the picture"
    elif wrong := next((box[0] for box in boxes if box[0] >= classes), None):
        yield f"json: a box has class {wrong}, {CLASSES} has 0 to {classes - 1}"


def _verify_keys(root: Path, manifest: Manifest, key_hashes: list[np.ndarray]) -> Iterator[Problem]:
    """Keys that repeat over shards: 8 bytes a sample are kept, and only the suspects are looked at again."""
    if not key_hashes:
        return
    values = np.concatenate(key_hashes)
    values.sort()
    suspects = set(values[1:][values[1:] == values[:-1]].tolist())
    if not suspects:
        return
    first: dict[str, str] = {}
    for shard in manifest.shards:
        with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(root / shard.name, "r:") as tar:
            last = None
            for info in tar:
                key, _ = split_name(info.name)
                if key != last and key_hash(key) in suspects:
                    if key in first:
                        yield Problem(shard.name, key, f"the key is also in {first[key]}")
                    first.setdefault(key, shard.name)
                last = key
