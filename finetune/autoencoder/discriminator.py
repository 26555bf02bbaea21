"""The adversary of the first stage: a discriminator that judges overlapping patches of a picture.

Isola et al. 2017 (arXiv 1611.07004), section 3.2.2 and appendix 6.1.2, as Esser et al. 2021 (arXiv 2012.09841)
train their decoder against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune import rng
from finetune.autoencoder.loss import hinge_discriminator_loss
from finetune.autoencoder.together import SharedBatchNorm
from finetune.autoencoder.zero import update
from finetune.distributed import World

KERNEL = 4
WIDEST = 8  # the last layers have this many times the width of the first


def smallest_side(layers: int) -> int:
    """Pixels that a picture's shorter side must have for the discriminator to give it one logit at least."""
    return 3 * 2**layers


class PatchDiscriminator(nn.Module):
    """Pictures to a map of logits, one for each patch; above 0 means real.

    `layers` convolutions of stride 2, then two of stride 1, all 4x4, with leaky ReLUs between them. Widths double
    up to eight times `width`. All but the first and the last are normalised over the batch at hand, in training and
    out of it, so a discriminator is its parameters and nothing else. At the start they are drawn from N(0, 0.02),
    those of norms from N(1, 0.02), and biases are 0 (appendix 6.2).

    Args:
        layers: of stride 2, at least 1.
        width: channels of the first.
        seed: the initial weights are a function of it alone.
        world: the processes that share a batch; None for one.
    """

    def __init__(self, layers: int = 3, width: int = 64, *, seed: int, world: World | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # layers draw from torch's global generator
            torch.manual_seed(rng.fold(seed, "discriminator weights"))
            self.blocks = nn.Sequential(*self._layers(layers, width, world))
            for module in self.blocks:
                if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                    module.weight.normal_(float(isinstance(module, nn.BatchNorm2d)), 0.02)
                    if module.bias is not None:
                        module.bias.zero_()

    @staticmethod
    def _layers(layers: int, width: int, world: World | None) -> list[nn.Module]:
        blocks: list[nn.Module] = [nn.Conv2d(3, width, KERNEL, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            out = width * min(2**layer, WIDEST)
            stride = 2 if layer < layers else 1
            blocks += [
                nn.Conv2d(channels, out, KERNEL, stride=stride, padding=1, bias=False),  # the norm has one
                SharedBatchNorm(out, world),
                nn.LeakyReLU(0.2),
            ]
            channels = out
        return [*blocks, nn.Conv2d(channels, 1, KERNEL, padding=1)]

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to logits [B, 1, h, w]."""
        logits_B1hw: Tensor = self.blocks(image_B3HW)
        return logits_B1hw


@dataclass(frozen=True)
class Adversary:
    """A discriminator, what trains it, and what its verdict weighs beside the reconstruction."""

    model: PatchDiscriminator
    optimizer: torch.optim.Optimizer
    weight: float
    world: World | None = None  # the processes that train it together; None for one

    def judge(self, image_B3HW: Tensor, bf16: bool) -> Tensor:
        """Logits in float32, [B, 1, h, w]."""
        with torch.autocast(image_B3HW.device.type, torch.bfloat16, enabled=bf16):
            logits: Tensor = self.model(image_B3HW)
        return logits.float()

    def learn(self, image_B3HW: Tensor, recon_B3HW: Tensor, *, max_grad_norm: float, bf16: bool) -> Tensor:
        """One step of its own on pictures and their (detached) reconstructions; returns its loss, a scalar.

        With several processes that is this one's share of it.

        Real and reconstructed pictures are judged apart: together they would share the norms' statistics, which
        tell the two from each other.
        """
        loss = hinge_discriminator_loss(self.judge(image_B3HW, bf16), self.judge(recon_B3HW.detach(), bf16))
        if self.world is not None:
            loss = loss / self.world.size
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        update(self.optimizer, list(self.model.parameters()), self.world, max_grad_norm)
        return loss.detach()
