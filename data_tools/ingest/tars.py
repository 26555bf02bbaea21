"""Make image shards from WebDataset tars: img2dataset's output, or anybody's.

SOURCE is a folder (tars in it and below), a tar (also .tar.gz, .tgz), or a pattern such as
'cc3m/{00000..00331}.tar'; several may be given. A sample's picture is its jpg, png or webp member, or the one that
--picture names; its captions stand in its json (captions, caption or text) or else its txt; a number or name in
its cls becomes the label `class`. Other json fields are kept as labels, and other members (depth.npy, ...) are
carried over as they are. A map.png is the picture's label map, a mask.png its loss mask (see `ingest folder`), and
cut with it by --size; those of another kind become other.map.png and other.mask.png. A folder's classes.json names
its classes.

Where img2dataset left NNNNN.parquet beside NNNNN.tar, its columns are kept as labels too, and both are held against
each other: a row without a sample, or a sample without a row, is set aside. Downloads that failed are counted.

Pictures keep their bytes unless --size or --format is given. What can't be used, damaged tars too, is listed in
SHARDS/rejects.jsonl, and the rest goes on; so are links to folders, which are not followed.

examples:
  data-tools ingest tars laion-art --out shards/laion-art --min-size 512 --where 'aesthetic > 6'
  data-tools ingest tars 'depth/{000..099}.tar' --picture rgb.png --out shards/depth
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_tools.images import SUFFIXES
from data_tools.ingest.items import Found, SetAside
from data_tools.ingest.options import Options, add_picture_arguments
from data_tools.ingest.records import captions_of, labels_of
from data_tools.ingest.shards import ingest
from data_tools.pictures import CAPTION_COLUMNS, TAR_SUFFIXES, caption_fields, safe_key, tar_stem
from data_tools.tars import TarSample, iter_tar
from data_tools.texts import number_or_text, printable, text_of
from finetune import UserError, first_line
from finetune.data.shards import CLASSES, IMAGE_MEMBERS, parse_classes
from finetune.terminal import nonempty

_TEXTS = ("txt", "text", "caption")
_OTHER_PICTURES = tuple(sorted(suffix[1:] for suffix in SUFFIXES if suffix[1:] not in IMAGE_MEMBERS))
# img2dataset's notes of the download. `original_size` says what its original_height and original_width do.
_NOT_LABELS = (*CAPTION_COLUMNS, "key", "status", "error_message", "exif", "original_height", "original_width")
_MAX_PATTERN, _MAX_DIGITS = 1_000_000, 20  # names that one pattern may stand for; digits of a number in it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools ingest tars`."""
    parser.add_argument(
        "sources", nargs="+", type=nonempty, metavar="SOURCE", help="folder of tars, tar, or pattern"
    )
    parser.add_argument("--picture", metavar="MEMBER", help="member that is the picture, such as rgb.png")
    add_picture_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools ingest tars`."""
    options = Options.from_args(args)
    tars, unread = find_tars(args.sources, args.out)
    names = tar_names(tars)
    failed: Counter[str] = Counter()
    items = itertools.chain.from_iterable(
        _tar(tar, name, args.picture and args.picture.lower().lstrip("."), failed)
        for tar, name in zip(tars, names, strict=True)
    )
    code = ingest(
        args,
        options,
        itertools.chain(items, unread),
        source=" ".join(args.sources),
        paths=tars,
        classes=_class_names(args.sources),
    )
    if failed:
        listed = ", ".join(f"{count} {status}" for status, count in failed.most_common())
        print(f"{failed.total()} rows of img2dataset's parquet have no picture ({listed})")
    return code


def _class_names(sources: Iterable[str]) -> list[str]:
    """What the classes.json of the sources that are folders say; none where there is none.

    Raises:
        UserError: one is no list of names, or they differ.
    """
    found: dict[Path, list[str]] = {}
    for source in sources:
        path = Path(source) / CLASSES
        if path.is_file():
            found[path] = parse_classes(path.read_bytes(), path)
    (first, names), *others = found.items() or [(Path(), [])]
    for path, more in others:
        if more != names:
            raise UserError(f"{first} and {path} name different classes; ingest these folders one by one")
    return names


def find_tars(sources: Iterable[str], out: Path) -> tuple[list[Path], list[SetAside]]:
    """The tars that the sources name, each once, in the order of their paths; and folders that weren't entered.

    Those in `out` are no source.

    Raises:
        UserError: a source names none.
    """
    tars: dict[str, Path] = {}
    unread: list[SetAside] = []
    for source in sources:
        if re.match(r"[a-z0-9+]+:", source, re.IGNORECASE) and not Path(source).exists():
            raise UserError(f"{source} is not on this machine; copy the tars here first")
        path = Path(source)
        if path.is_dir():
            found, closed = _below(path, out)
            if not found:
                remedy = f"{closed[0].file} is {closed[0].reason}" if closed else "give the folder that holds them"
                raise UserError(f"no tars in {source}; {remedy}")
            unread += closed
        elif path.exists():
            found = [path]
        else:
            found = _matches(source)
        for tar in found:
            tars.setdefault(os.path.realpath(tar), tar)
    return sorted(tars.values()), unread


def _below(root: Path, out: Path) -> tuple[list[Path], list[SetAside]]:
    tars: list[Path] = []
    unread: list[SetAside] = []

    def closed(error: OSError) -> None:
        unread.append(SetAside(str(error.filename), f"a folder that can't be read ({error.strerror})"))

    for folder, folders, names in os.walk(root, onerror=closed):
        if os.path.realpath(folder) == os.path.realpath(out):
            folders.clear()
            continue
        for name in folders:
            path = os.path.join(folder, name)
            if os.path.islink(path):  # it may lead back here, or to the same tars
                unread.append(SetAside(path, "a link to a folder; give that folder itself"))
        tars += [Path(folder) / name for name in names if name.endswith(TAR_SUFFIXES) and name[0] != "."]
    return tars, sorted(unread, key=lambda item: item.file)


def _matches(pattern: str) -> list[Path]:
    from braceexpand import braceexpand

    too_many = f"{pattern} stands for more than {_MAX_PATTERN} files; give a folder, or several patterns"
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern):  # braceexpand makes a list of each first
        if max(len(first), len(last)) > _MAX_DIGITS or abs(int(last) - int(first)) >= _MAX_PATTERN:
            raise UserError(too_many)
    try:
        names = list(itertools.islice(braceexpand(pattern), _MAX_PATTERN + 1))
    except ValueError:  # unbalanced braces
        names = [pattern]
    if len(names) > _MAX_PATTERN:
        raise UserError(too_many)
    found: list[Path] = []
    for name in names:
        matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        if not matches or not Path(matches[0]).exists():
            raise UserError(f"no file {name}; give a folder, a tar, or a pattern such as 'data/{{000..099}}.tar'")
        found += map(Path, matches)
    return found


def tar_names(tars: list[Path]) -> list[str]:
    """What keys of each tar begin with: its path without suffix, relative to the folder that all share."""
    common = os.path.commonpath([os.path.realpath(tar.parent) for tar in tars])
    names = [Path(os.path.relpath(os.path.realpath(tar.parent), common)) / tar.name for tar in tars]
    return [tar_stem(name.as_posix()) for name in names]


def _tar(path: Path, name: str, picture: str | None, failed: Counter[str]) -> Iterator[Found | SetAside]:
    """The samples of one tar, joined with img2dataset's rows of them."""
    rows: dict[str, dict[str, Any]] | None = None
    table = path.with_name(tar_stem(path.name) + ".parquet")
    if table.is_file():
        try:
            rows = _rows(table, failed)
        except Exception as error:  # pyarrow has an error of its own for each layer
            yield SetAside(table.name, f"can't be read ({first_line(error)}); the samples' own records were used")
    seen: set[str] = set()  # in a tar that was appended to, a key may come back, and would end up in another shard
    for item in iter_tar(path):
        if not isinstance(item, TarSample):
            if rows is not None and item.key is not None:
                rows.pop(item.key, None)
            yield SetAside(item.where, item.reason)
            continue
        where = f"{path.name}: {printable(item.key)}"
        if item.key in seen:
            yield SetAside(where, "the key was there before; keys must differ")
            continue
        seen.add(item.key)
        row: dict[str, Any] | None = {}
        if rows is not None and (row := rows.pop(item.key, None)) is None:
            yield SetAside(where, f"no such key in {table.name}, or no success there")
            continue
        yield _sample(where, safe_key(name, item.key), item.members, row or {}, picture)
    for key in rows or ():
        yield SetAside(f"{path.name}: {printable(key)}", f"a success in {table.name}, but not in the tar")


def _rows(table: Path, failed: Counter[str]) -> dict[str, dict[str, Any]] | None:
    """Rows that say success, by key; None for a parquet that isn't img2dataset's. Others are counted by error."""
    from pyarrow import parquet

    rows = {}
    with parquet.ParquetFile(table, page_checksum_verification=True) as file:
        if not {"key", "status"} <= set(file.schema_arrow.names):
            return None
        counts: Counter[str] = Counter()
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                if row["status"] == "success":
                    rows[str(row["key"])] = row
                else:
                    counts[str(row["status"])] += 1
    failed += counts
    return rows


def _sample(
    where: str, key: str, members: dict[str, bytes], row: dict[str, Any], picture: str | None
) -> Found | SetAside:
    members = dict(members)
    if picture is not None:
        chosen = [picture] if picture in members else []
    else:
        chosen = [name for name in IMAGE_MEMBERS if name in members]
        chosen = chosen or [name for name in _OTHER_PICTURES if name in members]
    if not chosen:
        has = printable(", ".join(sorted(members)))
        return SetAside(where, f"no {picture or 'picture'}" + (f" (members: {has})" if has else ""))
    if len(chosen) > 1:
        return SetAside(where, f"several pictures ({', '.join(chosen)}); give --picture")
    data = members.pop(chosen[0])
    record: Any = {}
    if (text := members.pop("json", None)) is not None:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            return SetAside(where, f"json is not JSON ({error})")
        if not isinstance(record, dict):
            return SetAside(where, "json is no object")
    row = {**row, **{name: value for name, value in record.items() if value is not None}}
    captions = captions_of(caption_fields(row))
    texts = [members.pop(name) for name in _TEXTS if name in members]
    if not captions:
        try:
            captions = captions_of(map(text_of, texts))
        except ValueError as error:
            return SetAside(where, f"its caption, {error}")
    labels = labels_of(row, _NOT_LABELS)
    if (label := members.pop("cls", None)) is not None and "class" not in labels:
        labels["class"] = number_or_text(label.decode("utf-8", "replace").strip())
    size = row.get("original_size") or [row.get("original_height"), row.get("original_width")]
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        labels["original_size"] = size
    if isinstance(row.get("crop"), list):
        labels["crop"] = row["crop"]
    extra: dict[str, bytes] = {}
    for name, content in members.items():
        safe = member_name(name)
        if safe in extra:
            return SetAside(where, f"two members have the name {safe}")
        extra[safe] = content
    return Found(key, where, data, {"captions": captions, **labels}, extra)


def member_name(name: str) -> str:
    """A name that shards can hold: lower-case words joined by dots, and none that means the picture."""
    words = [re.sub(r"[^a-z0-9_-]", "-", word) for word in name.lower().split(".") if word]
    safe = ".".join(words) or "member"
    return f"other.{safe}" if safe in (*IMAGE_MEMBERS, "json") else safe
