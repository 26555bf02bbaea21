"""The schema of a training run: typed dataclasses with their defaults, composed by Hydra.

Defaults live here; `conf/` holds choices. `compose` turns overrides into a `Config`, or into another command's
schema from its own folder of choices, and every mistake into one line. Components never see these classes:
`build` hands them plain values.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune import UserError

T = TypeVar("T")
N = TypeVar("N")

LARGEST = 1e15
"""No setting is larger: what is, is a slip, and overflows float32, clocks or indices."""
LARGEST_SIZE = 10**6
LARGEST_SIDE = 16384
"""Of a picture, in pixels."""


@dataclass
class RunConfig:
    """Where a run lives. The same command with the same folder continues the run."""

    name: str = "default"  # what W&B and the progress bar call it
    dir: str = "runs/${run.name}"  # its folder, on a disk that all machines share


@dataclass
class SchedulerConfig:
    """The noise schedule, in diffusers' terms; the default is Stable Diffusion's."""

    num_train_timesteps: int = 1000  # noise levels
    beta_start: float = 0.00085  # noise added at the first level
    beta_end: float = 0.012  # and at the last
    beta_schedule: str = "scaled_linear"  # scaled_linear | linear
    rescale_betas_zero_snr: bool = False  # the last timestep is pure noise (Lin et al. 2024, arXiv 2305.08891)
    timestep_spacing: str = "leading"  # which timesteps are sampled at: leading | trailing | linspace
    shift: float = 1.0  # of objective.prediction=flow, instead of betas: above 1 moves levels towards noise


@dataclass
class TextEncoderConfig:
    """A CLIP-style text transformer trained from scratch beside the U-Net."""

    vocab_size: int = 2048  # tokens that it knows
    max_length: int = 77  # tokens of a caption; longer ones are cut
    hidden_size: int = 64  # features of a token, which the U-Net attends to
    layers: int = 2  # transformer layers
    heads: int = 4  # of attention; they divide hidden_size
    embedding_std: float = 0.02  # of words at the start, CLIP's; 4 keeps all words of a caption apart in short runs


@dataclass
class ModelConfig:
    """`pretrained` names a model: a diffusers directory, a hub id, or a single file (.safetensors, .ckpt).

    Without it `unet` and `text_encoder` are built anew.
    """

    pretrained: str | None = None  # a folder, file or hub id; null: built anew
    revision: str | None = None  # of a hub id: branch, tag or commit
    tokenizer: str | None = None  # a folder with vocab.json and merges.txt; null: the pretrained model's, or CLIP's
    vae: str | None = (
        None  # decodes samples; null: the pretrained model's, else the one the shards were encoded with
    )
    # Arguments of diffusers' UNet2DConditionModel; in_channels and out_channels follow from latents and task. With
    # `pretrained` those that a group of choices gives are left out.
    unet: dict[str, Any] = field(default_factory=dict)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    pad_input: bool = False  # let a pretrained U-Net take a task's channels beside the latents, by zero weights
    train_text_encoder: bool = False  # a text encoder built anew is always trained
    gradient_checkpointing: bool = False  # activations computed twice: for SDXL half the memory, 1.3 times as long
    fast: bool = True  # on GPUs from Ampere on, kernels of our own
    graphs: bool = True  # with `fast`: micro-batches that wait for the host as CUDA graphs, in memory of their own
    channels_last: bool | None = None  # NHWC convolutions; null: where they are faster
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass
class AdapterConfig:
    """What is trained: all weights (`full`) or low-rank updates (`lora`)."""

    kind: str = "full"  # full | lora
    rank: int = 16  # of the update of each weight
    alpha: float = 16.0  # the update counts alpha / rank times
    dropout: float = 0.0  # share of a layer's inputs that the update does not see
    rank_stabilized: bool = False  # alpha / sqrt(rank), for high ranks (Kalajdzievski 2023, arXiv 2312.03732)
    ranks: dict[str, Any] = field(default_factory=dict)  # of parts: adapter.ranks.up_blocks=32; 0 leaves one alone
    dora: bool = False  # magnitudes of their own for weights (Liu et al. 2024, arXiv 2402.09353)
    # Modules of the U-Net whose names end so, linears and convolutions; of a text encoder always its attention.
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


@dataclass
class TaskConfig:
    """What the U-Net is conditioned on; `finetune/tasks/` has a file for each."""

    name: str = "text_to_image"  # one of those below
    dropout: float = 0.1  # share of samples whose condition is left out, for classifier-free guidance
    options: dict[str, Any] = field(default_factory=dict)  # the task's own: see `finetune train --help`


@dataclass
class ObjectiveConfig:
    """What the U-Net is trained to predict and how errors count; `finetune/diffusion.py` cites each."""

    prediction: str = "epsilon"  # epsilon | v | x0 | flow
    weighting: str = "uniform"  # uniform | min_snr | soft_min_snr | p2 | debiased
    gamma: float | None = None  # null: 5, of min_snr and soft_min_snr; 1, the exponent of p2
    p2_k: float = 1.0  # of p2: its weight is (k + snr) to the power of -gamma
    loss: str = "mse"  # mse | l1 | huber
    huber_delta: float = 1.0  # of huber: errors above it count as in l1
    timesteps: str = "uniform"  # uniform | logit_normal
    stratified: bool = False  # the timesteps of one step are spread evenly over ranks and micro-batches
    logit_mean: float = 0.0  # of logit_normal: above 0, more noise
    logit_std: float = 1.0  # of logit_normal: spread
    offset_noise: float = 0.0  # strength; 0: none
    input_perturbation: float = 0.0  # share of the noise; 0: none


@dataclass
class OptimConfig:
    """AdamW, or what `kind` names. The learning rate is a function of images seen."""

    lr: float = 1e-4  # learning rate, at its peak
    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of their squares
    eps: float = 1e-8  # added to the root of the latter
    weight_decay: float = 1e-2  # lr times this share of a weight is taken away each step
    max_grad_norm: float = 1.0  # 0: no clipping
    schedule: str = "constant"  # constant | cosine
    warmup_images: int = 0  # lr rises over so many
    final_lr_ratio: float = 0.0  # cosine ends at lr times this


@dataclass
class JointOptimConfig(OptimConfig):
    """Of the U-Net, and of the text encoder where that is trained; `distributed/optimizers.py` cites each kind."""

    kind: str = "adamw"  # adamw | adamw8bit | adafactor | lion | prodigy | schedule_free
    d0: float = 1e-6  # of prodigy: the first step size, times lr
    d_coef: float = 1.0  # of prodigy: a factor of the step size that it finds
    text_encoder_lr: float | None = None  # null: lr
    lr_ratios: dict[str, Any] = field(default_factory=dict)  # of parts: optim.lr_ratios.up_blocks=0.5 times lr


@dataclass
class EmaConfig:
    """Karras et al. 2022 (arXiv 2206.00364), appendix F: a half-life in images, shorter at the start of a run."""

    enabled: bool = True  # keep one
    halflife_images: int = 500_000  # after so many, a step counts half
    rampup_ratio: float = 0.05  # the half-life is at most this share of the images seen so far


@dataclass
class AveragesConfig(EmaConfig):
    """Averages of the weights; each takes 4 bytes a trained weight (under ZeRO shared by the ranks).

    Held-out losses and sample grids are those of the first, `ema`, which `--weights ema` takes as well. `kind` says
    what it is: that of `halflife_images`, or of the first of `sigma_rels`. These are power functions of time whose
    standard deviation is this share of the run (Karras et al. 2024, arXiv 2312.02696).
    """

    kind: str = "halflife"  # halflife | power
    halflives_images: dict[str, Any] = field(default_factory=dict)  # of further ones by name: --weights ema:NAME
    sigma_rels: list[float] = field(default_factory=list)  # --weights ema:power-0.1; kind=power's first is ema
    # Steps; 0: never. Averages of sigma_rels are kept then, in RUN/snapshots, 4 bytes a weight each; those of other
    # lengths are made of them (--ema 0.13). A dozen over the run are enough. Checkpoints are saved then too.
    snapshot_every: int = 0
    snapshot_keep: int | None = None  # the last ones; null: all


@dataclass
class DataConfig:
    """One set of latent shards (`shards`), or several mixed by weight (`sources`); folders or URLs."""

    shards: str | None = None  # one set: a folder, or s3://, gs://, az://, hf://, https:// or pipe: to it
    # data.sources.NAME.shards=..., .weight=1 (how often), .loss_weight=1 (how much a sample's loss counts)
    sources: dict[str, Any] = field(default_factory=dict)
    shuffle: bool = True  # false: in the order of the shards
    shuffle_window: int = 262_144  # samples of a bucket that are shuffled together; shards are shuffled as a whole
    lanes: int = 64  # as many nodes read shards of their own; fewer lanes read from fewer shards at a time
    readers: int = 1  # threads that read ahead; each asks the disk for a whole batch at once
    prefetch: int = 8  # micro-batches held ready
    text_states: bool = True  # use cached states of captions, where the shards have them and the encoder is frozen
    loss_masks: bool = False  # the loss counts where the shards' mask.png says; all over where a sample has none
    cache_dir: str | None = None  # for remote shards; null: $LDM_FINETUNE_CACHE, else the user's cache folder
    cache_gib: float | None = (
        None  # kept there at most, by all runs of a machine; null: 100, or 80% of what is free
    )


@dataclass
class StrategyConfig:
    kind: str = "ddp"  # ddp | zero
    stage: int = 0  # of zero: 1 | 2 | 3
    # none | cpu: of zero, moments and (stage 3) weights in host memory, where updates run
    # | nvme: of stage 3, the same, but masters and moments in files
    offload: str = "none"
    offload_path: str | None = None  # of nvme: a folder for these on a disk of each machine's own
    # fp32 | bf16: what ddp's gradients are summed over ranks in, with half the traffic; zero's: train.precision
    reduce_dtype: str = "fp32"


@dataclass
class LoopConfig:
    steps: int = 1000  # of the optimizer, in all
    global_batch: int = 16  # samples a step, over all ranks and micro-batches
    micro_batch: int | None = None  # samples in one rank's forward pass; null: its whole share of global_batch
    precision: str = "auto"  # auto: bf16 on a GPU that has it, else fp32 | fp32 | bf16 | fp16
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # CPU threads a rank; null: torch's choice


@dataclass
class CheckpointConfig:
    every: int = 500  # steps; a run's end is always saved
    keep: int = 3  # newest ones; older ones are removed
    resume: str = "auto"  # auto | never | a checkpoint folder


@dataclass
class CopiedCheckpointConfig(CheckpointConfig):
    """A copy in host memory is written while training goes on."""

    memory_gib: float | None = None  # host memory of a process for the copy that is written; null: half of the free


@dataclass
class SampleConfig:
    every: int = 500  # steps; 0: never
    prompts: list[str] | None = None  # null: captions of held-out samples
    seed: int = 0  # of the noise that pictures are drawn from
    steps: int = 25  # of the sampler
    guidance: float = 5.0  # 1: none
    guidance_rescale: float = 0.0  # Lin et al. 2024, eq. 15 and 16; 0.7 with zero terminal SNR
    height: int | None = None  # pixels; null: that of the bucket with most samples
    width: int | None = None  # pixels; null: that of the bucket with most samples


@dataclass
class ValidationConfig:
    every: int = 500  # steps; 0: never
    samples: int = 64  # held out of training, at most a tenth of the set
    timesteps: int = 4  # strata per sample


@dataclass
class TrackerConfig:
    wandb: bool = True  # metrics and pictures to W&B, beside RUN/metrics.jsonl
    project: str = "ldm-finetune"  # W&B's
    mode: str = "auto"  # auto: online when logged in, else offline | online | offline
    every: int = 10  # steps between two lines of metrics


@dataclass
class WatchConfig:
    """When a rank counts as lost; all ranks then end with exit code 69, for the launcher to start them again."""

    lost_s: float = 60.0  # without a sign of life: killed, frozen, its machine or link gone; 0: never
    # Without progress: hung in its data or a collective. Six times as long for what is long by nature: loading,
    # compiling (the first two steps), validating, sampling, saving. 0: never.
    stalled_s: float = 600.0
    start_s: float = 600.0  # for all ranks to come together


@dataclass
class Config:
    seed: int = 0  # of weights, noise, order and all else that is drawn
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: JointOptimConfig = field(default_factory=JointOptimConfig)
    ema: AveragesConfig = field(default_factory=AveragesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CopiedCheckpointConfig = field(default_factory=CopiedCheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)


def data_sources(data: Mapping[str, Any]) -> dict[str, Any]:
    """The sources of the section `data`, as they are given, by name; what a run takes of one is of the first."""
    if data.get("shards") is not None:
        return {"data.shards": {"shards": data["shards"]}}
    return dict(data.get("sources") or {})


def conf_dir() -> Path:
    """The folder of Hydra groups: inside the package in a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose(config_name: str, overrides: Sequence[str], schema: type[T], folder: str = "") -> tuple[T, DictConfig]:
    """Compose `conf/<folder>/<config_name>.yaml` with Hydra overrides, typed by `schema`.

    Returns:
        The typed config and the same, resolved, as a `DictConfig` for saving.

    Raises:
        UserError: an unknown key or choice (with the nearest known ones), a value of the wrong type, a missing
            mandatory value.
    """
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    GlobalHydra.instance().clear()
    choices = groups(config_name, folder)
    with initialize_config_dir(str(conf_dir() / folder), version_base="1.3", job_name=config_name):
        checked = _check_keys(config_name, overrides, schema, choices)
        try:
            composed = hydra_compose(config_name, checked)
            missing = sorted(OmegaConf.missing_keys(composed))
            if missing:
                raise UserError(f"no value for {', '.join(missing)}: give {missing[0]}=...")
            OmegaConf.resolve(composed)
            for key, node in list(nodes(composed)):
                if not str(node).strip():  # as a path it would be the current folder
                    raise UserError(
                        f"{key} is empty (a shell variable that is not set?): give a value or leave it out"
                    )
                if str(node).startswith("~/"):  # the shell expands it at the start of a word alone
                    OmegaConf.update(composed, key, str(Path(str(node)).expanduser()))
            typed = OmegaConf.to_object(composed)
        except MissingConfigException as error:
            raise UserError(_missing_choice(error, choices)) from None
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_first_lines(error)) from None
    assert isinstance(typed, schema)
    model = getattr(typed, "model", None)
    if isinstance(model, ModelConfig) and model.pretrained is not None:
        composed.model.unet = model.unet = _of_pretrained(model.unet, overrides)
    return typed, composed


