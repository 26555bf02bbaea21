"""The encoder of `AutoencoderKL` and `VQModel` with another forward pass, which has no gradient.

At 512 px its first maps hold 128 channels of 512 x 512 cells: after the convolutions, passes over such maps take
most of the time. So none does one thing alone: norms come with SiLU and with the bias of the convolution before, a
block's end adds both branches, all biases and the zeros that the next convolution is padded with. A bias that no
pass has added yet goes along with its map.

Nothing is compiled by torch: kernels on maps of this size keep a GPU busy though they are launched one by one, and
any size or number of pictures runs at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders import vae
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D
from torch import Tensor, nn

from finetune.models.fast import blocks

_MOST_SCORES = 1 << 27  # of attention, at a time: 512 MiB in float32
_MOST_ELEMENTS = 1 << 31  # of a sample's map: kernels count them in 32 bits


class Encoder(vae.Encoder):
    """`Encoder` of diffusers' autoencoders; where gradients are recorded, or without kernels, it runs as it was."""

    def forward(self, sample: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] to moments [B, 2C, h, w], as diffusers' own."""
        cells = (sample.shape[-2] + 1) * (sample.shape[-1] + 1)
        widths = (block.resnets[-1].out_channels for block in self.down_blocks)
        largest = max((cells >> 2 * level) * width for level, width in enumerate(widths))
        if torch.is_grad_enabled() or not blocks.on_kernels(sample) or largest >= _MOST_ELEMENTS:
            return super().forward(sample)
        sample = sample.contiguous(memory_format=torch.channels_last)
        h_BCHW, bias_C = _without_bias(self.conv_in, sample), self.conv_in.bias
        for block in self.down_blocks:
            (downsampler,) = block.downsamplers or (None,)
            *first, last = block.resnets
            for resnet in first:
                h_BCHW, bias_C = _resnet(resnet, h_BCHW, bias_C), None
            padded = downsampler is not None and downsampler.padding == 0
            h_BCHW, bias_C = _resnet(last, h_BCHW, bias_C, seam=padded), None
            if downsampler is not None:
                h_BCHW, bias_C = _without_bias(downsampler.conv, h_BCHW), downsampler.conv.bias
        h_BCHW = _resnet(self.mid_block.resnets[0], h_BCHW, bias_C)
        for attention, resnet in zip(self.mid_block.attentions, self.mid_block.resnets[1:], strict=True):
            if attention is not None:
                h_BCHW = _attention(attention, h_BCHW)
            h_BCHW = _resnet(resnet, h_BCHW, None)
        return self.conv_out(_normalized(h_BCHW, self.conv_norm_out, None, silu=True))


