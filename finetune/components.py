"""The parts that turn a condition into a picture, gathered from a run folder, a diffusers folder or a hub id.

A run's checkpoint holds what was trained; the rest comes from where the run's `config.yaml` says: the base
model (`model.pretrained`), the autoencoder (`model.vae`, else the base model's, else the one that made the
shards), and `RUN/tokenizer` when the tokenizer was made for the run. What it is conditioned on stands in
`RUN/task.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from finetune import UserError, first_line, tasks
from finetune.conditioning import Conditioner, Given
from finetune.conditioning.text import Text, TextXL
from finetune.config import data_sources
from finetune.data.loader import largest_bucket
from finetune.data.shards import MANIFEST, Manifest
from finetune.latents import LatentSpace
from finetune.models.adapters import LORA_FILE, Lora, merge_lora, read_lora
from finetune.models.autoencoder import (
    Autoencoder,
    downsample_factor,
    encoder_sha256,
    latent_channels,
    load_autoencoder,
)
from finetune.models.kohya import is_kohya, read_kohya
from finetune.models.schedulers import FLOW_SCHEDULER, load_scheduler, sampler_config, scheduler_config
from finetune.models.single_file import open_file
from finetune.models.sources import download, fetch_file, has_part, local_folder
from finetune.models.text import (
    fitting,
    load_text_encoder,
    load_text_encoder_2,
    load_tokenizer,
    take_trained,
    zeroes_null_caption,
)
from finetune.models.unet import context_width, load_unet
from finetune.posthoc import chosen_checkpoint
from finetune.runs import Checkpoint, Weights, is_run, is_there
from finetune.tasks.super_resolution import lowres
from finetune.tasks.text_to_image import caption_conditioner, caption_conditioner_xl, load_captions

SAMPLING_FILE = "sampling.json"


@dataclass
class Components:
    """Everything that sampling and export need, in eval mode.

    `conditioner` is what the task makes of a condition; `scheduler` is what `scheduler_config` returns, from which
    samplers are built; `latents` maps the U-Net's latents to the decoder's. `lora` is a LoRA run's adapter, already
    merged into the U-Net and the text encoder.
    """

    unet: UNet2DConditionModel
    vae: Autoencoder
    conditioner: Conditioner
    task: tasks.Task
    scheduler: dict[str, Any]
    latents: LatentSpace
    source: str
    step: int | None = None  # of the checkpoint; None for a model that is no run
    guidance: float | None = None  # of the run's own sample grids, or what an export of it says
    guidance_rescale: float = 0.0
    size: tuple[int, int] | None = None  # height and width in pixels of the run's own sample grids
    lora: Lora | None = None
    notices: tuple[str, ...] = ()  # what the user should be told

    @property
    def text(self) -> Text | None:
        """What captions are encoded by; None where the model takes none."""
        return next((part for part in self.conditioner.modules() if isinstance(part, Text)), None)

    @property
    def text_encoder(self) -> CLIPTextModel:
        assert self.text is not None
        return self.text.encoder  # type: ignore[return-value]

    @property
    def tokenizer(self) -> CLIPTokenizer:
        assert self.text is not None
        return self.text.tokenizer

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


def load_components(
    source: str | Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
) -> Components:
    """Load all parts of a run folder, of a diffusers pipeline's folder, of a hub id, or of a single file.

    Args:
        weights: a run's averaged weights or those of the last step (see `Weights`); without an average, `ema` gives
            the latter and a notice.
        step: a run's checkpoint; the latest complete one by default.
        loras: files or folders of adapters to merge, one after the other, over what the run trained, and how many
            times each counts.
        dtype: of U-Net and text encoder. The autoencoder stays float32: SD's overflow in float16.
        tokenizer: a folder whose tokenizers are taken, where a model comes without.

    Raises:
        UserError: something is missing or broken; the line says what and where.
    """
    folder = local_folder(source)
    if revision is not None and (folder is not None or Path(source).expanduser().is_file()):
        raise UserError(f"--revision {revision}: {source} is here, and only models on the hub have revisions")
    if folder is not None and is_run(folder):
        parts = _from_checkpoint(folder, step, weights, tokenizer)
    elif step is not None:
        raise UserError(f"{source} is no run folder: it has no checkpoint of step {step}")
    elif weights not in ("ema", "raw"):
        raise UserError(f"{source} is no run folder: it has no average {weights}")
    else:
        parts = _from_model(folder if folder is not None else str(source), revision, tokenizer)
    modules = {"unet": parts.unet, **parts.conditioner.parts()}
    for path, strength in loras:
        lora = read_kohya(path, modules) if is_kohya(path) else read_lora(path)
        merge_lora(modules, lora.times(strength))
    _check_fit(parts)
    parts.conditioner.to(device).requires_grad_(False).eval()
    wanted_dtypes = [(parts.unet, dtype), (parts.vae, torch.float32)]
    if parts.text is not None:
        wanted_dtypes += [(part, dtype) for part in parts.text.parts().values()]
    for module, wanted in wanted_dtypes:
        module.to(device).requires_grad_(False).eval()
        if module.dtype != wanted:  # diffusers warns of any cast, one to the same dtype too
            module.to(wanted)
    return parts


@dataclass(frozen=True)
class _Origins:
    """Where the parts of a run are: what it trained in its checkpoint, the rest at its base model's.

    `words`: a folder whose tokenizers are taken in place of the base model's.
    """

    run: Path
    weights: Path
    base: str | None
    revision: str | None
    words: str | Path | None

    def of(self, part: str) -> tuple[str | Path, str | None]:
        """Where a part is, and the revision of it.

        Raises:
            UserError: nowhere.
        """
        if (self.weights / part / "config.json").is_file():
            return self.weights / part, None
        if self.base is None and (self.weights / "vae").is_dir():
            raise UserError(
                f"{self.run} is a run of finetune autoencoder, which draws nothing by itself: its result is "
                f"{self.run / 'vae'}, for `data-tools encode --vae` and model.vae"
            )
        if self.base is None:
            raise UserError(f"{self.weights} holds no {part} and {self.run / 'config.yaml'} names no base model")
        return self.base, self.revision

    @property
    def has_text(self) -> bool:
        """Whether captions are encoded."""
        if (self.run / "tokenizer").is_dir() or (self.weights / "text_encoder").is_dir():
            return True
        return self.base is not None and has_part(self.base, "text_encoder", self.revision)

    def text(self) -> Conditioner:
        """What encodes captions.

        Raises:
            UserError: a part of it is nowhere, or they do not fit.
        """
        base, revision, words = self.base, self.revision, self.words
        trained = self.weights / "text_encoder"
        if base is not None and (trained / "config.json").is_file():
            # Of XL's first encoder the last layer is not trained: a checkpoint has all but that.
            encoder = load_text_encoder(base, revision)
            take_trained(encoder, trained)
        else:
            encoder = load_text_encoder(*self.of("text_encoder"))
        own = self.run / "tokenizer"
        if own.is_dir():
            return caption_conditioner(fitting(load_tokenizer(own), encoder, self.run), encoder)
        if base is None:
            raise UserError(
                f"{self.run} has no tokenizer/ and its config.yaml names no base model: put that folder back, the "
                "text encoder knows no other words"
            )
        tokenizer = fitting(load_tokenizer(base, revision, words=words), encoder, base)
        if not has_part(base, "text_encoder_2", revision):
            return caption_conditioner(tokenizer, encoder)
        encoder_2 = load_text_encoder_2(*self.of("text_encoder_2"))
        tokenizer_2 = fitting(load_tokenizer(base, revision, "tokenizer_2", words=words), encoder_2, base)
        zero_null = zeroes_null_caption(base, revision)
        return caption_conditioner_xl(tokenizer, encoder, tokenizer_2, encoder_2, zero_null=zero_null)


def _from_checkpoint(run: Path, step: int | None, weights: Weights, words: str | Path | None) -> Components:
    """A run's parts, all of one checkpoint, though training may go on and remove old ones meanwhile.

    What is missing of one would be taken for what was not trained, and come from the base model.

    Raises:
        UserError: something is missing or broken, or the checkpoint was removed.
    """
    for is_last in (False, False, True):
        with chosen_checkpoint(run, step, weights) as checkpoint:
            fault: UserError | None = None
            try:
                parts = _from_run(run, checkpoint, words)
            except UserError as error:
                fault = error
            if is_there(checkpoint.folder / "trainer.json"):
                if fault is None:
                    return parts
                raise UserError(f"{fault}{_begun_elsewhere(run, str(fault))}") from fault
        if step is not None or is_last:
            break
    raise UserError(
        f"{checkpoint.folder} was removed while it was read, since the run goes on and keeps checkpoint.keep of "
        "them: choose a later one"
    )


def _from_run(run: Path, checkpoint: Checkpoint, words: str | Path | None) -> Components:
    config = read_config(run)
    model, settings = section(config, "model"), section(config, "sample")
    base, revision = model.get("pretrained"), model.get("revision")
    origins = _Origins(run, checkpoint.weights, base, revision, words or model.get("tokenizer"))
    lora = read_lora(checkpoint.weights) if (checkpoint.weights / LORA_FILE).is_file() else None
    place, unet_revision = origins.of("unet")
    unet = load_unet(place, revision=unet_revision)
    has_text = origins.has_text
    shards = _shards(section(config, "data"))
    trained_in = _trainer(checkpoint.folder).get("latents") or {}
    vae, latents = _autoencoder(model.get("vae"), base, revision, shards, trained_in)
    prediction = str(section(config, "objective").get("prediction", "epsilon"))
    task = tasks.Task.load(run) or tasks.Task()
    conditioner = _conditioner(task, unet, vae, latents, origins.text if has_text else None)
    load_own_parts(conditioner, checkpoint.weights)
    if lora is not None:
        merge_lora({"unet": unet, **conditioner.parts()}, lora)
    return Components(
        unet=unet,
        vae=vae,
        conditioner=conditioner,
        task=task,
        scheduler=scheduler_config(section(model, "scheduler"), prediction),
        latents=latents,
        source=str(run),
        step=checkpoint.step,
        guidance=settings.get("guidance"),
        guidance_rescale=float(settings.get("guidance_rescale") or 0.0),
        size=_size(settings, [each for each in shards.values() if each is not None]),
        lora=lora,
        notices=checkpoint.notices,
    )


def _begun_elsewhere(run: Path, error: str) -> str:
    """What to add to an error of a run whose `config.yaml` names a relative path that is not here."""
    config = read_config(run)
    model = section(config, "model")
    sources = [each for each in data_sources(section(config, "data")).values() if isinstance(each, Mapping)]
    named = [
        model.get("pretrained"),
        model.get("vae"),
        model.get("tokenizer"),
        *(one.get("shards") for one in sources),
    ]
    for path in [str(each) for each in named if each]:
        is_missing = path in error and ("no such f" in error or "are gone" in error)
        if is_missing and not Path(path).expanduser().is_absolute() and not Path(path).exists():
            return (
                f"; as a path, {path} in {run / 'config.yaml'} begins where the run was started: go to that folder"
            )
    return ""


def _from_model(source: str | Path, revision: str | None, words: str | Path | None) -> Components:
    unet = load_unet(source, revision=revision)
    vae = load_autoencoder(source, revision=revision)
    space = space_of(vae)
    folder = folder_beside(source, revision)
    task = (tasks.Task.load(folder) if folder is not None else None) or _task_of(unet, vae)

    def text() -> Conditioner:
        return load_captions(source, revision, words=words)

    # What has no part of a name and no task of its own is told so by what can't be loaded.
    has_text = task.name == "text_to_image" or has_part(source, "text_encoder", revision)
    conditioner = _conditioner(task, unet, vae, space, text if has_text else None)
    load_own_parts(conditioner, folder if folder is not None else Path(source))
    scheduler = load_scheduler(source, revision)
    notices: tuple[str, ...] = ()
    file = fetch_file(source, revision)
    if file is not None and "prediction_type" not in scheduler and open_file(file).kind == "sd2":
        notices = (
            f"{file} does not say what its U-Net predicts, and models of Stable Diffusion 2.x differ: taken for "
            f"the noise; for v, put its configuration beside it as {file.with_suffix('.yaml').name}",
        )
    return Components(
        unet=unet,
        vae=vae,
        conditioner=conditioner,
        task=task,
        scheduler=sampler_config(scheduler),
        latents=space,
        source=str(source),
        **(read_guidance(folder) if folder is not None else {}),
        notices=notices,
    )


def folder_beside(source: str | Path, revision: str | None = None) -> Path | None:
    """A model's folder, with what an export has beside diffusers' parts: its task and the parts of that.

    A hub id's is downloaded, these files alone. None of a single file, which has none.
    """
    if fetch_file(source, revision) is not None:
        return None
    return local_folder(source) or download(
        str(source), [tasks.TASK_FILE, SAMPLING_FILE, "conditioner/*"], revision
    )


def write_guidance(folder: Path, parts: Components) -> None:
    """Say beside a model how it is best drawn from, if the run said so: for `read_guidance`."""
    if parts.guidance is not None:
        said = {"guidance": float(parts.guidance), "guidance_rescale": parts.guidance_rescale}
        (folder / SAMPLING_FILE).write_text(json.dumps(said, indent=1) + "\n")


def read_guidance(folder: Path) -> dict[str, Any]:
    """What `write_guidance` wrote; nothing where it wrote nothing.

    Raises:
        UserError: the file is broken.
    """
    path = folder / SAMPLING_FILE
    try:
        said = json.loads(path.read_text())
        return {name: float(said[name]) for name in ("guidance", "guidance_rescale")}
    except (FileNotFoundError, NotADirectoryError):  # a single file has none beside it
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); mend or delete it") from error


def _shards(data: Mapping[str, Any]) -> dict[str, Manifest | None]:
    """Where a run's sets of shards are, in the order of its sources, and what those say that are still there."""
    given = [each for each in data_sources(data).values() if isinstance(each, Mapping)]
    roots = [str(each["shards"]) for each in given if each.get("shards") is not None]
    return {root: Manifest.load(root) if (Path(root) / MANIFEST).is_file() else None for root in roots}


