"""The pictures that a list says to leave out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
        files: dict[Path, str | None] = {} if listed is None else {listed: None}
        if not keep_duplicates and (source.root / DUPLICATES).is_file():
            files[source.root / DUPLICATES] = source.identity()
        if not files:
            return cls(np.zeros(0, f"S{_DIGEST}"), "")
        found = b"".join(_digest(key) for path, pictures in files.items() for key in _keys(path, pictures))
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
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST).digest()


def _keys(path: Path, pictures: str | None) -> Iterator[str]:
    """The keys in a list; if it says of which pictures it is, of these (a set's identity; None: any)."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                text = line.strip()
                if not text:
                    continue
                if not text.startswith("{"):
                    yield text
                    continue
                try:
                    row = json.loads(text)
                except ValueError:
                    row = {}
                if number == 1 and "key" not in row and isinstance(of := row.get("pictures"), str):
                    if pictures not in (None, of):
                        remedy = "run `data-tools dedupe` again, or give --keep-duplicates"
                        raise UserError(f"{path} is of pictures that are no longer in {path.parent}; {remedy}")
                    continue
                if not isinstance(row.get("key"), str):
                    raise UserError(f'{path}, line {number} has no "key"; give one key a line, or JSON lines')
                yield row["key"]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give one key a line, or JSON lines") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
