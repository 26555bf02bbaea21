"""Make image shards from a Hugging Face data set: on this machine or on the hub.

SOURCE is a .parquet or .arrow file, a folder (of parquet or arrow files, of pictures with metadata, or one that
`save_to_disk` wrote), or the name of a data set on the hub. The pictures stand in the column of images, or the one
that --image-column names, which may also hold plain bytes, or paths relative to the folder. Captions are in columns
called captions, caption or text, or those named by --caption-column. Columns of texts, numbers and lists of them
become labels; a class becomes its number, and its name beside it as COLUMN_name.

Rows are streamed: nothing is downloaded or converted beforehand, unless --no-streaming asks for it. Pictures keep
their bytes unless --size or --format is given; what can't be used is listed in SHARDS/rejects.jsonl.

examples:
  data-tools ingest hf lambdalabs/naruto-blip-captions --out shards/naruto
  data-tools ingest hf exports/cats.parquet --image-column img --caption-column title --out shards/cats
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from data_tools.texts import printable
from finetune import UserError
from finetune.terminal import nonempty

_PATH_COLUMNS = ("image", "image_path", "img", "img_path", "file_name", "filename", "file", "file_path", "path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools ingest hf`."""
    parser.add_argument("source", type=nonempty, metavar="SOURCE", help="file, folder, or name on the hub")
    parser.add_argument("--config", metavar="NAME", help="configuration, where the data set has several")
    parser.add_argument("--split", metavar="NAME", help="default: train, or the only one there is")
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch on the hub")
    parser.add_argument("--image-column", metavar="NAME", help="column of the pictures")
    add_caption_argument(parser)
    parser.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read rows as they come, or first all of them into the cache of `datasets` (default: streaming)",
    )
    add_picture_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools ingest hf`."""
    options = Options.from_args(args)
    opened = _open(args.source, args.config, args.split, args.revision, args.streaming)
    plan = _Plan.choose(opened.data.features, args.image_column, args.caption_column)
    origin = None
    if opened.root is None:
        what = {"dataset": args.source, "config": args.config, "split": opened.split, **opened.card}
        origin = (json.dumps(what, indent=2, ensure_ascii=False) + "\n").encode()
    if plan.left_out:
        print(f"columns left out: {', '.join(plan.left_out)}")
    with downloads(_pictures(opened, plan), Limits()) as items:
        return ingest(
            args,
            options,
            items,
            source=args.source,
            paths=[Path(args.source)] if Path(args.source).exists() else [],
            total=opened.rows,
            origin=origin,
        )


# --- the data set


@dataclass(frozen=True)
class _Opened:
    data: Any  # datasets.Dataset or IterableDataset
    split: str
    rows: int | None
    root: Path | None  # folder that paths are relative to; None for a data set of the hub
    card: dict[str, Any]  # commit and licence of a data set of the hub


def _open(source: str, config: str | None, split: str | None, revision: str | None, streaming: bool) -> _Opened:
    """Find the data set, without reading its rows.

    Raises:
        UserError: there is none, or several splits and none is named.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs of an error comes as an exception too
    path = Path(source)
    card: dict[str, Any] = {}
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    try:
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            split = _choose_split(source, split, splits)
            data = datasets.load_from_disk(str(path / split))
        elif path.is_dir() and (path / "state.json").is_file():
            data = datasets.load_from_disk(str(path))
            split = _choose_split(source, split, [str(data.split or "train")])
        elif path.is_file():
            kind = path.suffix.lower().removeprefix(".")
            if kind not in ("parquet", "arrow"):
                raise UserError(
                    f"{source} is no .parquet or .arrow file; `ingest table` and `ingest tars` take others"
                )
            data, split = _load(datasets, source, split, streaming, path=kind, data_files=str(path))
        elif path.is_dir():
            data, split = _load(datasets, source, split, streaming, path=str(path), name=config)
        elif looks_local or path.suffix in (".parquet", ".arrow"):
            raise UserError(f"no file or folder {source}; give one, or the name of a data set on the hub")
        else:
            card = _card(source, revision)
            revision = card["revision"]
            data, split = _load(datasets, source, split, streaming, path=source, name=config, revision=revision)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # of `datasets`, the hub's client, pyarrow, fsspec, ...
        raise UserError(f"cannot open the data set {source} ({_line(error)})") from None
    if data.features is None:
        data = data._resolve_features()
    rows = getattr(data, "num_rows", None)
    if rows is None and data.info.splits and split in data.info.splits:
        rows = data.info.splits[split].num_examples or None
    root = None
    if path.exists():
        root = path if path.is_dir() else path.parent
    return _Opened(data, split, rows, root, card)


def _card(source: str, revision: str | None) -> dict[str, Any]:
    """The commit that a revision names on the hub, so that all is read from one; and the licence on the card."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().dataset_info(source, revision=revision, timeout=30)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):  # `datasets` may have it in its cache, or says why not
        return {"revision": revision, "license": None}
    return {"revision": info.sha or revision, "license": getattr(info.card_data, "license", None)}


def _load(datasets: Any, source: str, split: str | None, streaming: bool, **what: Any) -> tuple[Any, str]:
    every = datasets.load_dataset(streaming=streaming, **what)
    chosen = _choose_split(source, split, list(every))
    return every[chosen], chosen


def _choose_split(source: str, asked: str | None, splits: list[str]) -> str:
    if asked is None and (len(splits) == 1 or "train" in splits):
        return splits[0] if len(splits) == 1 else "train"
    if asked in splits:
        return str(asked)
    what = "several splits" if asked is None else f"no split {asked}"
    raise UserError(f"{source} has {what}; give --split with one of {', '.join(splits)}")


def _line(error: Exception) -> str:
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0][:300]}"


# --- its columns


@dataclass(frozen=True)
class _Plan:
    """Which column is what."""

    image: str
    captions: list[str]
    labels: list[str]
    classes: dict[str, list[str]]  # the names of the classes of columns that have such
    left_out: list[str]
    cast: bool  # the images would come decoded

    @classmethod
    def choose(cls, features: Any, image: str | None, captions: list[str]) -> _Plan:
        """From the arguments, or else by the columns' types and names.

        Raises:
            UserError: no such column, none that can be meant, or several.
        """
        import datasets

        columns = list(features)
        texts = [name for name in columns if _dtype(features[name]) in ("string", "large_string")]
        if image is None:
            blobs = [name for name in columns if _is_blob(features[name])]
            binary = [name for name in columns if _dtype(features[name]) in ("binary", "large_binary")]
            paths = named((name for name in texts if not isinstance(features[name], datasets.List)), _PATH_COLUMNS)
            image = choose_column("--image-column", "pictures", columns, blobs or binary or paths)
            if image is None:
                raise UserError(f"no column has pictures; give --image-column (columns: {', '.join(columns)})")
        else:
            check_columns("--image-column", [image], columns)
        captions = caption_columns(captions, columns, texts)
        rest = [name for name in columns if name != image and name not in captions]
        labels = [name for name in rest if name not in RESERVED and _holds_values(features[name])]
        classes = {name: features[name].names for name in labels if isinstance(features[name], datasets.ClassLabel)}
        left_out = [name for name in rest if name not in labels]
        return cls(image, captions, labels, classes, left_out, isinstance(features[image], datasets.Image))


def _is_blob(feature: Any) -> bool:
    """An image column, also one that was written without saying so: {"bytes", "path"}."""
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _dtype(feature: Any) -> str:
    """The type of a column's values, or of the items of its lists."""
    import datasets

    while isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    return feature.dtype if isinstance(feature, datasets.Value) else ""


def _holds_values(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        return all(map(_holds_values, feature.values()))
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _holds_values(feature.feature)
    if isinstance(feature, datasets.Value):
        return "binary" not in feature.dtype
    return isinstance(feature, datasets.ClassLabel)


# --- its rows


def _pictures(opened: _Opened, plan: _Plan) -> Iterator[Found | SetAside | Wanted]:
    for number, row in enumerate(_rows(opened, plan)):
        image = row.pop(plan.image)
        captions = captions_of(row.pop(column) for column in plan.captions)
        labels = labels_of(row)
        for name, names in plan.classes.items():
            value = labels.pop(name, None)
            if isinstance(value, int) and 0 <= value < len(names):  # -1: not known
                labels |= {name: value, f"{name}_name": names[value]}
        record = {"captions": captions, **labels}
        yield _picture(f"{number:09d}", f"row {number}", image, record, opened.root)


def _rows(opened: _Opened, plan: _Plan) -> Iterator[dict[str, Any]]:
    import datasets

    data = opened.data.select_columns([plan.image, *plan.captions, *plan.labels])
    if plan.cast:
        data = data.cast_column(plan.image, datasets.Image(decode=False))  # the bytes as they are
    number = 0
    try:
        rows: Iterable[dict[str, Any]] = data.with_format(None)
        for row in rows:
            yield dict(row)
            number += 1
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise UserError(
            f"the data set can't be read at row {number} ({_line(error)}); mend it or try again"
        ) from None


def _picture(
    key: str, where: str, image: Any, record: dict[str, Any], root: Path | None
) -> Found | SetAside | Wanted:
    data, place = image, None
    if isinstance(image, dict):
        data, place = image.get("bytes"), image.get("path")
    if isinstance(data, str):
        data, place = None, data
    if isinstance(place, str) and place:
        where = f"{where} ({printable(place)})"
    if data is not None:
        return Found(key, where, bytes(data), record)
    if not isinstance(place, str) or not place:
        return SetAside(where, "no picture")
    if "::" in place:
        return SetAside(where, "a picture inside of an archive; take --no-streaming")
    if "://" in place:
        return Wanted(key, where, place, record)
    path = Path(place)
    if root is None:  # a row from the hub may name no file of this machine but those that came from there
        import datasets

        if not path.resolve().is_relative_to(Path(datasets.config.HF_CACHE_HOME).resolve()):
            return SetAside(where, "a path on the machine where the data set was made")
        return Found(key, where, path, record)
    return Found(key, where, root / path, record)
