"""Where a model comes from: a local folder or the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from finetune import UserError


def local_folder(source: str | Path) -> Path | None:
    """The folder that `source` names, or None where it can only be a hub id.

    Raises:
        UserError: it looks like a path and there is no such folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    text = str(source)
    if path.is_file():
        raise UserError(f"{text} is a file; a model is a folder in the diffusers layout or a hub id")
    # `runs/first` has the form of a hub id: an existing parent says that a folder was meant.
    hub_form = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) is not None
    if isinstance(source, Path) or not hub_form or path.parent.is_dir():
        raise UserError(f"no such folder: {text}")
    return None


def first_line(error: BaseException) -> str:
    """An exception's first line, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
