"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685, eq. 3) as one product with W + s B A.

peft computes x W + s (x A) B: three passes more over maps of tokens, forward, and six backward, each bound by
memory, for few operations. Weights are small beside the tokens of a batch: their sum costs next to nothing, and
gradients of A and B follow from that of the sum, by one more product of the kind that full fine-tuning makes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn


class Linear(lora.Linear):
    """peft's adapted linear layer with one plain adapter, without dropout."""

    gathered_whole = True  # under ZeRO-3: it takes weights from the layers inside without calling them

    def sum(self) -> Tensor | None:
        """The weight [O, I] that the layer multiplies by; None while the adapter is switched off or merged."""
        if self.disable_adapters or self.merged:
            return None
        (name,) = self.active_adapters
        base: Any = self.get_base_layer()
        with torch.autocast(base.weight.device.type, enabled=False):  # an update would drown in bf16's last bit
            down_RI, up_OR = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
            if base.weight.dtype == torch.float32:
                return torch.addmm(base.weight, up_OR, down_RI, alpha=self.scaling[name])
            return base.weight + (self.scaling[name] * (up_OR @ down_RI)).to(base.weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight_OI = self.sum()
        if weight_OI is None:
            return super().forward(x, *args, **kwargs)
        return F.linear(x, weight_OI, self.get_base_layer().bias)


def takes(layer: Any) -> bool:
    """Whether `Linear` computes what this layer does."""
    return (
        type(layer) is lora.Linear
        and type(layer.get_base_layer()) is nn.Linear
        and len(layer.lora_A) == 1
        and list(layer.active_adapters) == list(layer.lora_A)
        and not layer.lora_variant  # DoRA
        and not layer.fan_in_fan_out
        and not any(layer.lora_bias.values())
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    )
