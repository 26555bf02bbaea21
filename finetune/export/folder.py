"""A folder or a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune import UserError
from finetune.models.weight_files import disk_errors, let_others_read

_EXPORTS = (
    "model_index.json",
    "task.json",
    "pytorch_lora_weights.safetensors",
)  # what tells an export from other folders


def check_out(out: str | Path, *, overwrite: bool) -> Path:
    """The folder to write, if it may be written.

    Raises:
        UserError: it is a file, is in use without `overwrite`, or holds something that is no export.
    """
    path = Path(out).expanduser()
    if path.is_file():
        raise UserError(f"--out {path} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()):
        if not any((path / name).is_file() for name in _EXPORTS):
            raise UserError(f"--out {path} is not empty and holds no earlier export; choose another folder")
        if not overwrite:
            raise UserError(f"--out {path} is not empty; choose another folder or add --overwrite")
    return path


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
    """A temporary folder beside `out` that takes its place at the end, or goes with an exception."""
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with disk_errors(out):
            yield temporary
        for weights in temporary.rglob("*.safetensors"):  # diffusers' own among them
            let_others_read(weights)
        if out.is_dir():
            # A folder with something in it cannot be replaced in one step: it steps aside first.
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            os.replace(out, old)
            os.replace(temporary, out)
            shutil.rmtree(old)
        else:
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