def _size(settings: Mapping[str, Any], sets: Sequence[Manifest]) -> tuple[int, int] | None:
    """Of a run's own sample grids: as configured, else that of the bucket with most samples."""
    height, width = largest_bucket(sets) or (None, None)
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
    shards: Mapping[str, Manifest | None],
    trained_in: Mapping[str, Any],
) -> tuple[Autoencoder, LatentSpace]:
    """The decoder of a run and the latent space of its training.

    That is what the checkpoint says (`trained_in`); where it says nothing, what the first of its `shards` says, if
    it is there: all of them are of one encoder.

    Raises:
        UserError: there is no autoencoder, or one whose encoder did not make the run's latents.
    """
    root, manifest = next(iter(shards.items()), (None, None))
    encoder = manifest.encoder if manifest is not None else None
    source: str | Path | None = vae or base
    if source is None:
        if root is None or encoder is None:
            raise UserError(
                f"no autoencoder: model.vae is null, there is no base model, and the shards at {root} "
                "are gone or name none; put them back or set model.vae in the run's config.yaml"
            )
        source = encoder.locate(root)
    module = load_autoencoder(source, revision=None if vae else revision)
    if trained_in:
        made_by, found = str(trained_in["encoder_sha256"]), encoder_sha256(module)
        if made_by != found:
            raise UserError(
                f"wrong VAE: the run was trained on latents of another encoder ({made_by[:12]}) than that of "
                f"{source} ({found[:12]}); set model.vae in the run's config.yaml to the one that made them"
            )
        return module, LatentSpace(float(trained_in["scale"]), float(trained_in["shift"]))
    return module, space_of(module) if encoder is None else LatentSpace(encoder.scale, encoder.shift)


