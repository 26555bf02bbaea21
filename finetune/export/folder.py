"""A folder or a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune import UserError
from finetune.components import SAMPLING_FILE
from finetune.models.adapters import LORA_FILE
from finetune.models.weight_files import disk_errors, let_others_read
from finetune.tasks import TASK_FILE

_MARKS = {"model_index.json", TASK_FILE, LORA_FILE}  # an export has one of these
_FILES = _MARKS | {SAMPLING_FILE}  # and no other files at its top


def check_out(out: str | Path, source: str | Path, *, overwrite: bool) -> Path:
    """The folder to write, if it may be written.

    Raises:
        UserError: it is a file or named as one, in use without `overwrite`, holds something that no export writes,
            or what is exported lies there.
    """
    path = Path(out).expanduser()
    if path.is_file():
        raise UserError(f"--out {path} is a file; give a folder")
    if path.suffix in (".safetensors", ".ckpt"):  # a folder of that name is taken for a file by who reads it
        raise UserError(
            f"--out {path} is a file's name, and this format is a folder: give one, or take --format single-file "
            "for a whole model, --format kohya for an adapter"
        )
    here, there = path.resolve(), Path(source).expanduser().resolve()
    if there.exists() and (here.is_relative_to(there) or there.is_relative_to(here)):
        raise UserError(f"--out {path} is where {source} lies; choose another folder")
    if path.is_dir() and any(path.iterdir()):
        if not any((path / name).is_file() for name in _MARKS):
            raise UserError(f"--out {path} is not empty and holds no earlier export; choose another folder")
        if not overwrite:
            raise UserError(f"--out {path} is not empty; choose another folder or add --overwrite")
        foreign = sorted(each.name for each in path.iterdir() if not _is_exported(each))
        if foreign:
            raise UserError(f"--out {path} holds {foreign[0]}, which no export has written; choose another folder")
    return path


def _is_exported(path: Path) -> bool:
    """Whether this may be a part of an export: a file of those above, or a folder of a model's part."""
    if not path.is_dir():
        return path.name in _FILES
    inside = list(path.iterdir())
    return all(each.is_file() and each.suffix in (".json", ".txt", ".safetensors") for each in inside)


def check_file(out: str | Path, *, overwrite: bool) -> Path:
    """The file to write, if it may be written.

    Raises:
        UserError: it is no .safetensors, is a folder, or is there without `overwrite`.
    """
    path = Path(out).expanduser()
    if path.is_dir() or path.suffix != ".safetensors":
        raise UserError(f"--out {path}: give a file that ends in .safetensors")
    if path.exists() and not overwrite:
        raise UserError(f"--out {path} is there already; choose another file or add --overwrite")
    return path


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, or goes with an exception.

    A link stays, and what it leads to is replaced. A disk that is mounted at `out`, as a container's volume is,
    can't be replaced, nor a folder in one that is not to be written: these are filled, no export before the end.
    """
    out = out.resolve()
    stays = out.is_dir() and (os.path.ismount(out) or not os.access(out.parent, os.W_OK))
    temporary = out / f".tmp-{os.getpid()}" if stays else out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with disk_errors(out):
            yield temporary
        for weights in temporary.rglob("*.safetensors"):  # diffusers' own among them
            let_others_read(weights)
        if stays:
            _fill(out, temporary)
        elif out.is_dir():
            # A folder with something in it cannot be replaced in one step: it steps aside first.
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            os.replace(out, old)
            os.replace(temporary, out)
            shutil.rmtree(old)
        else:
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(out: Path, temporary: Path) -> None:
    """Let what is in `temporary`, which lies in it, be all that `out` holds."""
    # By its marks it is an export: they go first and come last.
    for path in sorted(out.iterdir(), key=lambda path: path.name not in _MARKS):
        if path.is_dir() and path != temporary:
            shutil.rmtree(path)
        elif path != temporary:
            path.unlink()
    for path in sorted(temporary.iterdir(), key=lambda path: path.name in _MARKS):
        os.replace(path, out / path.name)
