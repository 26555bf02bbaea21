"""Reading a checkpoint back: of each file only what a rank needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from finetune import UserError


class Reader:
    """Reads tensors of a checkpoint's files, each file opened once; `stack` closes them."""

    def __init__(self, root: Path, stack: contextlib.ExitStack) -> None:
        self.root, self.stack, self.files = root, stack, dict[str, Any]()

    def open(self, file: str) -> Any:
        if file not in self.files:
            if not (self.root / file).is_file():
                raise UserError(f"{self.root} holds no {file}: it is of another adapter or model")
            self.files[file] = self.stack.enter_context(safe_open(self.root / file, framework="pt"))
        return self.files[file]

    def slice_of(self, file: str, key: str) -> Any:
        try:
            return self.open(file).get_slice(key)
        except UserError:
            raise
        except Exception:
            raise UserError(f"{self.root / file} holds no {key}: it is of another adapter or model") from None


class Named:
    """Whole parameters of a checkpoint by name: a `Source` for `Strategy.scatter_`.

    Args:
        locate: a parameter's name to its file and key.
    """

    def __init__(self, reader: Reader, locate: Callable[[str], tuple[str, str]]) -> None:
        self.reader, self.locate = reader, locate

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.reader.slice_of(*self.locate(name)).get_shape())

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (dimension 0); of a scalar itself."""
        file, key = self.locate(name)
        if not self.shape(name):
            return self.reader.open(file).get_tensor(key)
        return self.reader.slice_of(file, key)[first:last]
