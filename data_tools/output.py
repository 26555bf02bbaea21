"""Where a command writes: the folder is claimed, its earlier content is respected."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune import DISK_FULL, UserError
from finetune.data.shards import CLASSES, EMPTY_TEXT, MANIFEST, Manifest, ShardError
from finetune.data.shards.files import WORK

REJECTS = "rejects.jsonl"
SOURCE = "SOURCE.json"
DUPLICATES = "duplicates.jsonl"
FINGERPRINTS = ".dedupe"  # where `data-tools dedupe` keeps what it knows of the pictures
LOCK = ".lock"
JOB = "encode.json"
_JOIN_SECONDS = 1.0, 0.01  # how long who would share a folder waits for one who leaves it; between two looks
_LEAVING = 2  # the byte of the lock file that keeps those who leave apart; 0 is the folder, 1 is `encode`'s
_FILES = (MANIFEST, REJECTS, SOURCE, DUPLICATES, JOB, EMPTY_TEXT, CLASSES)
_FOLDERS = (WORK, FINGERPRINTS)
_OURS = re.compile(r"\d{5,}\.(tar|index\.npy)|\..*\.tmp")
_BEGUN = re.compile(r"\d{5,}\.index\.npy|\.\d{5,}\.tar\.tmp")  # others have tars of such names, but not these


@contextlib.contextmanager
def claimed_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Create `out`, hold it for this process, and give it empty of shards.

    Raises:
        UserError: `out` is a file, is not empty (without `overwrite`), or another process is writing there.
    """
    with lock_folder(out, shared=False):
        clear_folder(out, overwrite)
        yield out


@contextlib.contextmanager
def lock_folder(out: Path, *, shared: bool) -> Iterator[int]:
    """Create `out` and hold byte 0 of its lock file, alone or with others who share it; gives the open file.

    These are POSIX locks: they work on network file systems, belong to the process, and end with it. The last to
    leave deletes the file.

    Raises:
        UserError: `out` is a file or can't be written to, or another process holds it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder")
    path = out / LOCK
    until = time.monotonic() + _JOIN_SECONDS[0]
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise UserError(f"cannot write to {out} ({error.strerror}); choose another folder") from None
        try:
            fcntl.lockf(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, 1, 0)
        except (BlockingIOError, PermissionError):  # what POSIX allows for a lock that another one holds
            os.close(lock)
            if shared and time.monotonic() < until:  # who leaves, or asks if it is alone, holds it for a moment
                time.sleep(_JOIN_SECONDS[1])
                continue
            raise UserError(f"{out} is in use by another process; wait for it or choose another folder") from None
        except OSError as error:
            os.close(lock)
            raise UserError(
                f"{out}: its file system has no POSIX locks ({error.strerror}); choose another"
            ) from None
        if _same_file(lock, path):
            break
        os.close(lock)  # its last user deleted it just now
    try:
        yield lock
    finally:
        with contextlib.suppress(OSError):
            # One leaves at a time: of two that leave at once, neither would be alone.
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, _LEAVING)
            # Alone until the file is gone: who opened it meanwhile gets its lock only then, and sees that.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            if _same_file(lock, path):
                path.unlink()
        os.close(lock)


def is_alone(lock: int) -> bool:
    """Whether no other process shares the lock that `lock_folder` gave."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
    except (BlockingIOError, PermissionError):
        return False
    fcntl.lockf(lock, fcntl.LOCK_SH, 1, 0)
    return True


def _same_file(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A temporary path beside `out`, which takes the place of `out` in the end: whole, or not at all.

    Raises:
        UserError: `out` can't be written.
    """
    temporary = out.with_name(f".tmp.{out.name}")  # its suffix says which format to write
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"cannot write {out} ({error.strerror or error}); choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def refuse_sources(out: Path, sources: Iterable[Path]) -> None:
    """Refuse to write where the pictures come from: `--overwrite` would delete them before they are read.

    Raises:
        UserError: `out` is one of the sources, or holds one.
    """
    folder = out.resolve()
    for source in sources:
        resolved = source.resolve()
        places = (resolved,) if resolved.is_dir() else (resolved.parent, source.parent.resolve())
        if folder in places:
            raise UserError(f"--out {out} is where the pictures come from; choose another folder")


def clear_folder(out: Path, overwrite: bool) -> None:
    """Delete a set of ours from a folder; the files of others stay.

    Raises:
        UserError: the folder isn't empty, and `overwrite` is not given.
    """
    names = sorted(path.name for path in out.iterdir() if path.name != LOCK)
    if names and not overwrite:
        if MANIFEST in names:
            try:
                done = Manifest.load(out)
                what = f"already holds a finished set of {done.samples} samples ({done.kind})"
            except ShardError:
                what = f"already holds a {MANIFEST}"
        elif WORK in names:
            what = "holds latents that are not finished (run the same `data-tools encode` again)"
        elif any(map(_BEGUN.fullmatch, names)):
            what = "holds the beginning of a set that was never finished, and can't be gone on with"
        else:
            what = f"is not empty ({names[0]})"
        raise UserError(f"{out} {what}; choose another folder or give --overwrite")
    # The manifest goes first: a set half deleted must not look whole. Files that aren't ours stay.
    for name in sorted(names, key=lambda name: name != MANIFEST):
        if name in _FOLDERS:
            shutil.rmtree(out / name)
        elif name in _FILES or _OURS.fullmatch(name):
            (out / name).unlink()
