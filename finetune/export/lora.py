"""A folder that diffusers' `load_lora_weights` takes."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune import UserError
from finetune.export.folder import whole_folder
from finetune.models.adapters import LORA_FILE, read_lora, save_lora
from finetune.models.components import Weights, find_checkpoint, is_run


def export_lora(
    run: str | Path,
    out: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, ...]:
    """Write a LoRA run's adapter; the base model is not needed.

    Returns:
        What the user should be told.

    Raises:
        UserError: no run, or one that trained all weights.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise UserError(f"no such run: {run}")
    if not is_run(folder):
        raise UserError(f"{run} is no run folder: it has neither config.yaml nor checkpoints/")
    checkpoint = find_checkpoint(folder, step, weights)
    if not (checkpoint.weights / LORA_FILE).is_file():
        raise UserError(f"{run} trained all weights and has no LoRA; use --format diffusers")
    lora = read_lora(checkpoint.weights)
    with whole_folder(out) as target:
        save_lora(target, {key: tensor.to(dtype) for key, tensor in lora.state.items()}, lora.alphas)
    return checkpoint.notices
