"""Reading a checkpoint back: of each file only what a rank needs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from finetune import UserError
from finetune.checkpoint.contents import moment_file
from finetune.checkpoint.layout import Layout
from finetune.checkpoint.progress import Progress
from finetune.distributed import Strategy
from finetune.ema import Average, Power


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


def restore(
    path: Path, progress: Progress, layout: Layout, strategy: Strategy, averages: Sequence[Average]
) -> None:
    """Put everything back, under any strategy and number of ranks; collective.

    An average that the checkpoint has not begins at its weights.

    Raises:
        UserError: the checkpoint is of another model or adapter, or has another kind of average by this name.
    """
    described = json.loads((path / "trainer.json").read_text()).get("averages", {})

    def inside(folder: str) -> Callable[[str], tuple[str, str]]:
        def locate(name: str) -> tuple[str, str]:
            file, key = layout.locate(name)
            return f"{folder}/{file}", key

        return locate

    with contextlib.ExitStack() as stack:
        reader = Reader(path, stack)
        strategy.scatter_([shard.master for shard in strategy.shards], Named(reader, inside("weights")))
        for average in averages:
            if (path / average.name).is_dir():
                _take_up(average, described.get(average.name, {}), path)
                strategy.scatter_(average.tensors, Named(reader, inside(average.name)))
            else:  # switched on later
                average.since_images = progress.images_seen
                strategy.scatter_(average.tensors, Named(reader, inside("weights")))
        for kind in strategy.settings.of_a_weight:
            strategy.scatter_(strategy.moments(kind), Named(reader, partial(_pair, moment_file(kind))))
        for shard, own in zip(strategy.shards, strategy.own_state(), strict=True):
            for name, tensor in own.items():
                tensor.copy_(_own(reader, moment_file(name), shard.name, tensor))
    strategy.refresh()
    strategy.set_steps_taken(progress.steps_taken)
    strategy.load_counts(progress.optimizer)
    strategy.load_scaler_state(progress.loss_scale)


def _take_up(average: Average, saved: dict[str, Any], path: Path) -> None:
    """Let an average go on from what a checkpoint says of it.

    Raises:
        UserError: that is one of another kind, of which it can't be the continuation.
    """
    sigma_rel = average.profile.sigma_rel if isinstance(average.profile, Power) else None
    if saved.get("sigma_rel") != sigma_rel:
        was, now = (
            "an exponential average" if it is None else f"a power function's of sigma_rel {it:g}"
            for it in (saved.get("sigma_rel"), sigma_rel)
        )
        raise UserError(
            f"cannot go on from {path}: its {average.name}/ is {was} and would be {now}; put ema.* back or choose "
            "another run.dir"
        )
    average.since_images = int(saved.get("since_images", 0))


def _own(reader: Reader, file: str, key: str, like: Tensor) -> Tensor:
    """A tensor of the optimizer that has a shape and type of its own.

    Raises:
        UserError: the file's is another one.
    """
    saved = reader.slice_of(file, key)[:]
    if saved.shape != like.shape or saved.dtype != like.dtype:
        raise UserError(
            f"{key} in {reader.root / file} is {list(saved.shape)} of {saved.dtype}, the optimizer here needs "
            f"{list(like.shape)} of {like.dtype}: put optim.kind back as it was or choose another run.dir"
        )
    return saved


def _pair(file: str, key: str) -> tuple[str, str]:
    return file, key
