"""The schema of a training run: typed dataclasses with their defaults.

`--help` prints the comments and docstrings that stand here; scripts rely on the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
