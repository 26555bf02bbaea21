"""The parts that turn a caption into a picture, gathered from a run folder, a diffusers folder or a hub id.

A run's checkpoint holds what was trained; the rest comes from where the run's `config.yaml` says: the base
model (`model.pretrained`), the autoencoder (`model.vae`, else the base model's, else the one that made the
shards), and `RUN/tokenizer` when the tokenizer was made for the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from finetune import UserError, first_line
from finetune.data.shards import Manifest
from finetune.latents import LatentSpace
from finetune.models.adapters import LORA_FILE, Lora, merge_lora, read_lora
from finetune.models.autoencoder import downsample_factor, encoder_sha256, load_autoencoder
from finetune.models.sources import fetch, local_folder
from finetune.models.text import load_text_encoder, load_tokenizer
from finetune.models.unet import load_unet

Weights = str  # of a run: `raw` are the last step's; `ema` its first average, `ema:NAME` a further one
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # samples models that predict the flow


@dataclass
class Components:
    """Everything that sampling and export need, in eval mode.

    `scheduler` is what `scheduler_config` returns, from which samplers are built; `latents` maps the U-Net's
    latents to the decoder's. `lora` is a LoRA run's adapter, already merged into `unet` and `text_encoder`.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict[str, Any]
    latents: LatentSpace
    source: str
    step: int | None = None  # of the checkpoint; None for a model that is no run
    guidance: float | None = None  # of the run's own sample grids
    guidance_rescale: float = 0.0
    size: tuple[int, int] | None = None  # height and width in pixels of the run's own sample grids
    lora: Lora | None = None
    notices: tuple[str, ...] = ()  # what the user should be told

    @property
    def is_flow(self) -> bool:
        """Whether the U-Net predicts a flow (see `scheduler_config`)."""
        return self.scheduler.get("_class_name") == FLOW_SCHEDULER

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along each side."""
        return downsample_factor(self.vae)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the run was trained at, else that the U-Net was made for."""
        if self.size is not None:
            return self.size
        cells = self.unet.config.sample_size or 64
        height, width = (cells, cells) if isinstance(cells, int) else cells
        return height * self.downsample, width * self.downsample


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run and the folder of the weights that were chosen in it."""

    folder: Path
    step: int
    weights: Path
    notices: tuple[str, ...] = ()


def load_components(
    source: str | Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    lora: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Components:
    """Load all parts of a run folder, of a diffusers pipeline's folder or of a hub id.

    Args:
        weights: a run's averaged weights or those of the last step (see `Weights`); without an average, `ema` gives
            the latter and a notice.
        step: a run's checkpoint; the latest complete one by default.
        lora: a file or folder of an adapter to merge, over what the run trained.
        dtype: of U-Net and text encoder. The autoencoder stays float32: SD's overflow in float16.

    Raises:
        UserError: something is missing or broken; the line says what and where.
    """
    folder = local_folder(source)
    if folder is not None and is_run(folder):
        parts = _from_run(folder, find_checkpoint(folder, step, weights))
    elif step is not None:
        raise UserError(f"{source} is no run folder: it has no checkpoint of step {step}")
    elif weights not in ("ema", "raw"):
        raise UserError(f"{source} is no run folder: it has no average {weights}")
    else:
        parts = _from_model(folder if folder is not None else str(source), revision)
    if lora is not None:
        merge_lora({"unet": parts.unet, "text_encoder": parts.text_encoder}, read_lora(lora))
    _require_text_to_image(parts)
    for module, wanted in ((parts.unet, dtype), (parts.text_encoder, dtype), (parts.vae, torch.float32)):
        module.to(device).requires_grad_(False).eval()
        if module.dtype != wanted:  # diffusers warns of any cast, one to the same dtype too
            module.to(wanted)
    return parts


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a training run's."""
    return (Path(folder) / "config.yaml").is_file() or (Path(folder) / "checkpoints").is_dir()


def complete_checkpoints(run: str | Path) -> dict[int, Path]:
    """A run's complete checkpoints by rising step: those with a `trainer.json`, which is written last."""
    found = {}
    for path in (Path(run) / "checkpoints").glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / "trainer.json").is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def latest_checkpoint(run: str | Path) -> Path:
    """The folder of a run's last complete checkpoint.

    Raises:
        UserError: there is none.
    """
    return find_checkpoint(Path(run)).folder


