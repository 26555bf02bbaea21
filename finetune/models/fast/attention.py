"""Attention on the backend that is fastest here.

On Hopper that is FlashAttention in its third form (Shah et al. 2024, arXiv 2407.08608), which torch does not carry:
the package `flash-attn-4` has it, and where that is not installed torch's own backends do.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune.models.fast.cache import compiled_code

flash: Any = None  # the package's kernels, once `load_flash` has found them

# In this order, of those that a device has; cuDNN's is the fastest of torch's on Hopper.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_LEAST_KEYS = 256  # with fewer, reading queries and writing outputs is all there is to it


def load_flash() -> None:
    """Have long attention computed by FlashAttention's kernels from now on, where there are any for this device."""
    global flash
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return
    # Each head size takes ten seconds to compile.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(compiled_code() / "flash-attention"))
    try:
        from flash_attn.cute import interface
    except ImportError:
        return
    flash = interface


def attend(q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: [B, S, H, D].

    Args:
        mask: added to the scores [B, H, S, T], or broadcast to them.
    """
    if mask is None and _takes(q_BSHD, k_BTHD):
        return _flash(q_BSHD, k_BTHD, v_BTHD)[0]
    q, k, v = (each.transpose(1, 2) for each in (q_BSHD, k_BTHD, v_BTHD))
    with sdpa_kernel(_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def _takes(q_BSHD: Tensor, k_BTHD: Tensor) -> bool:
    return (
        flash is not None
        and q_BSHD.device.type == "cuda"
        and q_BSHD.dtype in (torch.bfloat16, torch.float16)
        and q_BSHD.shape[-1] % 8 == 0
        and q_BSHD.shape[-1] <= 128
        and k_BTHD.shape[1] >= _LEAST_KEYS
    )


# The package's own autograd function compiles kernels as it goes, which torch.compile can't follow.
@torch.library.custom_op("ldm_finetune::flash_attention", mutates_args={})
def _flash(q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, H, D], and float32 [B, H, S]: logarithms of the sums of exponentials."""
    out, lse, *_ = flash._flash_attn_fwd(q_BSHD, k_BTHD, v_BTHD, return_lse=True)
    return out, lse


@_flash.register_fake
def _(q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q_BSHD.shape
    return q_BSHD.new_empty(q_BSHD.shape), q_BSHD.new_empty((batch, heads, queries), dtype=torch.float32)


@torch.library.custom_op("ldm_finetune::flash_attention_backward", mutates_args={})
def _flash_backward(
    dy_BSHD: Tensor, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, laid out as these are."""
    gradients = tuple(torch.empty_like(each) for each in (q_BSHD, k_BTHD, v_BTHD))
    dq, dk, dv = gradients
    flash._flash_attn_bwd(q_BSHD, k_BTHD, v_BTHD, out_BSHD, dy_BSHD, lse_BHS, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


@_flash_backward.register_fake
def _(dy_BSHD: Tensor, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(q_BSHD), torch.empty_like(k_BTHD), torch.empty_like(v_BTHD)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, dy_BSHD: Tensor, _: Any) -> tuple[Tensor, ...]:
    return _flash_backward(dy_BSHD.contiguous(), *ctx.saved_tensors)


torch.library.register_autograd("ldm_finetune::flash_attention", _backward, setup_context=_keep)
