"""diffusers' blocks with another forward pass: channels-last throughout, norms fused with what stands beside them.

A block keeps its modules, weights and names: its class alone is exchanged for one of those here. What a block has
that these don't know (other norms, other activations) stays as diffusers wrote it.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune.models.fast import lora

try:
    from finetune.models.fast import kernels
except ImportError:  # no Triton for this machine
    kernels = None  # type: ignore[assignment]

# In this order, of those that a device has; cuDNN's is the fastest on Hopper.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def on_kernels(x: Tensor) -> bool:
    """Whether this is computed by `kernels`."""
    return kernels is not None and kernels.takes(x)


def group_norm(x_BCHW: Tensor, norm: nn.GroupNorm, *, silu: bool, shift_BC: Tensor | None = None) -> Tensor:
    """Group norm of `x_BCHW + shift_BC` and, with `silu`, SiLU of that: [B, C, H, W], channels-last."""
    if on_kernels(x_BCHW):
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        shift_BC = None if shift_BC is None else shift_BC.contiguous()
        return kernels.group_norm(x_BCHW, shift_BC, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    if shift_BC is not None:
        # A float32 shift would raise a bf16 map to float32, which ZeRO's bf16 weights don't go with.
        x_BCHW = (x_BCHW + shift_BC[:, :, None, None]).to(norm.weight.dtype)
    x_BCHW = F.group_norm(x_BCHW, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(x_BCHW) if silu else x_BCHW


class Norm(nn.GroupNorm):
    """A group norm that keeps its map channels-last."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return group_norm(x_BCHW, self, silu=False)


class NormSiLU(nn.GroupNorm):
    """A group norm whose SiLU, elsewhere a module of its own, comes with it."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return group_norm(x_BCHW, self, silu=True)


class OneByOne(nn.Conv2d):
    """A convolution of 1x1 cells on tokens [B, S, C]: channels-last maps, seen as rows."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        return F.linear(x_BSC, self.weight.flatten(1), self.bias)


class Region(nn.Module):
    """A block that is compiled by itself, for training alone: pictures are drawn at sizes that come once.

    It takes weights from the modules inside without calling them, so ZeRO-3 gathers all of a block's at once.
    """

    gathered_whole = True
    compiled: Any = None

    def plain(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        passes = self.plain if self.compiled is None or not torch.is_grad_enabled() else self.compiled
        return passes(*args, **kwargs)


class _Joined(torch.autograd.Function):
    """Two maps [B, C, H, W] and [B, D, H, W] as one [B, C + D, H, W], whose gradient comes as two maps in memory.

    As slices of one map they would slow down all that takes them up the way, and be copied there.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, skip_BDHW: Tensor) -> Tensor:
        ctx.channels = x_BCHW.shape[1], skip_BDHW.shape[1]
        return torch.cat([x_BCHW, skip_BDHW], dim=1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(one.contiguous(memory_format=torch.channels_last) for one in dy.split(ctx.channels, dim=1))


def _without_bias(conv: nn.Module, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
    """(the convolution of a map, the bias that is still to be added)."""
    if isinstance(conv, nn.Conv2d) and conv.bias is not None:
        return conv._conv_forward(x_BCHW, conv.weight, None), conv.bias
    return conv(x_BCHW), None  # an adapter's


class Resnet(Region, ResnetBlock2D):
    """`ResnetBlock2D` (BigGAN's block as Dhariwal & Nichol 2021, arXiv 2105.05233, have it).

    The first convolution's bias and the embedded time go into the second norm, as one shift of each channel: no
    pass over the map adds them, and none sums their gradients. The other biases are added where both branches meet.
    """

    def plain(self: Any, x_BCHW: Tensor, temb: Tensor | None = None, skip_BCHW: Tensor | None = None) -> Tensor:
        """`skip_BCHW`: further channels of the input."""
        if skip_BCHW is not None:
            x_BCHW = _Joined.apply(x_BCHW, skip_BCHW)
        h_BCHW = group_norm(x_BCHW, self.norm1, silu=True)
        shift_BC = None
        if self.time_emb_proj is not None:
            assert temb is not None
            shift_BC = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
        if shift_BC is None:
            h_BCHW = self.conv1(h_BCHW)
        else:
            h_BCHW, bias_C = _without_bias(self.conv1, h_BCHW)
            shift_BC = shift_BC if bias_C is None else shift_BC.float() + bias_C.float()
        h_BCHW = self.dropout(group_norm(h_BCHW, self.norm2, silu=True, shift_BC=shift_BC))
        h_BCHW, bias_C = _without_bias(self.conv2, h_BCHW)
        biases = [bias_C]
        if self.conv_shortcut is not None:
            x_BCHW, bias_C = _without_bias(self.conv_shortcut, x_BCHW)
            biases.append(bias_C)
        y_BCHW = x_BCHW + h_BCHW
        for bias_C in biases:
            if bias_C is not None:
                y_BCHW = y_BCHW.float() + bias_C.float()[:, None, None]
        return (y_BCHW / self.output_scale_factor).to(h_BCHW.dtype)


class Upsample(Region, Upsample2D):
    """`Upsample2D` that repeats cells, with a convolution behind it.

    diffusers makes a map of 64 samples or more NCHW, and autocast makes it float32.
    """

    def plain(self: Any, x_BCHW: Tensor, output_size: Any = None) -> Tensor:
        if output_size is not None:
            return self.conv(F.interpolate(x_BCHW, size=output_size, mode="nearest"))
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        batch, height, width, channels = x_BHWC.shape
        cells = x_BHWC[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
        return self.conv(cells.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2))


class Downsample(Region, Downsample2D):
    """`Downsample2D` as it is."""

    plain = Downsample2D.forward  # type: ignore[assignment]


class TransformerBlock(Region, BasicTransformerBlock):
    """`BasicTransformerBlock` as it is."""

    plain = BasicTransformerBlock.forward  # type: ignore[assignment]


class Up(UpBlock2D):
    """`UpBlock2D`, whose resnets are given the skip connection apart."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: Any = None,
    ) -> Tensor:
        for resnet, skip in zip(self.resnets, reversed(res_hidden_states_tuple), strict=True):
            hidden_states = _resnet(self, resnet, hidden_states, temb, skip)
        return _upsampled(self, hidden_states, upsample_size)


class CrossAttnUp(CrossAttnUpBlock2D):
    """`CrossAttnUpBlock2D`, whose resnets are given the skip connection apart."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        skips = reversed(res_hidden_states_tuple)
        for resnet, transformer, skip in zip(self.resnets, self.attentions, skips, strict=True):
            hidden_states = _resnet(self, resnet, hidden_states, temb, skip)
            hidden_states = transformer(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )[0]
        return _upsampled(self, hidden_states, upsample_size)


def _resnet(block: Any, resnet: nn.Module, h_BCHW: Tensor, temb: Tensor | None, skip_BCHW: Tensor) -> Tensor:
    if torch.is_grad_enabled() and block.gradient_checkpointing:
        return block._gradient_checkpointing_func(resnet, h_BCHW, temb, skip_BCHW)
    return resnet(h_BCHW, temb, skip_BCHW)


def _upsampled(block: Any, h_BCHW: Tensor, size: Any) -> Tensor:
    for upsampler in block.upsamplers or ():
        h_BCHW = upsampler(h_BCHW, size)
    return h_BCHW


class Gate(GEGLU):
    """`GEGLU` whose projection's bias is added where its gradient is at hand."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not on_kernels(hidden_states):
            return super().forward(hidden_states)
        if type(self.proj) is nn.Linear:
            return kernels.geglu(F.linear(hidden_states, self.proj.weight), self.proj.bias)
        return kernels.geglu(self.proj(hidden_states), None)  # an adapter's


class Transformer(Transformer2DModel):
    """`Transformer2DModel` over continuous maps: tokens are views of channels-last maps, never copies."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        h_BSC = self.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)
        h_BSC = self._project(self.proj_in, h_BSC, hidden_states.shape[-2:])
        return h_BSC, h_BSC.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        h_BSC = self._project(self.proj_out, hidden_states, (height, width))
        return h_BSC.unflatten(1, (height, width)).permute(0, 3, 1, 2) + residual

    def _project(self, layer: nn.Module, h_BSC: Tensor, size: tuple[int, ...]) -> Tensor:
        """A linear layer, or a convolution of 1x1 cells, on tokens."""
        if self.use_linear_projection or isinstance(layer, OneByOne):
            return layer(h_BSC)
        h_BCHW: Tensor = layer(h_BSC.unflatten(1, size).permute(0, 3, 1, 2))  # an adapter's
        return h_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


class Attend:
    """`AttnProcessor2_0` for plain attention, on the backend that is fastest here."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            each.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, heads, S, D]
            for each in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, k.shape[2], k.shape[0])
            attention_mask = attention_mask.unflatten(0, (k.shape[0], attn.heads))
        with sdpa_kernel(_BACKENDS, set_priority=True):
            mixed = F.scaled_dot_product_attention(q, k, v, attention_mask)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2).to(q.dtype)))


