"""What every source shares: arguments, the form of a record, and the way from a found picture into the shards.

A source is an iterator of `Found` (a picture somewhere, with what is known of it) and `SetAside` (why there is
none). `ingest` takes it from there: worker processes read, filter and check pictures a bounded number ahead, and
one process writes them in the source's order. So memory doesn't grow with the source, and the same source gives the
same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import math
import re
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.arguments import add_shard_arguments, add_workers_argument, default_workers, probability, side
from data_tools.fetch import Fetcher, FetchError, Limits
from data_tools.filters import Filters, add_filter_arguments
from data_tools.images import encode_image, parse_colour
from data_tools.labels import LEAST_OF_A_BOX, RESAMPLING, LabelFile, cut_boxes, grey_bytes, read_map, read_mask
from data_tools.output import SOURCE, claimed_folder, refuse_sources
from data_tools.pictures import CAPTION_COLUMNS, whole_numbers
from data_tools.rejects import Rejects
from data_tools.tars import printable, sound_json, sound_text
from data_tools.workers import CrashError, Workers
from finetune import UserError, is_of_machine
from finetune.data.shards import (
    MAP,
    MASK,
    Bucket,
    Manifest,
    ShardError,
    ShardWriter,
    json_bytes,
    parse_boxes,
    write_atomic,
    write_classes,
)
from finetune.data.shards.files import naming
from finetune.data.shards.images import MAX_PIXELS, PictureError, cut_out, decode_rgb, picture_format
from finetune.data.shards.labels import png_header
from finetune.terminal import positive

RESERVED = ("captions", "file", "original_size", "crop")
FORMATS = ("keep", "png", "webp", "jpg")
MAX_FILE_BYTES = 512 << 20
MAX_LINE = 16 << 20  # characters of a table's line, and of its cell
_FEW, _FEW_BYTES = 64, 64 << 20  # a source of no more than this isn't worth the start of workers
_REASONS_SHOWN = 10
_MAX_OTHERS = 64  # kinds of optional members: an index has a column for each
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d{1,17})?([eE][+-]?\d{1,3})?")


@dataclass(frozen=True)
class Found:
    """A picture of a source."""

    key: str  # of the sample in the shards
    file: str  # what to call it in rejects.jsonl
    data: bytes | Path  # its bytes, or the file that a worker will read
    record: Mapping[str, Any]  # captions, then any labels
    extra: Mapping[str, bytes] = field(default_factory=dict)  # optional members, carried as they are but for maps
    temporary: bool = False  # the file is ours, and deleted once it has been read
    labels: LabelFile | None = None  # its label map
    mask: Path | None = None  # its loss mask
    size: tuple[int, int] | None = None  # upright (height, width) that boxes and maps are for, where they say so


@dataclass(frozen=True)
class SetAside:
    """What can't be used: where it is in the source, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Wanted:
    """A picture of a source that must be downloaded first."""

    key: str
    file: str
    url: str
    record: Mapping[str, Any]


@contextlib.contextmanager
def downloads(
    items: Iterable[Found | SetAside | Wanted], limits: Limits
) -> Generator[Iterable[Found | SetAside], None, None]:
    """The items with their downloads, in the same order; large ones are kept in a folder that goes in the end."""
    with (
        tempfile.TemporaryDirectory(prefix="data-tools-") as folder,
        Fetcher(limits, Path(folder)) as fetcher,
        contextlib.closing(
            fetcher.map(items, lambda item: item.url if isinstance(item, Wanted) else None)
        ) as pairs,
    ):
        yield itertools.starmap(_downloaded, pairs)


def _downloaded(item: Found | SetAside | Wanted, result: bytes | Path | FetchError | None) -> Found | SetAside:
    if not isinstance(item, Wanted):
        return item
    if isinstance(result, FetchError):
        return SetAside(item.file, str(result))
    assert result is not None
    return Found(item.key, item.file, result, item.record, temporary=isinstance(result, Path))