def _of_pretrained(unet: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What the overrides ask of a pretrained U-Net; what a choice says (the default is model=tiny) builds one anew.

    Raises:
        UserError: they ask something of the text encoder, which is not built either.
    """
    asked: list[str] = []
    for override in (parse_override(text)[0] for text in overrides):
        key, value = override.key_or_group, override.value()
        if key == "model.text_encoder" or key.startswith("model.text_encoder."):
            raise UserError(
                f"{key}={override.get_value_element_as_str()} has no effect: it is of a text encoder that is built "
                "anew, and model.pretrained has its own; leave it out"
            )
        if key == "model.unet":
            asked = list(value) if isinstance(value, dict) else []
        elif key.startswith("model.unet."):
            asked.append(key.split(".")[2])
    return {name: unet[name] for name in asked if name in unet}


def groups(config_name: str = "train", folder: str = "") -> dict[str, list[str]]:
    """Config groups of a root file and their choices: those that its defaults list names."""
    root = conf_dir() / folder
    listed = OmegaConf.load(root / f"{config_name}.yaml").defaults
    names = [str(name) for entry in listed if isinstance(entry, DictConfig) for name in entry]
    return {name: sorted(path.stem for path in (root / name).glob("*.yaml")) for name in names}


def require(
    values: Mapping[str, N | None], holds: Callable[[N], bool], rule: str, *, most: float = LARGEST
) -> None:
    """Refuse values out of range; of None nothing is asked.

    Args:
        values: by config key.
        rule: ends the line, as in "train.steps=0 must be at least 1".
        most: no value may be larger; so none is infinite.

    Raises:
        UserError: names the first key that `holds` is false for, or whose value is too large.
    """
    for key, value in values.items():
        if value is None:
            continue
        if not holds(value):
            raise UserError(f"{key}={value} {rule}")
        if not value <= most:  # type: ignore[operator]
            raise UserError(f"{key}={value} must be at most {most:.15g}")


def require_sizes(sizes: Mapping[str, Any], most: float = LARGEST_SIZE) -> None:
    """Refuse what is no count of something in memory; of lists, one for each level of a model, each entry.

    Raises:
        UserError: names the first such key; of None nothing is asked.
    """
    for key, size in sizes.items():
        for each in size if isinstance(size, list | tuple) else [size]:
            if isinstance(each, list | tuple):
                require_sizes({key: each}, most)
            elif each is not None and (isinstance(each, bool) or not isinstance(each, int) or each < 1):
                raise UserError(f"{key}={each} must be a whole number of at least 1")
            elif each is not None:
                require({key: each}, lambda _: True, "", most=most)


def require_finite(values: Mapping[str, float]) -> None:
    """Refuse what is no number, or too large a one on either side of 0.

    Raises:
        UserError: names the first such key.
    """
    require(values, lambda value: value >= -LARGEST, "must be a finite number")


def require_bounds(watch: WatchConfig) -> None:
    """Refuse bounds that no watch can keep.

    Raises:
        UserError: names the key.
    """
    month = 30 * 86400
    start = {"watch.start_s": watch.start_s}
    require(start, lambda value: 0 < value <= month, f"must be greater than 0, and {month} at most (30 days)")
    bounds = {"watch.lost_s": watch.lost_s, "watch.stalled_s": watch.stalled_s}
    rule = f"is in seconds: 1 to {month} (30 days), or 0 for never"
    require(bounds, lambda value: value == 0 or 1 <= value <= month, rule)


def require_choice(values: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Refuse names that are not known: `values` holds the name and the known ones by config key.

    Raises:
        UserError: names the first such key and what it may be.
    """
    for key, (value, known) in values.items():
        if value not in known:
            raise UserError(f"{key}={value} is not known: choose one of {', '.join(known)}")


def _check_keys(
    config_name: str, overrides: Sequence[str], schema: type, choices: Mapping[str, list[str]]
) -> list[str]:
    """Refuse an override that names nothing, with the nearest name that does.

    Returns:
        The overrides, where those of free-form keys (`model.unet.*`) may add what is not there yet.
    """
    there = dict(nodes(OmegaConf.structured(schema)))
    names = {*there, *choices}
    checked = []
    for text in overrides:
        override, text = parse_override(text)
        key = override.key_or_group
        if override.is_sweep_override() or (key in choices and isinstance(override.value(), list)):
            raise UserError(f"'{text}' names several values: a run takes one")
        value = override.value()
        if isinstance(there.get(key), ListConfig) and isinstance(value, str) and not value.startswith("${"):
            raise UserError(f"{key}={value} must be a list: {_quoted_list(key, value)}")
        free = is_free_form(key, schema)
        checked.append(f"++{text}" if free and text.startswith(key) else text)
        if key in names or free:
            continue
        nearest = difflib.get_close_matches(key, names, n=1) or [
            name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]
        ]
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"`finetune {config_name} --help` lists the keys"
        raise UserError(f"unknown override '{key}': {hint}")
    return checked


