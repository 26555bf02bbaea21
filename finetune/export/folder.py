"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from finetune import UserError

_EXPORTS = ("model_index.json", "pytorch_lora_weights.safetensors")  # what tells an export from other folders


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


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, or goes with an exception."""
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.is_dir():
            # A folder with something in it cannot be replaced in one step: it steps aside first.
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            os.replace(out, old)
            os.replace(temporary, out)
            shutil.rmtree(old)
        else:
            os.replace(temporary, out)
    except SafetensorError as error:
        # safetensors wraps the system's error and leaves its number in the text.
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
