"""The pictures that a list says to leave out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.output import DUPLICATES
from data_tools.pictures import PictureSource
from finetune import UserError

_DIGEST = 16  # bytes of a key that are kept: at 100 million pictures, no two keys are taken for one another


@dataclass(frozen=True)
class Excluded:
    """Keys to leave out, 16 bytes each. `sha256` is of the keys, whatever their order; empty without a list."""

    digests: np.ndarray
    sha256: str

    @classmethod
    def load(cls, source: PictureSource, listed: Path | None, keep_duplicates: bool) -> Excluded:
        """What `data-tools dedupe` wrote beside the shards, and the file of --exclude.

        Raises:
            UserError: a file is missing, or has a line that is neither a key nor JSON with one; or the list beside
                the shards says that it is of other pictures.
        """
        files = [listed] if listed is not None else []
        if not keep_duplicates and (source.root / DUPLICATES).is_file():
            _require_same_pictures(source.root / DUPLICATES, source)
            files.append(source.root / DUPLICATES)
        if not files:
            return cls(np.zeros(0, f"S{_DIGEST}"), "")
        found = b"".join(_digest(row["key"]) for path in files for row in _rows(path) if "key" in row)
        digests = np.unique(np.frombuffer(found, f"S{_DIGEST}"))
        return cls(digests, hashlib.sha256(digests.tobytes()).hexdigest())

    def __bool__(self) -> bool:
        return len(self.digests) > 0

    def __contains__(self, key: str) -> bool:
        if not self:
            return False
        digest = np.frombuffer(_digest(key), f"S{_DIGEST}")[0]
        place = int(np.searchsorted(self.digests, digest))
        return place < len(self.digests) and bool(self.digests[place] == digest)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=_DIGEST).digest()


def _require_same_pictures(path: Path, source: PictureSource) -> None:
    """Refuse a list of pictures that are no longer there, or whose stand-ins in other sets no longer are.

    A list that doesn't say of which pictures it is, somebody's own, is taken; so is one whose other sets are gone.
    """
    rows = _rows(path)
    head = next(rows, {})
    if "pictures" not in head:
        return
    remedy = "run `data-tools dedupe` again, or give --keep-duplicates"
    if head["pictures"] != source.identity():
        raise UserError(f"{path} is of pictures that are no longer in {source.root}; {remedy}")
    sets = head.get("sets") or {}
    for name in sorted({row["set"] for row in rows if row.get("set") in sets}):
        try:
            now = PictureSource.open(source.root / name).identity()
        except (UserError, OSError):
            continue
        if now != sets[name]:
            raise UserError(f"{path} leaves out copies of pictures that are no longer in {name}; {remedy}")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a list, of which the first may say what it is of; all others have a "key"."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                text = line.strip()
                if not text:
                    continue
                if not text.startswith("{"):
                    yield {"key": text}
                    continue
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError):
                    row = {}
                head = number == 1 and "key" not in row and "pictures" in row
                if not head and not isinstance(row.get("key"), str):
                    raise UserError(f'{path}, line {number} has no "key"; give one key a line, or JSON lines')
                yield row
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give one key a line, or JSON lines") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
