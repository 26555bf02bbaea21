"""Arrays in `.npy` files, read by several threads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np

_TRIES = 100


def load(source: Path | bytes, *, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """numpy's `load` of a file, or of its bytes, without pickles.

    numpy parses a header as Python. Versions of Python raise SystemError where several threads parse at once, and
    nothing is wrong (https://github.com/python/cpython/issues/106905).

    Raises:
        OSError: there is no such file, or it is not to be read.
        Exception: of many types, where the header is damaged (see `finetune.data.shards.NPY_ERRORS`).
    """
    for attempt in range(_TRIES):
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            return np.asarray(np.load(file, mmap_mode=mmap_mode, allow_pickle=False))
        except SystemError:
            if attempt == _TRIES - 1:
                raise
    raise AssertionError
