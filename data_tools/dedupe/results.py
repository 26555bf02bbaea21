"""What becomes of duplicates: the lists, the sheet of doubtful ones, what is said."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_tools.dedupe.fingerprints import Part
from data_tools.dedupe.table import Found, Table
from data_tools.output import DUPLICATES, FINGERPRINTS, whole_file
from data_tools.pictures import Picture, PictureSource
from finetune.data.shards.files import naming
from finetune.data.shards.images import decode_rgb


def write(identities: dict[Path, str], parts: list[Part], table: Table, found: Found) -> None:
    """SHARDS/duplicates.jsonl of each set, in the order of its pictures.

    All are written before the first takes its place: with an old list of one set beside a new one of another, a
    picture may be left out for one that is left out too.
    """
    # Left by a kill, they don't make a set look unfinished there.
    temporaries = {root: root / FINGERPRINTS / f"{DUPLICATES}.tmp" for root in identities}
    for root, temporary in temporaries.items():
        with naming(root / DUPLICATES), temporary.open("w", encoding="utf-8") as file:
            for row in _rows(root, identities, parts, table, found):
                file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    for root, temporary in temporaries.items():
        os.replace(temporary, root / DUPLICATES)


def _rows(
    root: Path, identities: dict[Path, str], parts: list[Part], table: Table, found: Found
) -> Iterator[dict[str, Any]]:
    """Of which pictures a set's list is, then one for each picture to leave out."""
    names = {other: os.path.relpath(other, root) for other in identities if other != root}
    sets = {"sets": {name: identities[other] for other, name in names.items()}} if names else {}
    yield {"pictures": identities[root], **sets}
    for number, part in enumerate(parts):
        if part.source.root != root:
            continue
        places = np.arange(table.starts[number], table.starts[number + 1])
        for place in places[found.kept[places] != places].tolist():
            kept = int(found.kept[place])
            row: dict[str, Any] = {"key": table.key(place), "duplicate_of": table.key(kept)}
            if (other := names.get(parts[table.part_of(kept)].source.root)) is not None:
                row["set"] = other
            yield row | {"distance": int(found.distance[place]), "exact": bool(found.exact[place])}


def tell(
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


def draw(out: Path, parts: list[Part], table: Table, found: Found, pairs: int = 48, tile: int = 128) -> None:
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