def exchange(unet: nn.Module) -> None:
    """Give the U-Net's blocks, its last norm and its attention the forward passes of this file, in place."""
    for module in unet.modules():
        match module:
            case ResnetBlock2D() if (
                module.time_embedding_norm == "default"
                and isinstance(module.nonlinearity, nn.SiLU)
                and module.upsample is None
                and module.downsample is None
            ):
                module.__class__ = Resnet
            case Upsample2D() if (
                module.use_conv
                and module.interpolate
                and module.norm is None
                and not module.use_conv_transpose
                and module.name == "conv"
            ):
                module.__class__ = Upsample
            case Downsample2D():
                module.__class__ = Downsample
            case Transformer2DModel() if module.is_input_continuous:
                module.__class__ = Transformer
                module.norm.__class__ = Norm
                for layer in (module.proj_in, module.proj_out):
                    if isinstance(layer, nn.Conv2d):
                        layer.__class__ = OneByOne
            case BasicTransformerBlock():
                module.__class__ = TransformerBlock
            case peft.tuners.lora.Linear() if lora.takes(module):
                module.__class__ = lora.Linear
            case GEGLU():
                module.__class__ = Gate
            case Attention() if _is_plain(module):
                module.processor = Attend()
            case _:
                pass
    for module in unet.modules():
        if isinstance(module, UpBlock2D | CrossAttnUpBlock2D) and all(
            isinstance(r, Resnet) for r in module.resnets
        ):
            module.__class__ = Up if isinstance(module, UpBlock2D) else CrossAttnUp
    last: Any = unet
    if isinstance(last.conv_norm_out, nn.GroupNorm) and isinstance(last.conv_act, nn.SiLU):
        last.conv_norm_out.__class__ = NormSiLU
        last.conv_act = nn.Identity()


def _is_plain(attention: Attention) -> bool:
    return (
        type(attention.processor) is AttnProcessor2_0
        and attention.rescale_output_factor == 1.0
        and not attention.residual_connection
        and not attention.norm_cross
        and all(
            getattr(attention, name, None) is None for name in ("group_norm", "spatial_norm", "norm_q", "norm_k")
        )
    )