def space_of(vae: Autoencoder) -> LatentSpace:
    """Scale and shift of an autoencoder's latents, as its configuration says."""
    return LatentSpace(float(vae.config["scaling_factor"]), float(vae.config.get("shift_factor") or 0.0))


def read_config(run: Path) -> dict[str, Any]:
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


def _conditioner(
    task: tasks.Task,
    unet: UNet2DConditionModel,
    vae: Autoencoder,
    space: LatentSpace,
    text: Callable[[], Conditioner] | None,
) -> Conditioner:
    width = context_width(unet.config)
    given = Given(
        width=width,
        latent_channels=latent_channels(vae),
        downsample=downsample_factor(vae),
        space=space,
        classes=task.classes,
        text=text if width is not None else None,
        embedded_labels=int(unet.config.get("num_class_embeds") or 0),
    )
    return tasks.make(task.name, task.options, given)


def _task_of(unet: UNet2DConditionModel, vae: Autoencoder) -> tasks.Task:
    """What a model that is no run is conditioned on, as its U-Net's input tells."""
    config, latents = unet.config, latent_channels(vae)
    more = int(config["in_channels"]) - int(config["out_channels"])
    if more == latents + 1:
        return tasks.Task("inpainting")
    if more == 3 and config.get("num_class_embeds"):
        return tasks.Task("super_resolution", {"noise_levels": 350})
    return tasks.Task("text_to_image" if context_width(unet.config) is not None else "unconditional")