# --- arguments


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """--size, the filters, --workers, and those of `add_output_arguments`."""
    parser.add_argument(
        "--size", type=side, metavar="N", help="resize the short side to N pixels and crop the centre"
    )
    add_output_arguments(parser, FORMATS, "default: keep the original bytes; png with --size")
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        metavar="N",
        help=f"set larger pictures aside, but for JPEGs, read at a reduced scale then (default: {MAX_PIXELS})",
    )
    parser.add_argument(
        "--min-box",
        type=probability,
        default=LEAST_OF_A_BOX,
        metavar="SHARE",
        help=f"leave out boxes of which less is left by --size (default: {LEAST_OF_A_BOX})",
    )
    add_workers_argument(parser)
    add_filter_arguments(parser)


def add_caption_argument(parser: argparse.ArgumentParser) -> None:
    """--caption-column."""
    parser.add_argument(
        "--caption-column",
        action="append",
        default=[],
        metavar="NAME",
        help="column of captions, a text or a list of texts; may be repeated",
    )


def add_output_arguments(parser: argparse.ArgumentParser, formats: tuple[str, ...], default: str) -> None:
    """--out, --format, --quality, and those of `add_shard_arguments`."""
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder for the image shards")
    parser.add_argument("--format", choices=formats, help=f"format of the pictures in the shards ({default})")
    parser.add_argument("--quality", type=int, default=95, help="of webp and jpg, 1 to 100 (default: 95)")
    add_shard_arguments(parser, "SHARDS")


def check_quality(quality: int) -> None:
    """Refuse a quality outside 1 to 100."""
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality} is outside 1 to 100")


# --- records


def clean_captions(captions: Iterable[Any]) -> list[str]:
    """Captions with their white space collapsed, without empty ones and repeats."""
    texts = (" ".join(sound_text(str(caption)).split()) for caption in captions if caption is not None)
    return list(dict.fromkeys(text for text in texts if text))


def captions_of(values: Iterable[Any]) -> list[str]:
    """The captions in some cells of a row: a text each, or a list of texts, or nothing.

    Numbers count as texts, but for those that aren't finite: pandas writes a missing text as NaN.
    """
    texts: list[Any] = []
    for value in values:
        texts += value if isinstance(value, list | tuple) else [value]
    return clean_captions(filter(_is_caption, texts))


def _is_caption(value: Any) -> bool:
    match value:
        case bool():
            return False
        case float():
            return math.isfinite(value)
    return isinstance(value, str | int)