def is_free_form(key: str, schema: type) -> bool:
    """Whether a dotted key is, or is inside, a dictionary of the schema that takes any key (`model.unet.*`)."""
    there = nodes(OmegaConf.structured(schema))
    free = [name for name, node in there if isinstance(node, DictConfig) and not is_section(node)]
    return any(key == name or key.startswith(f"{name}.") for name in free)


def quoted(value: str) -> str:
    """A text as an override says it, whatever is in it; an interpolation (`${run.name}`) stays one."""
    return QuotedString(value, Quote.double).with_quotes()


def parse_override(text: str) -> tuple[Override, str]:
    """An override as Hydra reads it, and its text, quoted where a path's signs (~, =, umlauts) ask for it.

    Raises:
        UserError: it can't be read.
    """
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text), text
    except HydraException:
        key, equals, value = text.partition("=")
        example = _quoted_list(key, value) if value.startswith("[") else f"'{key}=\"...\"'"
        quotes = f"quote what has other signs than letters, digits and /-_.: {example}"
        if not equals or not value or value[0] in "[{":
            hint = quotes if equals and value else "an override is KEY=VALUE"
            raise UserError(f"cannot read the override '{text}': {hint}") from None
    text_quoted = f"{key}={quoted(value)}"
    try:
        return parser.parse_override(text_quoted), text_quoted
    except HydraException:
        raise UserError(f"cannot read the override '{text}': {quotes}") from None


