"""A LoRA run's adapter alone: a folder for diffusers' `load_lora_weights`, or a file in kohya's format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune import UserError
from finetune.components import read_config, section
from finetune.export.folder import whole_folder
from finetune.export.single_file import predicts
from finetune.models.adapters import DOWN, LORA_FILE, UP, Lora, read_lora, save_lora
from finetune.models.kohya import to_kohya
from finetune.models.schedulers import FLOW_SCHEDULER, load_scheduler, scheduler_config
from finetune.models.single_file import open_file
from finetune.models.sources import download, fetch_file, local_folder
from finetune.models.weight_files import write_weights
from finetune.posthoc import chosen_checkpoint
from finetune.runs import Weights, is_run

# By the base's kind, what kohya's scripts write of it: WebUI hides an adapter from other models, and takes one that
# says nothing for 1.x.
_BASES = {
    "sd1": {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    "sd2": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "upscaler": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "xl": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}


def export_lora(
    run: str | Path,
    out: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, ...]:
    """Write a LoRA run's adapter into a folder; of the base model configurations are read, if it is there.

    Returns:
        What the user should be told.

    Raises:
        UserError: no run, or one that trained other weights than a LoRA's.
    """
    lora, notices = _adapter(run, weights, step, dtype)
    with whole_folder(out) as target:
        save_lora(target, lora.state, lora.alphas)
    return notices


def export_kohya(
    run: str | Path,
    out: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, ...]:
    """As `export_lora`, into a file as kohya-ss/sd-scripts writes it."""
    lora, notices = _adapter(run, weights, step, torch.float32)
    lora = _in_dtype(_of_one_alpha(lora), dtype)
    ranks = sorted({str(tensor.shape[0]) for name, tensor in lora.state.items() if ".lora_A." in name})
    alpha = next(iter(lora.alphas.values()))
    # Readers show these; each module's own stand beside its tensors.
    told = {"ss_network_module": "networks.lora", "ss_output_name": out.stem, "ss_network_alpha": f"{alpha:g}"}
    told |= {"ss_network_dim": ranks[0]} if len(ranks) == 1 else {}
    told |= _BASES.get(_base_kind(section(read_config(Path(run).expanduser()), "model")), {})
    write_weights(out, to_kohya(lora), told)
    if any(".lora_magnitude_vector." in name for name in lora.state):
        # LyCORIS and the paper (equation 5) take the norms of the rows of W + BA: WebUI takes those of its columns,
        # ComfyUI those of the rows of W.
        notices += (
            "this DoRA is of no use in WebUI, which takes its magnitudes for those of inputs, and ComfyUI computes "
            "them its own way, so that its pictures differ; a merged model has them as they were trained: --format "
            "single-file",
        )
    return notices


def _adapter(
    run: str | Path, weights: Weights, step: int | None, dtype: torch.dtype
) -> tuple[Lora, tuple[str, ...]]:
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise UserError(f"no such run: {run}")
    if not is_run(folder):
        raise UserError(f"{run} is no run folder: it has neither config.yaml nor checkpoints/")
    with chosen_checkpoint(folder, step, weights) as checkpoint:
        if not (checkpoint.weights / LORA_FILE).is_file():
            raise UserError(f"{run} trained all weights and has no LoRA; use --format diffusers")
        parts = [path.name for path in sorted(checkpoint.weights.iterdir()) if path.is_dir()]
        if parts:
            raise UserError(
                f"{run} trained its {' and '.join(parts)} beside the LoRA, which these files do not hold: use "
                "--format diffusers"
            )
        lora = read_lora(checkpoint.weights)
    notices = (*checkpoint.notices, *_unlike_base(read_config(folder)))
    return _in_dtype(lora, dtype), notices


def _in_dtype(lora: Lora, dtype: torch.dtype) -> Lora:
    return Lora({key: tensor.to(dtype) for key, tensor in lora.state.items()}, lora.scales)


def _of_one_alpha(lora: Lora) -> Lora:
    """The same adapter with one alpha for all modules, the usual one: diffusers takes no others from such files."""
    shared = Counter(lora.alphas.values()).most_common(1)[0][0]
    state, scales = dict(lora.state), {}
    for name, alpha in lora.alphas.items():
        state[name + UP] = state[name + UP] * (alpha / shared)
        scales[name] = shared / len(state[name + DOWN])
    return Lora(state, scales)


def _unlike_base(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a pipeline of the base model does not sample as the run was trained."""
    model = section(config, "model")
    prediction = str(section(config, "objective").get("prediction", "epsilon"))
    if prediction == "flow":
        return ("it predicts the flow, which no pipeline of its base model samples: draw from the run itself",)
    own = scheduler_config(section(model, "scheduler"), prediction)
    try:
        base = load_scheduler(model.get("pretrained") or "", model.get("revision"))
    except UserError:  # gone, or a U-Net alone: as most are
        base = {}
    taken = "the flow" if base.get("_class_name") == FLOW_SCHEDULER else predicts(base)
    if predicts(own) == taken:
        return ()
    zero_snr = ', rescale_betas_zero_snr=True, timestep_spacing="trailing"' if "SNR" in predicts(own) else ""
    return (
        f"it predicts {predicts(own)}, and pipelines of its base model may take it to predict {taken}: set it, in "
        f'diffusers by a scheduler with prediction_type="{own["prediction_type"]}"{zero_snr}, in ComfyUI by '
        "ModelSamplingDiscrete",
    )


def _base_kind(model: Mapping[str, Any]) -> str:
    """As `SingleFile.kind`, of a run's base model; empty where it is gone or has no text encoder."""
    base, revision = model.get("pretrained") or "", model.get("revision")
    try:
        if (file := fetch_file(base, revision)) is not None:
            return open_file(file).kind
        folder = local_folder(base) or download(base, ["text_encoder*/config.json"], revision)
        if (folder / "text_encoder_2" / "config.json").is_file():
            return "xl"
        activation = json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_act"]
    except (UserError, OSError, ValueError, KeyError):
        return ""
    return "sd1" if activation == "quick_gelu" else "sd2"