def find_checkpoint(run: Path, step: int | None = None, weights: Weights = "ema") -> Checkpoint:
    """Choose a checkpoint and its weights.

    Raises:
        UserError: the run has no complete checkpoint, none of this step, or not this average in it.
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
        name, notices = "weights", (f"{folder} has no averaged weights: taking those of the last step",)
    if name not in ("ema", "weights") and not (folder / name).is_dir():
        there = [path.name.replace("-", ":", 1) for path in sorted(folder.glob("ema*"))]
        raise UserError(f"{folder} has no average {weights}: choose {' or '.join([*there, 'raw'])}")
    if not (folder / name).is_dir():
        raise UserError(f"{folder} is broken: {name}/ is missing; choose another checkpoint")
    return Checkpoint(folder, chosen, folder / name, notices)


def scheduler_config(settings: Mapping[str, Any], prediction: str = "epsilon") -> dict[str, Any]:
    """The configuration of the scheduler that samples what a U-Net predicts, in diffusers' terms.

    A `DDIMScheduler` as Stable Diffusion has it; for `flow` a `FlowMatchEulerDiscreteScheduler`, told by
    `_class_name`.

    Args:
        settings: `beta_start`, `beta_end`, `beta_schedule`, `num_train_timesteps`, and any other argument of
            diffusers' schedulers.
        prediction: what the U-Net predicts: epsilon, v (v_prediction), x0 (sample) or flow.
    """
    if prediction == "flow":
        kept = {key: settings[key] for key in ("num_train_timesteps", "shift") if key in settings}
        return {"_class_name": FLOW_SCHEDULER, **kept}
    fixed = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    names = {"v": "v_prediction", "x0": "sample"}
    settings = {key: value for key, value in settings.items() if not key.startswith("_") and key != "shift"}
    return {**fixed, **settings, "prediction_type": names.get(prediction, prediction)}


def _from_run(run: Path, checkpoint: Checkpoint) -> Components:
    config = _read_config(run)
    model = _section(config, "model")
    base: str | None = model.get("pretrained")
    revision: str | None = model.get("revision")
    lora = read_lora(checkpoint.weights) if (checkpoint.weights / LORA_FILE).is_file() else None

    def origin(part: str) -> tuple[str | Path, str | None]:
        if (checkpoint.weights / part / "config.json").is_file():
            return checkpoint.weights / part, None
        if base is None:
            raise UserError(f"{checkpoint.weights} holds no {part} and {run / 'config.yaml'} names no base model")
        return base, revision

    place, unet_revision = origin("unet")
    unet = load_unet(place, revision=unet_revision)
    text_encoder = load_text_encoder(*origin("text_encoder"))
    if (run / "tokenizer").is_dir():
        tokenizer = load_tokenizer(run / "tokenizer")
    elif base is not None:
        tokenizer = load_tokenizer(base, revision)
    else:
        raise UserError(f"{run} has no tokenizer/ and its config.yaml names no base model")
    if lora is not None:
        merge_lora({"unet": unet, "text_encoder": text_encoder}, lora)
    shards = _section(config, "data").get("shards")
    manifest = _manifest(shards)
    trained_in = _trainer(checkpoint.folder).get("latents") or {}
    vae, latents = _autoencoder(model.get("vae"), base, revision, shards, manifest, trained_in)
    settings = _section(config, "sample")
    prediction = str(_section(config, "objective").get("prediction", "epsilon"))
    return Components(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler_config(_section(model, "scheduler"), prediction),
        latents=latents,
        source=str(run),
        step=checkpoint.step,
        guidance=settings.get("guidance"),
        guidance_rescale=float(settings.get("guidance_rescale") or 0.0),
        size=_size(settings, manifest),
        lora=lora,
        notices=checkpoint.notices,
    )


def _from_model(source: str | Path, revision: str | None) -> Components:
    tokenizer = load_tokenizer(source, revision)
    text_encoder = load_text_encoder(source, revision)
    vae = load_autoencoder(source, revision=revision)
    path = fetch(source, "scheduler", revision) / "scheduler" / "scheduler_config.json"
    try:
        scheduler = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{source} has no scheduler that can be read: {path}") from error
    return Components(
        unet=load_unet(source, revision=revision),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=_sampler_config(scheduler),
        latents=_space(vae),
        source=str(source),
    )


def _sampler_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a DDIM sampler can take from any scheduler's configuration; its offset and clipping are SD's."""
    if config.get("_class_name") == FLOW_SCHEDULER:
        return scheduler_config(config, "flow")
    known = set(DDIMScheduler._get_init_keys(DDIMScheduler))
    kept = {key: value for key, value in config.items() if key in known}
    # StableDiffusionPipeline sets these two in whatever it loads.
    kept |= {"steps_offset": 1, "clip_sample": False}
    return scheduler_config(kept, kept.get("prediction_type", "epsilon"))