def _without_bias(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    return conv._conv_forward(x_BCHW, conv.weight, None)


def _normalized(x_BCHW: Tensor, norm: nn.GroupNorm, bias_C: Tensor | None, *, silu: bool) -> Tensor:
    shift_BC = None if bias_C is None else bias_C.expand(len(x_BCHW), -1)
    return blocks.group_norm(x_BCHW, norm, silu=silu, shift_BC=shift_BC)[1]


def _resnet(resnet: ResnetBlock2D, x_BCHW: Tensor, bias_C: Tensor | None, *, seam: bool = False) -> Tensor:
    """The block's output for the input `x_BCHW + bias_C`; with `seam`, a row and a column of zeros at its end."""
    h_BCHW = _without_bias(resnet.conv1, _normalized(x_BCHW, resnet.norm1, bias_C, silu=True))
    h_BCHW = _without_bias(resnet.conv2, _normalized(h_BCHW, resnet.norm2, resnet.conv1.bias, silu=True))
    ends_C = resnet.conv2.bias.float()
    if resnet.conv_shortcut is not None:
        x_BCHW = _without_bias(resnet.conv_shortcut, x_BCHW)
        ends_C = ends_C + resnet.conv_shortcut.bias.float()
        if bias_C is not None:  # 1x1 cells: a bias before it is another one after it
            bias_C = resnet.conv_shortcut.weight.float().flatten(1) @ bias_C.float()
    if bias_C is not None:
        ends_C = ends_C + bias_C.float()
    return blocks.kernels.join(x_BCHW, h_BCHW, ends_C, seam=seam)


def _attention(attention: Attention, x_BCHW: Tensor) -> Tensor:
    """One head of all channels, so 512: more than flash kernels take, and torch's next best is slow there.

    Scores are float32, as a fused kernel has them, and written out: at this width they are few beside the products.
    """
    h_BCHW = _normalized(x_BCHW, attention.group_norm, None, silu=False)
    h_BSC = h_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
    mixed_BSC = attend(attention.to_q(h_BSC), attention.to_k(h_BSC), attention.to_v(h_BSC))
    out: Any = attention.to_out[0]
    h_BSC = F.linear(mixed_BSC, out.weight)
    return blocks.kernels.join(x_BCHW, h_BSC.unflatten(1, x_BCHW.shape[2:]).permute(0, 3, 1, 2), out.bias)


def attend(q_BSC: Tensor, k_BSC: Tensor, v_BSC: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017, arXiv 1706.03762, eq. 1) of one head: [B, S, C].

    A bounded number of scores at a time: some samples, or some rows of one.
    """
    cells = k_BSC.shape[1]
    rows = min(cells, max(1, _MOST_SCORES // cells))
    samples = max(1, _MOST_SCORES // (rows * cells))
    scale = k_BSC.shape[2] ** -0.5
    mixed_BSC = torch.empty_like(v_BSC)
    for q, k, v, mixed in zip(*(x.split(samples) for x in (q_BSC, k_BSC, v_BSC, mixed_BSC)), strict=True):
        for some, to in zip(q.split(rows, dim=1), mixed.split(rows, dim=1), strict=True):
            torch.bmm(blocks.kernels.softmax(_scores(some, k), scale, v.dtype), v, out=to)
    return mixed_BSC


def _scores(q_BRC: Tensor, k_BSC: Tensor) -> Tensor:
    """q k^T as float32 [B, R, S]."""
    if q_BRC.dtype == torch.float32:
        return torch.bmm(q_BRC, k_BSC.mT)
    if q_BRC.is_cuda:  # summed in float32 anyway: kept so
        return torch.bmm(q_BRC, k_BSC.mT, out_dtype=torch.float32)
    return torch.bmm(q_BRC.float(), k_BSC.float().mT)


def takes(encoder: nn.Module) -> bool:
    """Whether `Encoder` computes what this module does."""
    if type(encoder) not in (vae.Encoder, Encoder):
        return False
    inner: Any = encoder
    mid = inner.mid_block
    resnets = [resnet for block in (*inner.down_blocks, mid) for resnet in block.resnets]
    downsamplers = [each for block in inner.down_blocks for each in block.downsamplers or ()]
    return (
        all(type(block) is DownEncoderBlock2D and len(block.downsamplers or ()) <= 1 for block in inner.down_blocks)
        and type(mid) is UNetMidBlock2D
        and all(map(_plain_resnet, resnets))
        and all(map(_plain_downsampler, downsamplers))
        and all(attention is None or _plain_attention(attention) for attention in mid.attentions)
        and _has_bias(inner.conv_in)
        and isinstance(inner.conv_norm_out, nn.GroupNorm)
        and isinstance(inner.conv_act, nn.SiLU)
    )


def _has_bias(conv: object) -> bool:
    return type(conv) is nn.Conv2d and conv.bias is not None


def _plain_resnet(resnet: Any) -> bool:
    shortcut = resnet.conv_shortcut
    return (
        type(resnet) is ResnetBlock2D
        and resnet.time_emb_proj is None
        and isinstance(resnet.nonlinearity, nn.SiLU)
        and resnet.upsample is None
        and resnet.downsample is None
        and resnet.output_scale_factor == 1.0
        and resnet.dropout.p == 0.0
        and _has_bias(resnet.conv1)
        and _has_bias(resnet.conv2)
        and (shortcut is None or (_has_bias(shortcut) and shortcut.kernel_size == (1, 1)))
    )


def _plain_downsampler(downsampler: Any) -> bool:
    return type(downsampler) is Downsample2D and downsampler.norm is None and _has_bias(downsampler.conv)


def _plain_attention(attention: Any) -> bool:
    return (
        type(attention) is Attention
        and type(attention.processor) is AttnProcessor2_0
        and attention.heads == 1
        and attention.residual_connection
        and attention.rescale_output_factor == 1.0
        and isinstance(attention.group_norm, nn.GroupNorm)
        and all(type(layer) is nn.Linear for layer in (attention.to_q, attention.to_k, attention.to_v))
        and type(attention.to_out[0]) is nn.Linear
        and attention.to_out[0].bias is not None
        and attention.to_out[1].p == 0.0
        and all(getattr(attention, name, None) is None for name in ("spatial_norm", "norm_q", "norm_k"))
    )
