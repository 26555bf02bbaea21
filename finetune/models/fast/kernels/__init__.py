"""Triton kernels with their gradients. Importing needs Triton.

norm            group norm with a shift before it and SiLU after it
layer_norm      the end of one residual branch and the layer norm before the next
geglu           GEGLU with its projection's bias
attention       of queries to few keys
self_attention  of many tokens to one another: the backward pass, for heads of 40 features
heads           what both load, store and multiply
join            the end of a residual block; a skip connection taken up
softmax         of attention's scores, forward alone
add             a gradient in half precision added to a float32 sum
"""

from __future__ import annotations

import triton
from torch import Tensor

from finetune.models.fast.kernels.add import add_
from finetune.models.fast.kernels.attention import attention, takes_attention
from finetune.models.fast.kernels.geglu import geglu
from finetune.models.fast.kernels.join import cat, join
from finetune.models.fast.kernels.layer_norm import add_norm
from finetune.models.fast.kernels.norm import group_norm
from finetune.models.fast.kernels.self_attention import self_attention, takes_self_attention
from finetune.models.fast.kernels.softmax import softmax

__all__ = [
    "add_",
    "add_norm",
    "attention",
    "cat",
    "geglu",
    "group_norm",
    "join",
    "self_attention",
    "softmax",
    "takes",
    "takes_attention",
    "takes_self_attention",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)  # on a CPU, by TRITON_INTERPRET=1: for tests


def takes(x: Tensor) -> bool:
    """Whether the kernels run where `x` lies."""
    return x.is_cuda or INTERPRETED