def _manifest(shards: Any) -> Manifest | None:
    """What a run's shards say, where they are still there."""
    root = shards[0] if isinstance(shards, list) and shards else shards
    there = isinstance(root, str) and (Path(root) / "manifest.json").is_file()
    return Manifest.load(root) if there else None


def _size(settings: Mapping[str, Any], manifest: Manifest | None) -> tuple[int, int] | None:
    """Of a run's own sample grids: as configured, else the largest bucket's."""
    buckets = [shard.bucket for shard in manifest.shards if shard.bucket] if manifest is not None else []
    height, width = max(buckets, key=lambda size: size[0] * size[1], default=(None, None))
    height, width = settings.get("height") or height, settings.get("width") or width
    return (height, width) if height and width else None


def _trainer(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    path = checkpoint / "trainer.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; choose another checkpoint") from error
    return record if isinstance(record, dict) else {}


def _autoencoder(
    vae: str | None,
    base: str | None,
    revision: str | None,
    shards: Any,
    manifest: Manifest | None,
    trained_in: Mapping[str, Any],
) -> tuple[AutoencoderKL, LatentSpace]:
    """The decoder of a run and the latent space of its training.

    That is what the checkpoint says (`trained_in`); where it says nothing, what its shards say, if they are there.

    Raises:
        UserError: there is no autoencoder, or one whose encoder did not make the run's latents.
    """
    encoder = manifest.encoder if manifest is not None else None
    source: str | Path | None = vae or base
    if source is None:
        if encoder is None:
            raise UserError(
                f"no autoencoder: model.vae is null, there is no base model, and the shards at {shards} "
                "are gone or name none; put them back or set model.vae in the run's config.yaml"
            )
        source = encoder.locate(shards[0] if isinstance(shards, list) else shards)
    module = load_autoencoder(source, revision=None if vae else revision)
    if trained_in:
        made_by, found = str(trained_in["encoder_sha256"]), encoder_sha256(module)
        if made_by != found:
            raise UserError(
                f"wrong VAE: the run was trained on latents of another encoder ({made_by[:12]}) than that of "
                f"{source} ({found[:12]}); set model.vae in the run's config.yaml to the one that made them"
            )
        return module, LatentSpace(float(trained_in["scale"]), float(trained_in["shift"]))
    return module, _space(module) if encoder is None else LatentSpace(encoder.scale, encoder.shift)


def _space(vae: AutoencoderKL) -> LatentSpace:
    return LatentSpace(float(vae.config["scaling_factor"]), float(vae.config.get("shift_factor") or 0.0))


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run folder: config.yaml is missing")
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no run's configuration")
    return config


def _require_text_to_image(parts: Components) -> None:
    """Refuse parts that do not fit, and U-Nets that must be told more than a caption."""
    unet, vae = parts.unet.config, parts.vae.config
    needs = [name for name in ("class_embed_type", "addition_embed_type", "encoder_hid_dim") if unet.get(name)]
    if needs or unet["in_channels"] != unet["out_channels"]:
        more = needs[0] if needs else f"{unet['in_channels']} input channels"
        raise UserError(
            f"{parts.source} needs more than a caption ({more}): only text-to-image models can be sampled"
        )
    if unet["in_channels"] != vae["latent_channels"]:
        raise UserError(
            f"{parts.source}: the U-Net has {unet['in_channels']} channels and the autoencoder "
            f"{vae['latent_channels']}; set model.vae to the one that made the latents"
        )
    width = parts.text_encoder.config.hidden_size
    if unet["cross_attention_dim"] != width:
        raise UserError(
            f"{parts.source}: the U-Net attends to {unet['cross_attention_dim']} features, the text encoder "
            f"has {width}"
        )


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return dict(value) if isinstance(value, Mapping) else {}
