"""Names, `.npy` bytes, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tarfile
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune import UserError, npy

MANIFEST = "manifest.json"
LATENT = "latent.npy"
TEXT = "text.npy"
EMPTY_TEXT = "empty.text.npy"
WORK = ".work"  # where `data-tools encode` keeps what isn't finished
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")

BLOCK = tarfile.BLOCKSIZE
NAME_BYTES = 100  # the ustar name field: a longer name would need extra header blocks before the data
# webdataset cuts a key at its first dot, skips names like `__this__`, and lower-cases the names of members.
KEY = re.compile(r"(?!__)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
MEMBER = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
# What numpy raises on bytes that are no .npy file, or a damaged one: it parses the header as Python.
NPY_ERRORS = (
    *(ValueError, TypeError, EOFError, OSError, SyntaxError, tokenize.TokenError),
    *(MemoryError, OverflowError, RecursionError, AttributeError),
)
TEMPORARY = re.compile(r"\..*\.tmp")


class ShardError(UserError):
    """A set of shards that is absent, damaged, or not what its reader needs; names the file."""


def index_name(shard_name: str) -> str:
    """`00000.tar` -> `00000.index.npy`."""
    return shard_name.removesuffix(".tar") + ".index.npy"


def split_name(name: str) -> tuple[str, str]:
    """(key, member) of a file in a tar: `a/cat.latent.npy` -> `a/cat`, `latent.npy`."""
    folder, slash, base = name.rpartition("/")
    stem, _, member = base.partition(".")
    return folder + slash + stem, member


def key_hash(key: str) -> int:
    """64 bits of a key, by which repeats are looked for: what is found is suspect, and compared as a whole."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in its folder, then rename it: whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):  # it may be what fills the disk
            temporary.unlink()
        raise
    os.replace(temporary, path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an `OSError` (a full disk, say) carry the name of the file, which `write` and `fsync` leave out."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def npy_bytes(array: np.ndarray) -> bytes:
    return npy_header(array.shape, array.dtype) + np.ascontiguousarray(array).tobytes()


def latent_bytes(moments: np.ndarray) -> bytes:
    """Moments [2C, h, w] as the bytes of a `latent.npy` member, float16."""
    return npy_bytes(moments.astype("<f2"))


def json_bytes(record: Mapping[str, Any]) -> bytes:
    """A sample's record as the bytes of a `json` member."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> bytes:
    """The header numpy writes (format 1.0, padded to 64 bytes) before a C-ordered array."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    length = math.ceil((10 + len(text) + 1) / 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def parse_npy(data: bytes) -> np.ndarray | None:
    """The array in the bytes of a .npy file, or None if they are no such file (or hold objects)."""
    try:
        return npy.load(data)
    except NPY_ERRORS:
        return None
