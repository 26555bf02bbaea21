"""What a source gives: pictures, what can't be used, and pictures to be downloaded first."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.fetch import Fetcher, FetchError, Limits
from data_tools.labels import LabelFile


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
