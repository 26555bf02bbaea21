"""Make image shards from a table of paths or URLs, and captions.

TABLE is a .csv, .tsv, .jsonl (any of them .gz) or .parquet file, or a folder of such files of one kind; several may
be given. One column says where each picture is: a path, relative to the table's folder, or a URL (http, https, s3,
gs, az, hf; file: URLs are refused). It is found by its name (url, image_url, path, file_name, ...) or named by
--url-column or --path-column; captions are in columns called captions, caption or text, or those named by
--caption-column. Every other column becomes a label; in text files a cell like 5 or 0.25 becomes a number.

Pictures are downloaded --downloads at a time; connection errors, stalls, HTTP 429 and 5xx are tried again. What
fails is listed in SHARDS/rejects.jsonl with its reason, and the rest goes on. Servers that answer
`X-Robots-Tag: noai` are heeded. For hundreds of millions of URLs img2dataset is the better tool, as it can be
stopped and go on; `ingest tars` takes what it leaves.

examples:
  data-tools ingest table pictures.csv --out shards/pictures
  data-tools ingest table laion/*.parquet --url-column URL --caption-column TEXT --downloads 128 --out shards/laion
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_tools.fetch import Limits
from data_tools.ingest.items import Found, SetAside, Wanted, downloads
from data_tools.ingest.options import Options, add_picture_arguments
from data_tools.ingest.records import (
    RESERVED,
    add_caption_argument,
    caption_columns,
    captions_of,
    check_columns,
    choose_column,
    labels_of,
    named,
)
from data_tools.ingest.shards import ingest
from data_tools.texts import MAX_LINE, csv_rows, number_or_text, printable
from finetune import UserError, first_line
from finetune.terminal import positive

URL_COLUMNS = ("url", "urls", "image_url", "img_url", "image_link", "link")
PATH_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "file_path",
    "filepath",
    "path",
    "image",
    "image_path",
    "img",
    "img_path",
)
_KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
_LOOK = 100  # lines of a .jsonl that are looked at for its columns
_BATCH = 1024
_BROKEN = (OSError, EOFError, zlib.error)  # what unpacking ends in, too

Row = tuple[str, "dict[str, Any] | str"]
"""Where it stands, and its cells, or why it can't be used."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools ingest table`."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="TABLE", help="table, or folder of tables")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url-column", metavar="NAME", help="column of URLs")
    where.add_argument("--path-column", metavar="NAME", help="column of paths")
    add_caption_argument(parser)
    add_picture_arguments(parser)
    limits = Limits()
    group = parser.add_argument_group("downloads")
    group.add_argument(
        "--downloads", type=positive, default=limits.threads, metavar="N", help="at a time (default: %(default)s)"
    )
    group.add_argument(
        "--timeout",
        type=positive,
        default=round(limits.stall_s),
        metavar="S",
        help="seconds without a byte after which a download failed (default: %(default)s)",
    )
    group.add_argument(
        "--tries", type=positive, default=limits.tries, metavar="N", help="for each picture (default: %(default)s)"
    )
    group.add_argument(
        "--max-bytes",
        type=positive,
        default=limits.max_bytes,
        metavar="N",
        help="largest download (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run `data-tools ingest table`."""
    options = Options.from_args(args)
    tables = find_tables(args.sources)
    columns = tables[0].columns
    for table in tables[1:]:
        columns = [column for column in columns if column in table.columns]
    plan = _Plan.choose(columns, args.url_column, args.path_column, args.caption_column)
    limits = Limits(args.downloads, float(args.timeout), 30.0 * args.timeout, args.tries, args.max_bytes)
    if left_out := [name for name in columns if name in RESERVED and name not in (plan.place, *plan.captions)]:
        print(f"columns left out: {', '.join(left_out)}")
    known = [table.rows for table in tables if table.rows is not None]
    total = sum(known) if len(known) == len(tables) else None
    with downloads(_pictures(tables, plan), limits) as items:
        source = ", ".join(map(str, args.sources))
        return ingest(args, options, items, source=source, paths=args.sources, total=total)


@dataclass(frozen=True)
class _Plan:
    """Which column is what."""

    place: str
    is_url: bool | None  # None: what each cell looks like
    captions: list[str]

    @classmethod
    def choose(cls, columns: list[str], url: str | None, path: str | None, captions: list[str]) -> _Plan:
        """From the arguments, or else by the columns' names.

        Raises:
            UserError: no such column, none that can be meant, or several.
        """
        captions = caption_columns(captions, columns, columns)
        if url is not None:
            check_columns("--url-column", [url], columns)
            return cls(url, True, captions)
        if path is not None:
            check_columns("--path-column", [path], columns)
            return cls(path, False, captions)
        flags = "--url-column or --path-column"
        place = choose_column(flags, "pictures' places", columns, named(columns, (*URL_COLUMNS, *PATH_COLUMNS)))
        if place is None:
            raise UserError(f"no column has a known name; give {flags} (columns: {', '.join(columns)})")
        return cls(place, None, captions)


def _pictures(tables: list[Table], plan: _Plan) -> Iterator[Wanted | Found | SetAside]:
    number = -1
    for table in tables:
        folder = table.path.parent
        for where, row in table:
            number += 1
            if isinstance(row, str):
                yield SetAside(where, row)
                continue
            place = row.pop(plan.place, None)
            if not isinstance(place, str) or not place.strip():
                yield SetAside(where, f"no {plan.place}")
                continue
            place = place.strip()
            captions = captions_of(_listed(row.pop(column, None)) for column in plan.captions)
            if table.texts:
                row = {name: number_or_text(cell) for name, cell in row.items() if cell != ""}
            labels = labels_of(row)
            key, shown = f"{number:09d}", f"{printable(place)} ({where})"
            if "://" in place:
                if plan.is_url is False:
                    yield SetAside(shown, "a URL, not a path; name its column by --url-column")
                else:
                    yield Wanted(key, shown, place, {"captions": captions, **labels, "url": place})
            elif plan.is_url:
                yield SetAside(shown, "not a URL")
            else:
                yield Found(key, shown, folder / place, {"captions": captions, "file": place, **labels})


def _listed(cell: Any) -> Any:
    """A cell of a text file may hold several captions as a JSON list."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            parsed = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        return parsed if isinstance(parsed, list) else cell
    return cell


# --- tables


@dataclass(frozen=True)
class Table:
    """A file of rows. `texts`: its cells are texts, whatever they mean. `rows` is None where it isn't stated."""

    path: Path
    columns: list[str]
    texts: bool
    rows: int | None
    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def find_tables(sources: Iterable[Path]) -> list[Table]:
    """The tables that the sources name; those of a folder in the order of their names.

    Raises:
        UserError: there are none, or of several kinds in a folder, or one is broken from its start.
    """
    tables = []
    for source in sources:
        paths = [source]
        if source.is_dir():
            paths = sorted(path for path in source.iterdir() if _kind(path) and not path.name.startswith("."))
            kinds = sorted({_kind(path) for path in paths})
            if len(kinds) != 1:
                what = f"tables of several kinds ({', '.join(kinds)})" if kinds else "no tables"
                raise UserError(f"{what} in {source}; give the files themselves")
        elif not source.is_file():
            raise UserError(f"no file {source}; give a table ({', '.join(_KINDS)}) or a folder of tables")
        tables += [open_table(path) for path in paths]
    return tables


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            return ""
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else ""


def open_table(path: Path) -> Table:
    """Look at a table's columns.

    Raises:
        UserError: no table, or one without columns.
    """
    try:
        match _kind(path):
            case ".parquet":
                return _open_parquet(path)
            case ".jsonl":
                columns = list(
                    dict.fromkeys(
                        name
                        for _, (_, row) in zip(range(_LOOK), _jsonl(path), strict=False)
                        for name in _names(row)
                    )
                )
                table = Table(path, columns, False, None, functools.partial(_jsonl, path))
            case ".csv" | ".tsv":
                with _text(path) as file:
                    columns, delimiter = _header(path, file)
                table = Table(path, columns, True, None, functools.partial(_csv, path, columns, delimiter))
            case _:
                raise UserError(f"{path} is no table that can be read; give a file of {', '.join(_KINDS)}")
    except _BROKEN as error:
        raise UserError(f"cannot read {path} ({error})") from None
    if not table.columns:
        raise UserError(f"{path} has no columns; its first line names them, or each line is a JSON object")
    return table


def _names(row: dict[str, Any] | str) -> Iterable[str]:
    return row if isinstance(row, dict) else ()


def _text(path: Path) -> IO[str]:
    """A text file, unpacked if need be. Bytes that aren't UTF-8 are kept as surrogates, to be told."""
    raw: Any = gzip.GzipFile(path) if path.suffix.lower() == ".gz" else path.open("rb")
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
    if raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16; convert it, as by `iconv -f utf-16 -t utf-8`")
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _header(path: Path, file: IO[str]) -> tuple[list[str], str]:
    """The columns of a CSV file, and what stands between its cells."""
    line = file.readline(MAX_LINE)
    if not _encodable(line) or "\0" in line:
        raise UserError(f"{path}, line 1 is not UTF-8; is it a table? Convert it, as by `iconv -f latin1 -t utf-8`")
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    if delimiter == "," and "," not in line:
        delimiter = max(";\t,", key=line.count)
    cells = next((cells for _, cells in csv_rows([line], delimiter)), [])
    if isinstance(cells, str) or len(line) == MAX_LINE:
        raise UserError(f"{path}, line 1 names no columns; is it a table?")
    columns = [name.strip() for name in cells]
    repeated = [name for name in columns if columns.count(name) > 1]
    if repeated:
        raise UserError(f"{path} has several columns {repeated[0]!r}; give each a name of its own")
    return columns, delimiter


def _csv(path: Path, columns: list[str], delimiter: str) -> Iterator[Row]:
    try:
        with _text(path) as file:
            for number, cells in csv_rows(_lines(path, file), delimiter):
                where = f"{path.name}, line {number}"
                if isinstance(cells, str):
                    yield where, cells
                elif number == 1:
                    continue
                elif len(cells) != len(columns):
                    yield where, f"{len(cells)} cells, the header has {len(columns)}"
                elif not all(map(_encodable, cells)):
                    yield where, "not UTF-8"
                else:
                    yield where, dict(zip(columns, cells, strict=True))
    except _BROKEN as error:
        raise UserError(f"{path} can't be read to its end ({error})") from None


def _lines(path: Path, file: IO[str]) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise UserError(f"{path}, line {number} has more than {MAX_LINE} characters")
        yield line


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        with _text(path) as file:
            for number, line in enumerate(_lines(path, file), start=1):
                where = f"{path.name}, line {number}"
                if not line.strip():
                    continue
                if not _encodable(line):
                    yield where, "not UTF-8"
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield where, f"not JSON ({error})"
                    continue
                yield where, row if isinstance(row, dict) else "not an object"
    except _BROKEN as error:
        raise UserError(f"{path} can't be read to its end ({error})") from None


def _open_parquet(path: Path) -> Table:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file ({str(error).partition(chr(10))[0]})") from None
    columns = [field.name for field in schema if _holds_values(field.type)]
    left_out = [field.name for field in schema if not _holds_values(field.type)]
    if not columns:
        hint = " (are the pictures in the file? `data-tools ingest hf` reads those)" if left_out else ""
        raise UserError(f"{path} has no columns of texts or numbers{hint}")
    return Table(path, columns, False, rows, functools.partial(_parquet, path, columns))


def _holds_values(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_values(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_values(kind.value_type)
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_temporal(kind)
    )


def _parquet(path: Path, columns: list[str]) -> Iterator[Row]:
    """Rows in batches, out of one row group at a time: memory is that of a row group."""
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:  # where it has any
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path.name}, row {number}", row
    except (ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        what = first_line(error)
        raise UserError(f"{path} can't be read after row {number} ({what}); mend it or leave it out") from None
