"""What the U-Net is told of a sample, beside its noised latents and the time: one small interface for all tasks.

A condition travels in three steps. A reader's thread turns a sample of the shards into arrays (`read`); the step
makes tensors of them, with some samples' conditions left out for guidance (`inputs`); and the conditioner, inside
the module that a strategy wraps, makes what the U-Net takes (`forward`). Sampling goes the same way: what a user
asks for becomes a `Sample` as shards hold it.

text            captions, by one encoder or two
labels          what labels ask of data and model
spatial         what lies beside the latents, cell by cell
`finetune.tasks` has one file for each task, which puts conditioners together
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune import rng
from finetune.batch import Batch, Sample, array, member, picture, stack
from finetune.latents import LatentSpace

__all__ = [
    "Condition",
    "Conditioner",
    "Given",
    "Joint",
    "array",
    "batch_of",
    "call_unet",
    "draw",
    "dropped",
    "member",
    "picture",
    "stack",
    "to_device",
]

Condition = dict[str, Tensor]
"""What the U-Net is given, by these names, all of them optional:

context     [B, L, D] tokens for cross-attention
channels    [B, C, h, w] beside the noised latents
pooled      [B, D] text embedding that is added to the time's (SDXL)
time_ids    float32 [B, 6] original size, crop and target size, added likewise (SDXL)
labels      int64 [B] of the class embedding, which is added to the time's (the noise level of SD's upscaler)
"""


class Conditioner(nn.Module):
    """What a task's condition is made of. A task overrides what it needs.

    Attributes:
        members: of a sample, beside latents and record, that `read` needs.
        channels: that the condition adds to the U-Net's input.
        guided: whether the condition can be left out, so that there is guidance.
        asks: what a user gives when drawing pictures, as `finetune sample` names it.
    """

    members: tuple[str, ...] = ()
    channels: int = 0
    guided: bool = True
    asks: tuple[str, ...] = ()

    def read(self, sample: Sample) -> dict[str, np.ndarray]:
        """What the condition needs of one sample: arrays whose shapes depend on the bucket alone.

        Called by the loader's threads, so: numpy, no torch modules.

        Raises:
            UserError: the sample does not have it, or has something else.
        """
        return {}

    def inputs(self, batch: Batch, drop_B: Tensor, null_caption: str = "") -> dict[str, Tensor]:
        """What `forward` takes, on the CPU, B rows each.

        Args:
            drop_B: bool; whose condition is replaced by the null one (Ho & Salimans 2022, arXiv 2207.12598).
            null_caption: the null caption: the empty one, or what a picture is to be led away from.
        """
        return dict(batch.condition)

    def forward(self, inputs: Mapping[str, Tensor]) -> Condition:
        """The condition, on the device of the inputs."""
        return {}

    def parts(self) -> dict[str, nn.Module]:
        """Its models, trained or not, by the name of their folder in a checkpoint."""
        return {}

    def size(self, sample: Sample) -> tuple[int, int] | None:
        """(height, width) in pixels of the picture that a sample's condition asks for; None: any."""
        return None

    @property
    def reads(self) -> bool:
        """Whether there is anything to `read`."""
        return type(self).read is not Conditioner.read


class Joint(Conditioner):
    """Several conditioners as one; their channels come in the order given.

    Left out for guidance is what each of them leaves out.
    """

    def __init__(self, *each: Conditioner) -> None:
        super().__init__()
        self.each = nn.ModuleList(each)
        self.members = tuple(member for one in each for member in one.members)
        self.channels = sum(one.channels for one in each)
        self.guided = any(one.guided for one in each)
        self.asks = tuple(ask for one in each for ask in one.asks)

    @property
    def _all(self) -> list[Conditioner]:
        return list(self.each)  # type: ignore[arg-type]

    def read(self, sample: Sample) -> dict[str, np.ndarray]:
        return {name: array for one in self._all for name, array in one.read(sample).items()}

    def inputs(self, batch: Batch, drop_B: Tensor, null_caption: str = "") -> dict[str, Tensor]:
        return {name: each for one in self._all for name, each in one.inputs(batch, drop_B, null_caption).items()}

    def forward(self, inputs: Mapping[str, Tensor]) -> Condition:
        made = [one(inputs) for one in self._all]
        condition = {name: each for one in made for name, each in one.items()}
        if channels := [one["channels"] for one in made if "channels" in one]:
            condition["channels"] = torch.cat(channels, dim=1)
        return condition

    def parts(self) -> dict[str, nn.Module]:
        return {name: part for one in self._all for name, part in one.parts().items()}

    def size(self, sample: Sample) -> tuple[int, int] | None:
        return next((size for one in self._all if (size := one.size(sample)) is not None), None)


@dataclass(frozen=True)
class Given:
    """What a task's conditioner is built for.

    Attributes:
        width: features of the U-Net's cross-attention, None where it attends to nothing.
        latent_channels: of the autoencoder; downsample: pixels per latent cell along each side; space: scale and
            shift of its latents.
        classes: names of the labels in the shards, in their order; empty where these don't say.
        text: makes the conditioner of captions; None where the model has no text encoder.
        embedded_labels: rows of the U-Net's class embedding, 0 where it has none.
        seed: of weights that are made anew.
    """

    width: int | None
    latent_channels: int
    downsample: int
    space: LatentSpace
    classes: Sequence[str] = ()
    text: Callable[[], Conditioner] | None = None
    embedded_labels: int = 0
    seed: int = 0


def call_unet(unet: Any, noised_BCHW: Tensor, told: Tensor, condition: Condition) -> Tensor:
    """A `UNet2DConditionModel`'s output [B, C, h, w] under a condition, in the dtype of its weights or of autocast.

    Args:
        told: the time in the schedule's own terms, [B] or one for all.
    """
    dtype = next(unet.parameters()).dtype
    given = noised_BCHW
    if "channels" in condition:
        given = torch.cat([given, condition["channels"].to(given.dtype)], dim=1)
    arguments: dict[str, Any] = {}
    if "labels" in condition:
        arguments["class_labels"] = condition["labels"]
    if "time_ids" in condition:  # in float32 until they are embedded: bf16 does not hold the sizes
        pooled_BD = condition["pooled"].to(dtype)
        arguments["added_cond_kwargs"] = {"text_embeds": pooled_BD, "time_ids": condition["time_ids"]}
    context_BLD = condition.get("context")
    return unet(
        given.to(dtype),
        told,
        encoder_hidden_states=None if context_BLD is None else context_BLD.to(dtype),
        return_dict=False,
        **arguments,
    )[0]


def dropped(clock_B: Tensor, probability: float, seed: int) -> Tensor:
    """Bool [B]: whose condition is left out, for classifier-free guidance.

    Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1. The draw is the sample's own (its clock), the same on any
    rank.
    """
    return rng.uniform(seed, "caption-dropout", clock_B) < probability


def draw(sample: Sample, purpose: str) -> float:
    """A number in [0, 1) that is the sample's own at this visit."""
    return float(rng.uniform(sample.seed, purpose, torch.tensor([sample.clock])))


def batch_of(conditioner: Conditioner, samples: Sequence[Sample]) -> Batch:
    """A batch without moments, of pictures to be drawn; all samples have one bucket.

    Raises:
        UserError: see `Conditioner.read`.
    """
    clock_B = torch.tensor([sample.clock for sample in samples])
    return Batch(
        torch.empty(0),
        [sample.captions[0] for sample in samples],
        clock_B,
        clock_B,
        samples[0].bucket,
        condition=stack([conditioner.read(sample) for sample in samples]),
    )


def to_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