def labels_of(row: Mapping[str, Any], leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a row that a record keeps: those with a name, and a value that JSON can hold."""
    left_out = {*RESERVED, *leave_out}
    labels = {sound_text(name): sound_json(value) for name, value in row.items() if name and name not in left_out}
    return {name: value for name, value in labels.items() if value is not None}


def number_or_text(cell: str) -> int | float | str:
    """A cell of a text table: the number that it writes, or itself. "007" and "1,5" are no numbers."""
    if _NUMBER.fullmatch(cell):
        value = float(cell)
        if math.isfinite(value):
            return int(cell) if cell.lstrip("-").isdigit() else value
    return cell


def csv_rows(lines: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, list[str] | str]]:
    """The rows of a CSV text, the header too: the line that each begins in, and its cells or why it has none."""
    limit = csv.field_size_limit(MAX_LINE)
    try:
        # Strict: else a quote that is never closed makes one cell of all that follows.
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, f"not CSV ({error})"
                continue
            if cells:  # or else a blank line
                yield number, cells
    finally:
        csv.field_size_limit(limit)


def choose_column(flag: str, what: str, columns: Iterable[str], candidates: Iterable[str]) -> str | None:
    """The one column that can be meant, or None if there is none.

    Raises:
        UserError: there are several; names them, and the flag that decides.
    """
    found = list(dict.fromkeys(candidates))
    if len(found) > 1:
        listed = ", ".join(columns)
        raise UserError(f"{' and '.join(found)} may hold the {what}; give {flag} (columns: {listed})")
    return found[0] if found else None


def check_columns(flag: str, names: Iterable[str], columns: Iterable[str]) -> None:
    """Refuse names that are no columns."""
    known = list(columns)
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: no such column (columns: {', '.join(known)})")


def named(columns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The columns that have one of the names, in any case."""
    known = set(names)
    return [column for column in columns if column.strip().lower() in known]


def caption_columns(asked: list[str], columns: list[str], texts: list[str]) -> list[str]:
    """The columns of --caption-column, or the one column of texts whose name says that it has captions.

    Raises:
        UserError: no such column, or several that may be meant.
    """
    if asked:
        check_columns("--caption-column", asked, columns)
        return asked
    found = choose_column("--caption-column", "captions", columns, named(texts, CAPTION_COLUMNS))
    if found is None:
        print(
            f"note: no captions are taken; name their column with --caption-column (columns: {', '.join(columns)})"
        )
        return []
    return [found]


# --- pictures to shards


@dataclass(frozen=True)
class Options:
    """What is done with each picture."""

    member: str  # format in the shards, or "keep"
    size: int | None
    quality: int
    background: tuple[int, int, int]
    max_pixels: int
    filters: Filters
    min_box: float = LEAST_OF_A_BOX
    classes: int | None = None  # how many have names; None: nothing is known of them

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """From the arguments of `add_picture_arguments`.

        Raises:
            UserError: a value that is out of range, or contradicts another.
        """
        check_quality(args.quality)
        background = parse_colour(args.background)
        if args.size and args.format == "keep":
            raise UserError("--format keep and --size contradict each other; give --format png, webp or jpg")
        member = args.format or ("png" if args.size else "keep")
        filters = Filters.from_args(args)
        return cls(member, args.size, args.quality, background, args.max_pixels, filters, args.min_box)


@dataclass(frozen=True)
class _Filtered:
    reason: str


@dataclass(frozen=True)
class _Prepared:
    member: str
    data: bytes | None  # None: the bytes that came in
    record: dict[str, Any]
    bucket: Bucket  # (height, width) of the picture in the shards
    extra: dict[str, bytes] = field(default_factory=dict)  # map and mask as they will be, or under another name
    boxes_lost: int = 0
    odd: str | None = None  # why a map or mask has got another name


def prepare(item: Found | SetAside, options: Options) -> SetAside | _Filtered | _Prepared:
    """Read, filter and check one picture, in a worker process. It is always decoded: damage is found here.

    Raises:
        PictureError: it can't be used.
    """
    if isinstance(item, SetAside):
        return item
    if sound_text(file := str(item.record.get("file", ""))) != file:  # bytes that the locale can't read
        raise PictureError(
            f"its name is not {sys.getfilesystemencoding()}; rename it, or set a locale that reads it"
        )
    data = read_file(item.data) if isinstance(item.data, Path) else item.data
    kept, (height, width) = picture_format(data)
    if (reason := options.filters.reason(item.record, height, width)) is not None:
        return _Filtered(reason)
    if item.size is not None and item.size != (height, width):
        raise PictureError(f"{height}x{width} pixels, its annotations are for {item.size[0]}x{item.size[1]}")
    _check_classes(item.record, options.classes)
    size = options.size
    image = decode_rgb(
        data,
        options.background,
        max_pixels=options.max_pixels,
        at_least=(size, size) if size else None,
    )
    record = dict(item.record)
    # A source that resized its pictures may know their first size, and what it cropped.
    original = whole_numbers(record.pop("original_size", None), 2)
    before = whole_numbers(record.pop("crop", None), 4)
    own: dict[str, Any] = {"original_size": original or [height, width]}
    boxes_lost = 0
    changed = options.member != "keep" or kept is None
    member = kept or "png"
    if changed:
        member = options.member if options.member != "keep" else "png"
        if size:
            image, resized, crop = cut_out(image, (height, width), (size, size))
            if (boxes := parse_boxes(record.get("boxes"))) is not None:
                record["boxes"] = cut_boxes(boxes, resized, crop, least=options.min_box)
                boxes_lost = len(boxes) - len(record["boxes"])
            if before is not None:
                crop[0] += round(before[0] * resized[0] / height)
                crop[1] += round(before[1] * resized[1] / width)
            own["crop"] = crop
    if not size and before is not None:
        own["crop"] = before
    first: dict[str, Any] = {name: record.pop(name) for name in ("captions", "file") if name in record}
    bucket = (image.height, image.width) if changed else (height, width)
    if changed:
        data = encode_image(image, member, options.quality)
    extra, odd = _maps(item, (height, width), options)
    return _Prepared(
        member,
        data if changed or isinstance(item.data, Path) else None,
        {**first, **own, **record},
        bucket,
        extra,
        boxes_lost,
        odd,
    )


def _check_classes(record: Mapping[str, Any], classes: int | None) -> None:
    """Refuse classes without a name, where classes have names."""
    if classes is None:
        return
    label = record.get("class", 0)
    if type(label) is not int or not 0 <= label < classes:
        raise PictureError(f"its class is {label!r}, the classes are 0 to {classes - 1}")
    for box in parse_boxes(record.get("boxes")) or ():
        if box[0] >= classes:
            raise PictureError(f"a box has class {box[0]}, the classes are 0 to {classes - 1}")


def _maps(item: Found, size: tuple[int, int], options: Options) -> tuple[dict[str, bytes], str | None]:
    """The map and mask of a picture, cut as it is, and why one that came with it (in a tar) isn't taken for one.

    Raises:
        PictureError: of one that has a file of its own.
    """
    made: dict[str, bytes] = {}
    odd = None
    for name, path in ((MAP, item.labels.path if item.labels else None), (MASK, item.mask)):
        if path is not None:
            try:
                made[name] = _cut(name, read_file(path), size, options, item.labels if name == MAP else None)
            except PictureError as error:
                raise PictureError(f"{path}: {error}") from None
        elif (data := item.extra.get(name)) is not None:
            try:
                made[name] = _cut(name, data, size, options, None)
            except PictureError as error:  # others may mean something else by the name
                made[f"other.{name}"], odd = data, odd or str(error)
    return made, odd


def _cut(name: str, data: bytes, size: tuple[int, int], options: Options, file: LabelFile | None) -> bytes:
    image = read_map(data, size, file, options.classes) if name == MAP else read_mask(data, size)
    side = options.size
    if side:
        image, _, _ = cut_out(image, size, (side, side), resampling=RESAMPLING[name])
    as_it_is = not side and png_header(data) == (*size, 8, 0) and (file is None or file.labels is None)
    return data if as_it_is else grey_bytes(image)


def read_file(path: Path) -> bytes:
    """The bytes of a picture's file.

    Raises:
        PictureError: it is absent, no regular file, too large, or can't be read.
        OSError: the disk does not answer, or refuses.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            raise PictureError("not a file")
        if found.st_size > MAX_FILE_BYTES:
            raise PictureError(f"a file of {found.st_size} bytes, the limit is {MAX_FILE_BYTES}")
        with naming(path):
            return path.read_bytes()
    except FileNotFoundError:
        raise PictureError("no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if is_of_machine(error):
            raise
        raise PictureError((isinstance(error, OSError) and error.strerror) or str(error)) from None


def ingest(
    args: argparse.Namespace,
    options: Options,
    items: Iterable[Found | SetAside],
    *,
    source: str,
    paths: Iterable[Path],
    total: int | None = None,
    origin: bytes | None = None,
    classes: Sequence[str] = (),
) -> int:
    """Write a source's pictures into shards in `args.out`, and say what came of them.

    Args:
        source: what to call the source in messages.
        paths: its files and folders on this machine, which `args.out` must not be.
        total: pictures in the source, where it is known, for the progress bar.
        origin: content for SOURCE.json.
        classes: the names of classes, for classes.json; none where nothing is known of them.

    Raises:
        UserError: nothing is left, or a mistake found on the way.
    """
    refuse_sources(args.out, paths)
    if classes:
        options = replace(options, classes=len(classes))
    workers = default_workers() if args.workers is None else args.workers
    filtered: Counter[str] = Counter()
    samples = without_caption = carried = boxes_lost = odd = 0
    first_without = first_odd = ""
    sizes: set[Bucket] = set()
    others: set[str] = set()
    with claimed_folder(args.out, args.overwrite) as out:
        if origin is not None:
            write_atomic(out / SOURCE, origin)
        with (
            Rejects(out) as rejects,
            ShardWriter(out, "images", max_samples=args.shard_samples) as writer,
            tqdm(total=total, unit="picture", disable=None) as bar,
            contextlib.ExitStack() as stack,
        ):
            results = stack.enter_context(contextlib.closing(_in_workers(workers, options, items)))
            for item, result in results:
                bar.update()
                match result:
                    case SetAside(file, reason):
                        rejects.add(file, reason)
                    case PictureError() | CrashError():
                        rejects.add(item.file, str(result))
                    case _Filtered(reason):
                        filtered[reason] += 1
                    case _Prepared():
                        assert isinstance(item, Found)
                        members = _members(item, result)
                        more = members.keys() - {result.member, "json"}
                        if len(others | more) > _MAX_OTHERS:
                            what = f"more than {_MAX_OTHERS} kinds of members in the set; has its name dots in it?"
                            rejects.add(item.file, f"{what} ({printable(', '.join(sorted(more)))})")
                            continue
                        others |= more
                        try:
                            writer.write(item.key, members)
                        except ShardError as error:
                            rejects.add(item.file, str(error))
                            continue
                        samples += 1
                        carried += bool(more - {MAP, MASK})
                        boxes_lost += result.boxes_lost
                        if result.odd is not None:
                            first_odd = first_odd or f"{item.file}: {result.odd}"
                            odd += 1
                        if len(sizes) < 2:
                            sizes.add(result.bucket)
                        if not result.record.get("captions"):
                            first_without = first_without or item.file
                            without_caption += 1
                    case _:
                        raise AssertionError(f"an unforeseen result {result!r}")
            if filtered and not samples:
                what = f"; {len(rejects)} more can't be used" if rejects else ""
                raise UserError(f"the filters leave none of the pictures in {source} ({_counts(filtered)}){what}")
            rejects.require_some_left(samples, source)
            rejects.save()
            # Only now is it known whether all pictures share one size, which `encode` then takes as its own.
            uniform = sizes.pop() if len(sizes) == 1 else None
            shards = [replace(shard, bucket=uniform) for shard in writer.close()]
            names = write_classes(out, classes) if classes else None
            Manifest("images", writer.members, shards, classes=names).save(out)
    if odd:
        what = f"a {MAP} or {MASK} of another kind, kept with `other.` before its name"
        print(f"{odd} pictures have {what}; the first, {first_odd}")
    if boxes_lost:
        print(f"{boxes_lost} boxes left out: --size leaves less than {options.min_box:.0%} of each")
    if carried and options.size:
        print(f"{carried} pictures have other members, carried over as they are: --size is for the picture alone")
    if without_caption:
        print(f"{without_caption} pictures have no caption, the first is {first_without}")
    if filtered:
        print(f"{filtered.total()} pictures left out by filters: {_counts(filtered)}")
    print(f"{samples} pictures in {args.out}{rejects.summary()}")
    return 0


def _in_workers(
    workers: int, options: Options, items: Iterable[Found | SetAside]
) -> Generator[tuple[Found | SetAside, Any], None, None]:
    """(item, what `prepare` made of it, or its PictureError), in order; files that were ours are deleted."""
    source = iter(items)
    first: list[Found | SetAside] = []
    size = 0
    while len(first) < _FEW and size < _FEW_BYTES and (item := next(source, None)) is not None:
        first.append(item)
        size += len(item.data) if isinstance(item, Found) and isinstance(item.data, bytes) else 0
    few = len(first) < _FEW and size < _FEW_BYTES
    with Workers(0 if few else workers) as pool:
        function = partial(prepare, options=options)
        for item, result in pool.map(
            function, itertools.chain(first, source), catch=(PictureError, CrashError), name=lambda item: item.file
        ):
            if isinstance(item, Found) and item.temporary and isinstance(item.data, Path):
                item.data.unlink(missing_ok=True)
            yield item, result


def _members(item: Found, result: _Prepared) -> dict[str, bytes]:
    data = result.data
    if data is None:
        assert isinstance(item.data, bytes)
        data = item.data
    others = {name: content for name, content in item.extra.items() if name not in (MAP, MASK)}
    return {result.member: data, "json": json_bytes(result.record), **others, **result.extra}


def _counts(reasons: Counter[str]) -> str:
    """ "7 smaller than 512 px, 5 no caption", the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {reason}" for reason, count in ordered[:_REASONS_SHOWN]]
    if rest := sum(count for _, count in ordered[_REASONS_SHOWN:]):
        shown.append(f"{rest} for other reasons")
    return ", ".join(shown)
