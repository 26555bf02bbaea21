"""Where a command writes: the folder is claimed, its earlier content is respected, rejects are listed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path

from finetune import UserError
from finetune.data.shards import MANIFEST, Manifest, ShardError, write_atomic

REJECTS = "rejects.jsonl"
SOURCE = "SOURCE.json"
_LOCK = ".lock"
_OURS = re.compile(r"\d{5,}\.(tar|index\.npy)|\..*\.tmp")


@contextlib.contextmanager
def claimed_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Create `out`, hold it for this process, and give it empty of shards.

    Raises:
        UserError: `out` is a file, is not empty (without `overwrite`), or another process is writing there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / _LOCK).open("w")
    except (PermissionError, NotADirectoryError) as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is in use by another process; wait for it or choose another folder") from None
        try:
            _empty(out, overwrite)
            yield out
        finally:
            (out / _LOCK).unlink(missing_ok=True)


def _empty(out: Path, overwrite: bool) -> None:
    names = sorted(path.name for path in out.iterdir() if path.name != _LOCK)
    if names and not overwrite:
        if MANIFEST in names:
            try:
                done = Manifest.load(out)
                what = f"already holds a finished set of {done.samples} samples ({done.kind})"
            except ShardError:
                what = f"already holds a {MANIFEST}"
        else:
            what = f"is not empty ({names[0]})"
        raise UserError(f"{out} {what}; choose another folder or give --overwrite")
    # The manifest goes first: a set half deleted must not look whole. Files that aren't ours stay.
    for name in sorted(names, key=lambda name: name != MANIFEST):
        if name in (MANIFEST, REJECTS, SOURCE) or _OURS.fullmatch(name):
            (out / name).unlink()


class Rejects:
    """What was set aside, and why; written beside the shards when there is any."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, file: str, reason: str) -> None:
        """Set one picture aside."""
        self.rows.append({"file": file, "reason": reason})

    def save(self, root: Path) -> None:
        """Write rejects.jsonl, one object a line: file, reason."""
        if self.rows:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows]
            write_atomic(root / REJECTS, "".join(lines).encode())

    def summary(self, root: Path) -> str:
        """A clause for the command's last line; empty when nothing was set aside."""
        return f"; {len(self.rows)} set aside, listed in {root / REJECTS}" if self.rows else ""

    def require_some_left(self, samples: int, source: str) -> None:
        """Refuse to finish an empty set.

        Raises:
            UserError: there are no samples; names the first reject.
        """
        if samples:
            return
        if not self.rows:
            raise UserError(f"no pictures in {source}; nothing was written")
        first = self.rows[0]
        raise UserError(
            f"none of {len(self.rows)} pictures in {source} can be used; "
            f"the first, {first['file']}: {first['reason']}"
        )