def _quoted_list(key: str, value: str) -> str:
    """An override of a list of texts as the shell takes it, of a value that may lack brackets and quotes."""
    texts = [each.strip() for each in value.removeprefix("[").removesuffix("]").split(",")]
    items = [each if re.fullmatch(r'"[^"]*"' + r"|'[^']*'", each) else quoted(each) for each in texts]
    return shlex.quote(f"{key}=[{','.join(items)}]")


def nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything, sections included."""
    for name in map(str, config):
        node = "???" if OmegaConf.is_missing(config, name) else config._get_node(name)
        yield f"{prefix}{name}", node
        if is_section(node):
            yield from nodes(node, f"{prefix}{name}.")


def is_section(node: Any) -> bool:
    """Whether a node is a dataclass of the schema, not a value (free-form dictionaries are values)."""
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is not dict


def written(value: Any) -> str:
    """A default as an override says it: `null`, `true`, `[1,2]`."""
    if isinstance(value, str):
        return value
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value._value()
    return plain if isinstance(plain, str) else json.dumps(plain, separators=(",", ":")).replace('"', "")


def _missing_choice(error: MissingConfigException, known: Mapping[str, list[str]]) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if choices := known.get(group):
        nearest = difflib.get_close_matches(choice, choices, n=1)
        listed = f"choose one of {', '.join(choices)}"
        if nearest:  # a long list would hide the name that is meant
            listed = f"did you mean {nearest[0]}? " + (listed if len(listed) < 200 else "--help lists all of them")
        return f"{group}={choice} is not known: {listed}"
    return _first_lines(error)


# What OmegaConf says of a value of the wrong type: what it may be.
_TYPES = {
    r"could not be converted to Integer": "must be a whole number",
    r"could not be converted to Float": "must be a number",
    r"is not a valid bool": "must be true or false",
    r"is not Optional": "must have a value: leave it out for its default",
}


def _first_lines(error: Exception) -> str:
    """The message of a Hydra or OmegaConf error without its dump of types and environment hints."""
    told, text = error.__cause__ or error, str(error.__cause__ or error)
    key = getattr(told, "full_key", None)
    may_be = next((words for pattern, words in _TYPES.items() if pattern in text), None)
    if key and may_be:
        value = re.search(r"Value '(.*?)'", text)
        return f"{key}={value[1] if value else 'null'} {may_be}"
    cause = error.__cause__ if error.__cause__ and str(error.__cause__) != "None" else error
    noise = ("object_type", "reference_type", "Set the environment", "See https")
    lines = [line.strip() for line in str(cause).splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(noise)).replace("full_key:", "key")