def own_parts(conditioner: Conditioner) -> dict[str, torch.nn.Module]:
    """What a task trains beside U-Net and text encoders, by name."""
    return {name: part for name, part in conditioner.parts().items() if not name.startswith("text_encoder")}


def load_own_parts(conditioner: Conditioner, folder: Path) -> None:
    """Load what a task's own parts learnt, each from the folder of its name.

    Raises:
        UserError: one is not there, or of another shape than the task's settings say.
    """
    for name, part in own_parts(conditioner).items():
        path = folder / name / "model.safetensors"
        try:
            part.load_state_dict(load_file(path))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: choose another checkpoint") from None
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{path} does not fit the task: {first_line(error)}") from error


def _check_fit(parts: Components) -> None:
    """Refuse parts that do not fit, and U-Nets that must be told more than the task tells them."""
    unet, latents = parts.unet.config, latent_channels(parts.vae)
    if unet["out_channels"] != latents:
        raise UserError(
            f"{parts.source}: the U-Net has {unet['out_channels']} channels and the autoencoder "
            f"{latents}; set model.vae to the one that made the latents"
        )
    wanted = latents + parts.conditioner.channels
    if unet["in_channels"] != wanted:
        raise UserError(
            f"{parts.source}: the U-Net takes {unet['in_channels']} input channels, task={parts.task.name} makes "
            f"{wanted}: it was trained for another task"
        )
    if parts.text is not None and context_width(unet) != parts.text.width:
        raise UserError(
            f"{parts.source}: the U-Net attends to {context_width(unet)} features, the text encoder "
            f"has {parts.text.width}"
        )
    try:
        require_told(parts.unet, parts.conditioner, parts.task.name)
    except UserError as error:
        raise UserError(f"{parts.source}: {error}") from None


def require_told(unet: UNet2DConditionModel, conditioner: Conditioner, task: str) -> None:
    """Refuse a U-Net that must be told more than its task tells it.

    Raises:
        UserError: names the setting of the U-Net that asks for it.
    """
    config, enlarges = unet.config, lowres(conditioner)
    asks = []
    if unet.class_embedding is not None and not (enlarges is not None and enlarges.noise_levels):
        asks += ["num_class_embeds" if config.get("class_embed_type") is None else "class_embed_type"]
    added = config.get("addition_embed_type")
    is_xl = any(isinstance(part, TextXL) for part in conditioner.modules())
    if added not in (None, "text") and not (added == "text_time" and is_xl):  # text: of the context alone
        asks += ["addition_embed_type"]
    if config.get("time_cond_proj_dim") is not None:  # of how much guidance was distilled into it
        asks += ["time_cond_proj_dim"]
    if asks:
        raise UserError(
            f"the U-Net has {asks[0]}={config[asks[0]]}: it must be told more than task={task} tells it here; "
            "choose another model or task"
        )


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return dict(value) if isinstance(value, Mapping) else {}
