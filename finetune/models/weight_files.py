"""The tensors of one file of weights: a `.safetensors`, or a pickle of torch's of which only weights are read.

Files are written as `.safetensors`. A folder that diffusers or transformers wrote is loaded by them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune import UserError, first_line

Module = TypeVar("Module")

_UMASK = os.umask(0)  # there is no way to ask but to set it
os.umask(_UMASK)


def read_weights(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """Tensors by name, read as they are needed, and the file's metadata.

    Raises:
        UserError: it can't be read, or it is a pickle of more than weights.
    """
    if path.suffix == ".safetensors":
        tensors = _Lazy(path)
        return tensors, tensors.metadata
    return _read_pickle(path), {}


def load_folder(kind: type[Module], folder: Path, *, may_hold_more: bool = False, **settings: Any) -> Module:
    """`kind.from_pretrained(folder)` of diffusers or transformers, of float16 files where there are no others.

    Args:
        may_hold_more: files may hold weights that `config.json` has no place for, which are left out.

    Raises:
        UserError: a weight is missing: transformers would draw it, diffusers leave it without memory. Or one has no
            place: the model would compute something else than what was trained.
        OSError, ValueError, RuntimeError, SafetensorError: of the library's.
    """
    variant = None if whole_weights(folder) or not _weights(folder) else "fp16"
    loaded, about = kind.from_pretrained(  # type: ignore[attr-defined]
        folder, variant=variant, output_loading_info=True, **settings
    )
    if missing := about["missing_keys"]:
        raise UserError(f"{folder} holds no {_named(missing)}: the files are not whole, get them again")
    if not may_hold_more and (rest := about["unexpected_keys"]):
        raise UserError(
            f"{folder} holds {_named(rest)}, which its config.json has no place for: the two are of different "
            "models, get both again"
        )
    return loaded  # type: ignore[no-any-return]


def _named(keys: Iterable[str]) -> str:
    first, *rest = sorted(keys)
    return f"{first} and {len(rest)} more" if rest else first


def whole_weights(folder: Path) -> list[Path]:
    """The files of weights in a folder that are no float16 copies of others (`model.fp16.safetensors`)."""
    return [path for path in _weights(folder) if ".fp16" not in path.name]


def _weights(folder: Path) -> list[Path]:
    found = [path for suffix in (".safetensors", ".bin") for path in sorted(folder.glob(f"*{suffix}"))]
    return [path for path in found if ".non_ema" not in path.name]  # which is never asked for


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors`, whole or not at all.

    Raises:
        OSError, SafetensorError: the disk is full or refuses.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as file:
        save_file(whole, file, metadata={"format": "pt", **(metadata or {})})
        let_others_read(file)


@contextlib.contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A temporary file beside `out` that takes its name at the end, or goes with an exception."""
    temporary = out.absolute().with_name(f".{out.name}.tmp-{os.getpid()}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk_errors(out):
            yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """safetensors wraps the system's error and leaves its number in the text."""
    try:
        yield
    except SafetensorError as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
        raise


def let_others_read(path: Path) -> None:
    """Give a file the mode of any new one: those of safetensors 0.8 are their owner's alone, whatever the umask."""
    path.chmod(0o666 & ~_UMASK)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """A tensor's shape, without reading it.

    Raises:
        KeyError: there is none of this name.
    """
    if isinstance(tensors, Renamed):
        return shape_of(tensors.tensors, tensors.names[name])
    return tensors.shape(name) if isinstance(tensors, _Lazy) else tuple(tensors[name].shape)


class _Lazy(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {first_line(error)}") from error
        self._names = dict.fromkeys(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._names:
            raise KeyError(name)
        return tuple(self._file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Renamed(Mapping[str, Tensor]):
    """Tensors under other names: `names` has the old by the new."""

    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Inert:
    """Stands for what a trainer wrote beside the weights: it takes anything and does nothing."""

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What the published files hold beside tensors: a name of their trainer's, and numpy numbers. They are read as
# `_Inert`, so nothing of theirs runs.
_KNOWN = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, by `weights_only` alone.

    Raises:
        UserError: it holds more than weights, or can't be read.
    """
    stand_ins: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in _KNOWN]
    try:
        with torch.serialization.safe_globals(stand_ins):
            try:
                read = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                read = torch.load(path, map_location="cpu", weights_only=True)  # of before torch 1.6
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path} holds more than weights{what}, which could run code when it is read: take a .safetensors of it"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint of torch: {first_line(error)}") from error
    state = read.get("state_dict", read) if isinstance(read, dict) else {}
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name: it is no checkpoint of a model")
    return tensors
