"""Tasks: what a U-Net is conditioned on (Rombach et al. 2022, section 3.3 and table 1), a file for each.

`finetune/tasks/NAME.py` is what `task=NAME` means. It has

    Options     a dataclass: the task's own settings with their defaults (`task.options.KEY=VALUE`)
    make        (Options, Given) -> Conditioner
    LABELS      True where the names of the shards' labels mean something; may be left out

and says in its first line what the task is. Nothing else has to know of a new task but `conf/task/NAME.yaml`.
"""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune import UserError, first_line
from finetune.conditioning import Conditioner, Given
from finetune.data.shards import write_atomic

TASK_FILE = "task.json"


@dataclass(frozen=True)
class Task:
    """What a run or model is conditioned on: a task's name, its settings, the names of its classes."""

    name: str = "text_to_image"
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()

    def save(self, folder: Path) -> None:
        """Write `task.json`, whole or not at all."""
        write_atomic(folder / TASK_FILE, (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Task | None:
        """Of a run's or an exported model's folder; None where there is none.

        Raises:
            UserError: the file is broken.
        """
        path = folder / TASK_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def names() -> list[str]:
    """Of all tasks."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def options(name: str, settings: Mapping[str, Any]) -> Any:
    """A task's `Options`, of what the configuration says.

    Raises:
        UserError: no such task, a setting that it does not have, or a value of the wrong type.
    """
    if name not in names():
        raise UserError(f"task.name={name} is not known: choose one of {', '.join(names())}")
    schema = importlib.import_module(f"{__name__}.{name}").Options
    known = OmegaConf.structured(schema)
    for key in settings:
        if key not in known:
            has = f"{name} has {', '.join(map(str, known))}" if len(known) else f"{name} has none"
            near = difflib.get_close_matches(str(key), map(str, known), n=1)
            hint = f"did you mean {near[0]}?" if near else has
            raise UserError(f"unknown key task.options.{key}: {hint}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(known, dict(settings)))
    except OmegaConfBaseException as error:
        raise UserError(f"task.options: {first_line(error)}") from None


def reads_labels(name: str) -> bool:
    """Whether the names of the shards' labels mean something to a task."""
    return bool(getattr(importlib.import_module(f"{__name__}.{name}"), "LABELS", False))


def make(name: str, settings: Mapping[str, Any], given: Given) -> Conditioner:
    """The conditioner of a task.

    Raises:
        UserError: settings that it does not know or that contradict the model or the data.
    """
    chosen = options(name, settings)
    return importlib.import_module(f"{__name__}.{name}").make(chosen, given)
