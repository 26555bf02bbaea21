"""Where a run stands, as its checkpoints say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import UserError


@dataclass
class Progress:
    """Where a run stands.

    `depends_on`: what must not change when it goes on, by the name of its config key. `latents`: `scale`, `shift`
    and `encoder_sha256` of the latent space that it is trained in. `open_losses`: mean losses of the steps
    since the last line of metrics, so that lines are the same wherever a run was stopped. `optimizer`: what it
    counts beside steps, for each group of parameters (see `Strategy.counts`). `begun_from`: the checkpoint that
    `checkpoint.resume` named, where one did.
    """

    step: int
    images_seen: int
    steps_taken: int
    loss_scale: dict[str, float] = field(default_factory=dict)
    optimizer: list[dict[str, float]] = field(default_factory=list)
    depends_on: dict[str, Any] = field(default_factory=dict)
    latents: dict[str, Any] = field(default_factory=dict)
    open_losses: list[float] = field(default_factory=list)
    begun_from: str | None = None


def read_progress(path: Path) -> Progress:
    """What a checkpoint says of its run.

    Raises:
        UserError: it is another command's.
    """
    record = json.loads((path / "trainer.json").read_text())
    if missing := {"step", "images_seen", "steps_taken"} - record.keys():
        raise UserError(
            f"{path} is no checkpoint of finetune train: it lacks {sorted(missing)[0]}; choose another run.dir"
        )
    return Progress(**{name: record[name] for name in Progress.__dataclass_fields__ if name in record})
