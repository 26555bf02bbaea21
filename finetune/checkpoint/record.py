"""The record that completes a checkpoint, its checksums, and what happens to finished folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import UserError
from finetune.checkpoint.writing import Task, sum_of_words
from finetune.runs import complete_checkpoints, is_there

FORMAT = 1
TEMPORARY = ".tmp-"
_READ_BYTES = 1 << 23
_READERS = 4


@dataclass(frozen=True)
class FileSum:
    """Of one file: `sha256` in hexadecimal, and the sum of its 4-byte words modulo 2^64 (0 for other lengths)."""

    sha256: str
    words: int


def sum_files(folder: Path, moved: Callable[[], None] = lambda: None) -> dict[str, FileSum]:
    """The sums of every file under `folder`, by its name from there; calls `moved` while it comes forward."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return dict(zip(names, _each(lambda name: _sum(folder / name, moved), names), strict=True))


def write_record(folder: Path, record: Mapping[str, Any], sums: Mapping[str, FileSum] | None = None) -> None:
    """Write the trainer.json that completes a checkpoint: `record` and the checksum of every other file."""
    sums = sum_files(folder) if sums is None else sums
    whole = {"format": FORMAT, **record, "files": {name: of.sha256 for name, of in sums.items()}}
    (folder / "trainer.json").write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def publish(temporary: Path, final: Path) -> None:
    """Put a finished folder in place of `final`, which may exist; its bytes reach the disk before its name.

    A kill between the two renames leaves no folder at `final`, never half of one.
    """
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    aside = final.with_name(f"{TEMPORARY}old-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def prune(run: Path, keep: int, step: int, passed_over: set[Path]) -> None:
    """Remove all but the last `keep` of a run's checkpoints up to `step`, the one just saved.

    Those `passed_over`, which are broken, don't count: a whole one is never removed for them. The one just saved is
    none of them any more.

    Later ones go as well: the run went on from before them, because they were broken or by the user's wish, and is
    on its way to make them anew.
    """
    complete = complete_checkpoints(run)
    passed_over -= {path for at, path in complete.items() if at == step}
    kept = [at for at, path in complete.items() if at <= step and path not in passed_over][-keep:]
    remove(path for at, path in complete.items() if at not in kept)


def remove(folders: Iterable[Path]) -> None:
    """Remove finished folders. Renamed first: a kill in the midst of it leaves no half of one under a good name."""
    for folder in folders:
        doomed = folder.with_name(f"{TEMPORARY}{folder.name}")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def newest_whole(run: Path, *, begun_from: str | None = None, passed_over: set[Path] | None = None) -> Path | None:
    """A run's newest checkpoint whose files are whole; damaged ones are named in a warning and passed over.

    None where there is none at all. A run that began anew because all are damaged would remove them.

    Args:
        begun_from: only of those whose record says so; None where none of them is whole.
        passed_over: gets the damaged ones.

    Raises:
        UserError: there are some, and none is whole.
        UserError, OSError: one can't be judged (see `find_fault`).
    """
    path, fault = None, None
    for path in reversed(complete_checkpoints(run).values()):
        if begun_from is not None and _begun_from(path) != begun_from:
            continue
        fault = find_fault(path)
        if fault is None:
            return path
        warnings.warn(f"passing over the broken checkpoint {path}: {fault}", stacklevel=2)
        if passed_over is not None:
            passed_over.add(path)
    if path is not None and begun_from is None:
        raise UserError(
            f"no checkpoint in {path.parent} is whole ({path.name}: {fault}): to begin anew, remove them or choose "
            "another run.dir"
        )
    return None


def _begun_from(path: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        begun_from = json.loads((path / "trainer.json").read_text()).get("begun_from")
        return None if begun_from is None else str(begun_from)
    return None


def followed(run: Path, named: str, passed_over: set[Path] | None = None) -> tuple[Path, str]:
    """(where to go on, what its checkpoints shall have as `begun_from`) for `checkpoint.resume=named`.

    The first start goes on from `named` itself. A start of the same command after a stop, or a Slurm job that was
    requeued, goes on from the newest checkpoint that came of it: else a job that is stopped more often than it gets
    done would never end, and would remove at its first save what it had done.

    Raises:
        UserError: the run has checkpoints of another past.
        UserError, OSError: as `require_whole`.
    """
    begun_from = str(Path(named).resolve())
    path = newest_whole(run, begun_from=begun_from, passed_over=passed_over)
    if path is None:
        _require_no_other(run, named, begun_from)
    return path or require_whole(named), begun_from


def _require_no_other(run: Path, named: str, begun_from: str) -> None:
    """Refuse a run's folder with checkpoints that neither came of `named` nor lie beside it: they would be removed.

    Raises:
        UserError: it is one.
    """
    there = complete_checkpoints(run)
    is_own = Path(begun_from).parent == (run / "checkpoints").resolve()
    if there and not is_own and all(_begun_from(path) != begun_from for path in there.values()):
        raise UserError(
            f"{run} has checkpoints that did not come of checkpoint.resume={named} (up to step {max(there)}), and "
            "what begins there would remove them: choose another run.dir, or move them away"
        )


def require_whole(path: str) -> Path:
    """The checkpoint folder that `checkpoint.resume` names.

    Raises:
        UserError: it is not whole.
        UserError, OSError: it can't be judged (see `find_fault`).
    """
    fault = find_fault(Path(path))
    if fault is not None:
        raise UserError(f"checkpoint.resume={path} is no whole checkpoint: {fault}")
    return Path(path)


def find_fault(path: Path) -> str | None:
    """What is damaged in a checkpoint, or None.

    Raises:
        UserError: it is of another version, which is no damage.
        OSError: nor is it that the disk does not give it.
    """
    if not path.is_dir():
        return "there is no such folder"
    try:
        record = json.loads((path / "trainer.json").read_text())
        written = record["format"]
        files = dict(record["files"])
        if written == FORMAT:
            for name in files:
                if not is_there(path / name):
                    return f"{name} is missing"
            found = _each(lambda name: _sum(path / name, lambda: None).sha256, list(files))
            for (name, wanted), digest in zip(files.items(), found, strict=True):
                if digest != wanted:
                    return f"{name} does not have its checksum"
            return None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"trainer.json cannot be read ({error})"
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    raise UserError(
        f"{path} has format {written!r} and this version reads {FORMAT}: go on with the version that wrote it, or "
        "choose another run.dir"
    )


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on when what a run depends on has changed since its checkpoint.

    Raises:
        UserError: names the first such key, with both values.
    """
    for key in sorted(saved.keys() & now.keys()):
        if saved[key] != now[key]:
            if "sha256" in key or key.endswith("(its weights)"):  # nobody knows contents by their sums
                raise UserError(
                    f"cannot go on from {path}: {key} is another now; give what the run's config.yaml names, or "
                    "choose another run.dir"
                )
            raise UserError(
                f"cannot go on from {path}: {key} was {saved[key]!r} and is {now[key]!r} now; "
                "put it back or choose another run.dir"
            )


def _each(function: Callable[[str], Any], names: list[str]) -> list[Any]:
    """`function` of each name, in threads: hashing lets go of the GIL.

    Not in an executor's: the interpreter would wait for these at its end, and a disk may never answer.
    """
    found: dict[str, Any] = {}
    left = iter(names)

    def work(_: Callable[[], None]) -> None:
        for name in left:
            found[name] = function(name)

    tasks = [Task(work, "sums") for _ in range(min(_READERS, len(names)))]
    for task in tasks:
        task.wait(math.inf, stalled_after=math.inf)
        task.result()
    return [found[name] for name in names]


def _sum(path: Path, moved: Callable[[], None]) -> FileSum:
    digest, words = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        whole_words = os.fstat(file.fileno()).st_size % 4 == 0
        filled = 0
        while count := file.readinto(buffer[filled:]):
            filled += count
            if filled == len(buffer):
                digest.update(buffer)
                words += sum_of_words(buffer) if whole_words else 0
                filled = 0
                moved()
        digest.update(buffer[:filled])
        words += sum_of_words(buffer[:filled]) if whole_words and filled % 4 == 0 else 0
    return FileSum(digest.hexdigest(), words % (1 << 64))


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # for lists of names not every file system has it
            raise
    finally:
        os.close(descriptor)
