"""Find exact and near duplicates in sets of image shards, and list them for `encode` to leave out.

SHARDS are folders that `data-tools ingest` made, or folders of WebDataset tars. Pictures are compared across all
of them. Each set gets SHARDS/duplicates.jsonl, one object a line for each picture to leave out: its "key", the key
of the picture that is kept in its place ("duplicate_of", with "set" if that is in another of the sets), the
"distance" of the two, and whether they are the same to the pixel ("exact"). `encode` honours the list; nothing is
deleted, and a new run replaces the list. Its first line says of which pictures it is ("pictures", "sets"): `encode`
refuses the list once SHARDS, or a set whose pictures stand for some of them, holds others.

Of duplicates the picture with the most pixels is kept; of those the first, in the order of the sets and shards.
A picture is left out only if it is near one that is kept, so a chain of slightly different pictures doesn't vanish.

Exact duplicates have the same pixels, upright and over white. Near ones have 256-bit perceptual hashes (phash, of
the grey picture) that differ in at most --distance bits, and in none of 8 x 8 cells of the picture do their
colours differ by more than --colour levels of 255: a red heart is not a blue heart. Measured with --colour 8 on
1,200 different emoji of 64 pixels (the hardest kind: flat, alike, on white) and 200 synthetic pictures of 256
pixels with the spectrum of photographs, and on altered copies of both:

  --distance                             4         8        10        12        16
  emoji taken for copies, of 719,400     0         0         0         0         0  pairs
    by the hash without the colours      2         9        14        23        40
  copies found, per cent of emoji / photograph-like:
    JPEG, quality 90                87/100    98/100    99/100   100/100   100/100
    JPEG, quality 50                36/ 99    72/100    82/100    89/100    95/100
    WebP, quality 50                23/100    57/100    67/100    77/100    88/100
    twice the size                  96/100    99/100   100/100   100/100   100/100
    half the size                   79/100    98/100    99/100    99/100   100/100
    half the size, JPEG 70           1/100     6/100     7/100    10/100    14/100
    5 % brighter                    41/ 57    61/ 57    64/ 57    65/ 57    65/ 57
    10 % more saturated             95/100    99/100    99/100    99/100    99/100
    one pixel cropped on each side   0/ 20     0/ 71     0/ 92     0/ 97     0/100
    grey (not a duplicate)           2/  0     2/  0     2/  0     2/  0     2/  0

So mirrored pictures, crops of more than half a per cent a side, and pictures with other colours stay. Look at
--report before you widen the distance.

Each picture is decoded once: what is known of it (about 300 bytes) is kept in SHARDS/.dedupe, so an interrupted run
goes on where it was, and another --distance takes no decoding. That folder may be deleted. Sorting needs about 50
bytes of memory a picture, and 2 GB beside, and as much disk as .dedupe for the time of the run.

examples:
  data-tools dedupe shards/photos
  data-tools dedupe shards/photos shards/scraped --distance 6 --dry-run --report pairs.png
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from data_tools.arguments import add_workers_argument, default_workers
from data_tools.leaders import HASH_BITS, distances, find_leaders
from data_tools.output import DUPLICATES, FINGERPRINTS, lock_folder, whole_file
from data_tools.pictures import Picture, PictureSource, Unreadable
from data_tools.workers import CrashError, Workers
from finetune import UserError
from finetune.data.shards import set_folder, write_atomic
from finetune.data.shards.images import PictureError, decode_rgb

_VERSION = 1
_CELLS = 8
_ROW = np.dtype(
    [("digest", "<u8", 2), ("hash", "<u8", 4), ("pixels", "<u8"), ("cells", "u1", (_CELLS * _CELLS, 3))]
)
_CHUNK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools dedupe`."""
    parser.add_argument("shards", type=set_folder, nargs="+", metavar="SHARDS", help="folders of image shards")
    parser.add_argument(
        "--distance", type=int, default=10, metavar="BITS", help="of near duplicates, 0 to 32 of 256 (default: 10)"
    )
    parser.add_argument(
        "--colour", type=int, default=8, metavar="LEVELS", help="difference of colours, of 255 (default: 8)"
    )
    parser.add_argument("--exact", action="store_true", help="only pictures whose pixels are the same")
    parser.add_argument("--dry-run", action="store_true", help="count, but leave the lists as they are")
    parser.add_argument("--report", type=Path, metavar="PNG", help="draw some near duplicates, the doubtful first")
    add_workers_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools dedupe`."""
    _check(args)
    with contextlib.ExitStack() as locks:
        sources = [PictureSource.open(root) for root in args.shards]
        for source in sources:
            try:
                (source.root / FINGERPRINTS).mkdir(exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write to {source.root} ({error.strerror}); copy the set") from None
            locks.enter_context(lock_folder(source.root / FINGERPRINTS, shared=False))
        return _dedupe(sources, args)


def _dedupe(sources: list[PictureSource], args: argparse.Namespace) -> int:
    # Before the pictures are read: they may be replaced meanwhile.
    identities = {source.root: source.identity() for source in sources}
    known = look(sources, default_workers() if args.workers is None else args.workers)
    for source in sources:
        if not any(part.count for part in known if part.source is source):
            raise UserError(f"{source.root} has no picture that can be read; run `data-tools verify` on it")
    with tempfile.TemporaryDirectory(prefix="sort-", dir=sources[0].root / FINGERPRINTS) as work:
        table = Table.gather(known, Path(work))
        found = find_duplicates(table, None if args.exact else args.distance, args.colour)
        if not args.dry_run:
            for source in sources:
                _write(source, identities, known, table, found)
        if args.report is not None:
            _draw(args.report, known, table, found)
        _tell(sources, known, table, found, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.distance <= 32:
        raise UserError(f"--distance {args.distance} is outside 0 to 32; with more, different pictures are alike")
    if not 0 <= args.colour <= 255:
        raise UserError(f"--colour {args.colour} is outside 0 to 255")
    if args.report is not None and args.report.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--report {args.report} should end in .png, .jpg or .webp")
    folders = [root.resolve() for root in args.shards]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise UserError(f"{args.shards[place]} is given twice; give each set once")
    try:
        import imagehash  # noqa: F401 (the workers need it: say so before they do)
    except ImportError:
        raise UserError("dedupe needs ImageHash; run `pip install ImageHash`") from None


# What is known of each picture


@dataclass(frozen=True)
class Part:
    """What is known of the pictures of one shard: a file in SHARDS/.dedupe.

    A line of JSON, rows of `_ROW`, and the pictures' keys, one a line.
    """

    source: PictureSource
    unit: int
    path: Path
    start: int  # of its rows, in bytes
    count: int
    unreadable: int

    def rows(self) -> np.ndarray:
        """[count] of `_ROW`."""
        return np.memmap(self.path, _ROW, "r", self.start, (self.count,)) if self.count else np.zeros(0, _ROW)

    def keys(self) -> list[str]:
        """One for each row."""
        with self.path.open("rb") as file:
            file.seek(self.start + self.count * _ROW.itemsize)
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
    row = np.zeros((), _ROW)
    size = image.height.to_bytes(8, "little") + image.width.to_bytes(8, "little")
    digest = hashlib.sha256(size + image.tobytes()).digest()
    row["digest"] = np.frombuffer(digest[:16], "<u8")
    row["pixels"] = image.height * image.width
    bits = imagehash.phash(image, hash_size=16).hash
    assert bits.size == HASH_BITS
    row["hash"] = np.packbits(bits.ravel()).view("<u8")
    row["cells"] = np.asarray(image.resize((_CELLS, _CELLS), Image.Resampling.BOX)).reshape(-1, 3)
    return row.tobytes()


# The comparison


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

        def on_disk(name: str, dtype: str, *shape: int) -> np.ndarray:
            return np.memmap(work / name, dtype, "w+", shape=(max(count, 1), *shape))[:count]

        hashes, digests = on_disk("hashes", "<u8", 4), on_disk("digests", "<u8", 2)
        cells = on_disk("cells", "u1", _CELLS * _CELLS, 3)
        key_ends = np.memmap(work / "key_ends", "<i8", "w+", shape=(count + 1,))
        with (work / "keys").open("wb") as file:
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


# What becomes of it


def _write(
    source: PictureSource,
    identities: dict[Path, str],
    parts: list[Part],
    table: Table,
    found: Found,
) -> None:
    """SHARDS/duplicates.jsonl, in the order of the pictures."""
    path = source.root / DUPLICATES
    # Left by a kill, it doesn't make the set look unfinished there.
    temporary = source.root / FINGERPRINTS / f"{path.name}.tmp"
    names = {root: os.path.relpath(root, source.root) for root in identities if root != source.root}
    head: dict[str, Any] = {"pictures": identities[source.root]}
    if names:
        head["sets"] = {name: identities[root] for root, name in names.items()}
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        for number, part in enumerate(parts):
            if part.source is not source:
                continue
            places = np.arange(table.starts[number], table.starts[number + 1])
            for place in places[found.kept[places] != places].tolist():
                kept = int(found.kept[place])
                row: dict[str, Any] = {"key": table.key(place), "duplicate_of": table.key(kept)}
                if (other := names.get(parts[table.part_of(kept)].source.root)) is not None:
                    row["set"] = other
                row |= {"distance": int(found.distance[place]), "exact": bool(found.exact[place])}
                file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _tell(
    sources: list[PictureSource], parts: list[Part], table: Table, found: Found, args: argparse.Namespace
) -> None:
    gone = found.kept != np.arange(len(table))
    for source in sources:
        mine = [number for number, part in enumerate(parts) if part.source is source]
        span = slice(int(table.starts[mine[0]]), int(table.starts[mine[-1] + 1]))
        exact, near = int(found.exact[span].sum()), int((gone & ~found.exact)[span].sum())
        unreadable = sum(parts[number].unreadable for number in mine)
        what = f"{span.stop - span.start:,} pictures, {exact:,} exact and {near:,} near duplicates"
        what += f", {unreadable:,} can't be read" if unreadable else ""
        where = "nothing written" if args.dry_run else f"in {source.root / DUPLICATES}"
        print(f"{source.root}: {what}; {where}")
    leaders, counts = np.unique(found.kept[gone], return_counts=True)
    top = np.argsort(-counts, kind="stable")[:3]
    if len(top) and counts[top[0]] > 10:  # a threshold that is too wide shows here first
        print("most duplicates:", ", ".join(f"{counts[at]:,} of {table.key(int(leaders[at]))}" for at in top))


def _draw(out: Path, parts: list[Part], table: Table, found: Found, pairs: int = 48, tile: int = 128) -> None:
    """A sheet of near duplicates, kept left and left out right, from the greatest distance to the least."""
    from data_tools.preview import contact_sheet

    near = np.flatnonzero((found.kept != np.arange(len(table))) & ~found.exact)
    if not len(near):
        print(f"no near duplicates to draw; {out} was not written")
        return
    # The first half are the most doubtful, the others spread over all distances.
    order = near[np.argsort(-found.distance[near].astype(int), kind="stable")]
    head, tail = order[: pairs // 2], order[pairs // 2 :]
    spread = np.linspace(0, len(tail) - 1, min(pairs - len(head), len(tail))).round().astype(int)
    chosen = [*head.tolist(), *tail[spread].tolist()]
    wanted = {*chosen, *(int(found.kept[place]) for place in chosen)}
    images = dict(_read_places(parts, table, wanted))
    tiles = []
    for place in chosen:
        pair = [images.get(int(found.kept[place])), images.get(place)]
        picture = Image.new("RGB", (2 * tile, tile + 12), "white")
        for column, image in enumerate(pair):
            if image is not None:
                image.thumbnail((tile - 2, tile - 2))
                picture.paste(image, (column * tile + (tile - image.width) // 2, (tile - image.height) // 2))
        ImageDraw.Draw(picture).text((2, tile), f"distance {found.distance[place]}", fill="black")
        tiles.append(picture)
    sheet = contact_sheet(tiles, 4)
    with whole_file(out) as temporary:
        sheet.save(temporary)
    print(
        f"{len(chosen)} of {len(near):,} near duplicates in {out}, each with the picture that is kept on its left"
    )


def _read_places(parts: list[Part], table: Table, places: set[int]) -> Iterator[tuple[int, Image.Image]]:
    by_part = itertools.groupby(sorted(places), key=table.part_of)
    for number, group in by_part:
        keys: dict[str, list[int]] = {}
        for place in group:
            keys.setdefault(table.key(place), []).append(place)
        part = parts[number]
        for sample in part.source.read(part.unit):
            if isinstance(sample, Picture) and sample.key in keys:
                image = decode_rgb(sample.data, at_least=(128, 128))
                for place in keys.pop(sample.key):
                    yield place, image.copy()
            if not keys:
                break
