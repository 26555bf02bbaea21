"""Run folders: which checkpoints are whole, and which weights of them are taken."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from finetune import UserError

# Of a run: `raw` are the last step's; `ema` its first average, `ema:NAME` a further one; `sigma_rel=0.13` one by a
# power function of this length that is made of snapshots (`finetune.posthoc`).
Weights = str

_UNSET = "not set"
_FOREIGN = {  # names and suffixes of files that no run has in its own folder
    **dict.fromkeys(("manifest.json", ".tar"), "shards"),
    **dict.fromkeys(("model_index.json", ".safetensors", ".ckpt"), "a model"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "pictures"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run and the folder of the weights that were chosen in it."""

    folder: Path
    step: int
    weights: Path
    notices: tuple[str, ...] = ()


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a training run's."""
    return (Path(folder) / "config.yaml").is_file() or (Path(folder) / "checkpoints").is_dir()


def require_own_folder(path: str | Path) -> None:
    """Refuse a run's folder that holds something else: run files would be strewn among it. And addresses.

    What a launcher, W&B or `tee` leaves there before a run begins is no matter.

    Raises:
        UserError: says what the folder holds.
    """
    if "://" in str(path):  # it would be a folder here, `s3:`
        raise UserError(
            f"run.dir={path} is an address: a run is written to a folder; copy it there when it has ended"
        )
    folder = Path(path)
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # it is not there yet, or whoever makes it says what is wrong
        return
    if is_run(folder) or ".lock" in names:  # a run that ended before its first file has left its lock
        return
    for name in names:
        what = _FOREIGN.get(name) or _FOREIGN.get(Path(name).suffix.lower())
        if what is not None:
            raise UserError(
                f"run.dir={path} is no run's folder, it holds {what} ({name}): choose another run.dir, such as "
                "runs/first"
            )


def require_checkpoint(resume: str) -> None:
    """Refuse a run where a checkpoint is to be named.

    Raises:
        UserError: names the run's checkpoints.
    """
    if resume not in ("auto", "never") and is_run(resume):
        there = [str(folder) for folder in complete_checkpoints(resume).values()]
        remedy = f"name a checkpoint of it: {' or '.join(there)}" if there else "it has no whole checkpoint yet"
        raise UserError(f"checkpoint.resume={resume} is a run: {remedy}")


def complete_checkpoints(run: str | Path) -> dict[int, Path]:
    """A run's complete checkpoints by rising step, see `complete_in`."""
    return complete_in(Path(run) / "checkpoints")


def complete_in(folder: Path) -> dict[int, Path]:
    """The complete ones of `steps_in`: those with a `trainer.json`, which is written last."""
    return {step: path for step, path in steps_in(folder).items() if is_there(path / "trainer.json")}


def steps_in(folder: Path) -> dict[int, Path]:
    """The folders step-N in one, by rising step.

    Raises:
        UserError: it is a link to what is not there.
        OSError: it can't be read. A run that took it for empty would begin anew, and remove what is there.
    """
    try:
        names = os.listdir(folder)  # `Path.glob` finds nothing where it is refused
    except FileNotFoundError:
        if folder.is_symlink():
            raise UserError(f"{folder} is a link to {os.readlink(folder)}, which is not there: mount it") from None
        return {}
    matches = [match for name in names if (match := re.fullmatch(r"step-(\d+)", name))]
    return dict(sorted((int(match[1]), folder / match[0]) for match in matches))


def is_there(path: Path) -> bool:
    """Whether a file or folder exists.

    Raises:
        OSError: nobody can tell (`Path.exists` says no to that, from Python 3.14 on).
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def latest_checkpoint(run: str | Path) -> Path:
    """The folder of a run's last complete checkpoint.

    Raises:
        UserError: there is none.
    """
    return find_checkpoint(Path(run)).folder


def find_checkpoint(run: Path, step: int | None = None, weights: Weights = "ema") -> Checkpoint:
    """Choose a checkpoint and its weights.

    Raises:
        UserError: the run has no complete checkpoint, or none of this step, or not this average in it.
    """
    complete = complete_checkpoints(run)
    if not complete:
        raise UserError(
            f"{run} has no complete checkpoint yet: train until the first one is saved (checkpoint.every)"
        )
    if step is not None and step not in complete:
        raise UserError(
            f"{run} has no complete checkpoint of step {step}; there are {', '.join(map(str, complete))}"
        )
    chosen = step if step is not None else max(complete)
    folder = complete[chosen]
    notices: tuple[str, ...] = ()
    name = "weights" if weights == "raw" else weights.replace(":", "-")
    if weights == "ema" and not (folder / "ema").is_dir():
        name = "weights"
        if not (folder / "optimizer" / "y.safetensors").is_file():  # schedule_free's weights are an average
            notices = (f"{folder} has no averaged weights: taking those of the last step",)
    if name not in ("ema", "weights") and not (folder / name).is_dir():
        there = [path.name.replace("-", ":", 1) for path in sorted(folder.glob("ema*"))]
        raise UserError(f"{folder} has no average {weights}: choose {' or '.join([*there, 'raw'])}")
    if not (folder / name).is_dir():
        raise UserError(f"{folder} is broken: {name}/ is missing; choose another checkpoint")
    return Checkpoint(folder, chosen, folder / name, notices)


def changed_settings(
    run: Path, settings: DictConfig, is_free_form: Callable[[str], bool] = lambda key: False
) -> list[str]:
    """What differs, "optim.lr was 0.0001, is 0.0003", of a run's config.yaml and settings that are given now.

    Not where it lives, and how long it goes on only where the learning rate depends on that.

    Args:
        is_free_form: whether a key is one that a user made: of others only those that both have are told of, since
            versions differ in what they have.
    """
    try:
        before = dict(leaves(OmegaConf.load(run / "config.yaml")))
    except (OSError, YAMLError, UnicodeDecodeError):  # the run has none, or a broken one
        return []
    now = dict(leaves(settings))
    passed_over = ("run.",) if now.get("optim.schedule") == "cosine" else ("run.", "train.steps")
    changed = []
    for key in dict.fromkeys((*now, *before)):
        was, value = before.get(key, _UNSET), now.get(key, _UNSET)
        is_known = (key in before and key in now) or (is_free_form(key) and {} not in (was, value))
        if is_known and was != value and not key.startswith(passed_over):
            changed.append(f"{key} was {_short(was)}, is {_short(value)}")
    return changed


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what is in no section, of nested dictionaries or a configuration."""
    plain: Any = OmegaConf.to_container(settings) if OmegaConf.is_config(settings) else settings
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
