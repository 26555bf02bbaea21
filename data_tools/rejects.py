"""What was set aside, and why: rejects.jsonl beside the shards, however many rows it takes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import IO

from data_tools.output import REJECTS
from data_tools.texts import printable
from finetune import UserError
from finetune.data.shards.files import naming


class Rejects:
    """Rows are written as they come, under a temporary name: nothing but their number is kept in memory.

    with Rejects(out) as rejects:
        rejects.add("cat.jpg", "empty file")
        rejects.save()
    """

    def __init__(self, root: Path) -> None:
        self.path = root / REJECTS
        self.temporary = root / f".{REJECTS}.tmp"
        self.count = 0
        self.first = ("", "")
        self._file: IO[str] | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *_: object) -> None:
        """Without `save`, nothing is left."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses again
                self._file.close()
            self._file = None
            self.temporary.unlink(missing_ok=True)

    def __len__(self) -> int:
        return self.count

    def add(self, file: str, reason: str) -> None:
        """Set one picture aside."""
        with naming(self.path):
            if self._file is None:
                self.first = (file, reason)
                self._file = self.temporary.open("w", encoding="utf-8", errors="backslashreplace")
            self._file.write(json.dumps({"file": file, "reason": reason}, ensure_ascii=False) + "\n")
        self.count += 1

    def save(self) -> None:
        """Publish rejects.jsonl, one object a line: file, reason. No rows, no file."""
        if self._file is not None:
            with naming(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None
            os.replace(self.temporary, self.path)

    def summary(self) -> str:
        """A clause for the command's last line; empty when nothing was set aside."""
        return f"; {self.count} set aside, listed in {self.path}" if self.count else ""

    def require_some_left(self, samples: int, source: str) -> None:
        """Refuse to finish an empty set.

        Raises:
            UserError: there are no samples; names the first reject.
        """
        if samples:
            return
        if not self.count:
            raise UserError(f"no pictures in {source}; nothing was written")
        file, reason = self.first
        first = f"{printable(file)}: {reason}"
        raise UserError(f"none of {self.count} pictures in {source} can be used; the first, {first}")
