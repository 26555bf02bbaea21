"""diffusers' blocks with another forward pass: channels-last throughout, norms fused with what stands beside them.

A block keeps its modules, weights and names: its class alone is exchanged for one of those here. What a block has
that these don't know (other norms, other activations) stays as diffusers wrote it. Nothing is compiled by torch:
what a compiler would fuse is one of our kernels, so that a new bucket's first batch is as quick as its second.

A layer's bias is added by what follows it, where its gradient is summed as well: after a convolution it would take
a pass of its own over the map, and its gradient one of torch's slow sums.
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
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune.models.fast import linear, lora

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


def group_norm(
    x_BCHW: Tensor, norm: nn.GroupNorm, *, silu: bool, shift_BC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x, and the group norm of `x_BCHW + shift_BC`, with `silu` SiLU of that): [B, C, H, W], channels-last.

    Where x is used further, go on with the first: its gradient comes along with the norm's.
    """
    if on_kernels(x_BCHW):
        return kernels.group_norm(x_BCHW, shift_BC, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    y_BCHW = x_BCHW
    if shift_BC is not None:
        # A float32 shift would raise a bf16 map to float32, which ZeRO's bf16 weights don't go with.
        y_BCHW = (x_BCHW + shift_BC[:, :, None, None]).to(norm.weight.dtype)
    y_BCHW = F.group_norm(y_BCHW, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return x_BCHW, F.silu(y_BCHW) if silu else y_BCHW


def join(x_BCHW: Tensor, h_BCHW: Tensor | None, bias_C: Tensor | None) -> Tensor:
    """`x_BCHW + h_BCHW + bias_C`: channels-last, in the dtype of `x_BCHW`; what is None is left out."""
    if bias_C is None:
        return x_BCHW if h_BCHW is None else x_BCHW + h_BCHW
    if on_kernels(x_BCHW):
        return kernels.join(x_BCHW, h_BCHW, bias_C)
    y_BCHW = x_BCHW.float() + bias_C.float()[:, None, None]
    return (y_BCHW if h_BCHW is None else y_BCHW + h_BCHW).to(x_BCHW.dtype)


def cat(x_BCHW: Tensor, skip_BDHW: Tensor) -> Tensor:
    """Two maps as one, whose gradient comes as two maps in memory.

    As slices of one map they would slow down all that takes them up the way, and be copied there.
    """
    if on_kernels(x_BCHW):
        return kernels.cat(x_BCHW, skip_BDHW)
    return torch.cat([x_BCHW, skip_BDHW], dim=1)


def add_norm(
    x_BSC: Tensor, h_BSC: Tensor | None, bias_C: Tensor | None, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """(y, `norm` of y) with y = x + h + bias, both [B, S, C] in the dtype of x; h, or bias alone, may be None."""
    if on_kernels(x_BSC):
        return kernels.add_norm(x_BSC, h_BSC, bias_C, norm.weight, norm.bias, norm.eps)
    if h_BSC is not None:
        h_BSC = h_BSC if bias_C is None else h_BSC + bias_C
        x_BSC = (x_BSC + h_BSC).to(x_BSC.dtype)
    return x_BSC, F.layer_norm(x_BSC, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x_BSC.dtype)


class Norm(nn.GroupNorm):
    """A group norm that begins a residual branch."""

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(the map for the other branch, the normalized map)."""
        return group_norm(x_BCHW, self, silu=False)


class NormSiLU(nn.GroupNorm):
    """A group norm whose SiLU, elsewhere a module of its own, comes with it."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return group_norm(x_BCHW, self, silu=True)[1]


class OneByOne(nn.Conv2d):
    """A convolution of 1x1 cells on tokens [B, S, C]: channels-last maps, seen as rows."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        return F.linear(x_BSC, self.weight.flatten(1), self.bias)


class Last(nn.Linear):
    """A linear layer that ends a residual branch."""

    def forward(self, x_BSC: Tensor, residual_BCHW: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens [B, H W, C] added to a map [B, C, H, W]."""
        return _onto(residual_BCHW, linear.linear(x_BSC, self.weight)[0], self.bias)


class LastOneByOne(nn.Conv2d):
    """A convolution of 1x1 cells that ends a residual branch."""

    def forward(self, x_BSC: Tensor, residual_BCHW: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens [B, H W, C] added to a map [B, C, H, W]."""
        return _onto(residual_BCHW, linear.linear(x_BSC, self.weight.flatten(1))[0], self.bias)


def _onto(residual_BCHW: Tensor, x_BSC: Tensor, bias_C: Tensor | None) -> Tensor:
    return join(residual_BCHW, x_BSC.unflatten(1, residual_BCHW.shape[2:]).permute(0, 3, 1, 2), bias_C)


def _without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(a convolution or a linear layer of x, the bias that is still to be added)."""
    if isinstance(layer, nn.Conv2d) and layer.bias is not None:
        return layer._conv_forward(x, layer.weight, None), layer.bias
    weight_OI = linear.weight_of(layer)
    if weight_OI is None:
        return layer(x), None  # an adapter's
    return linear.linear(x, weight_OI)[0], linear.bias_of(layer)


class Resnet(ResnetBlock2D):
    """`ResnetBlock2D` (BigGAN's block as Dhariwal & Nichol 2021, arXiv 2105.05233, have it).

    The first convolution's bias and the embedded time go into the second norm, as one shift of each channel: no
    pass over the map adds them, and none sums their gradients. The other biases are added where both branches meet.
    """

    gathered_whole = True  # under ZeRO-3: it takes weights from the modules inside without calling them

    def forward(  # type: ignore[override]
        self: Any, x_BCHW: Tensor, temb: Tensor | None = None, skip_BCHW: Tensor | None = None
    ) -> Tensor:
        """`skip_BCHW`: further channels of the input."""
        if skip_BCHW is not None:
            x_BCHW = cat(x_BCHW, skip_BCHW)
        x_BCHW, h_BCHW = group_norm(x_BCHW, self.norm1, silu=True)
        shift_BC = None
        if self.time_emb_proj is not None:
            assert temb is not None
            shift_BC = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
        if shift_BC is None:
            h_BCHW = self.conv1(h_BCHW)
        else:
            h_BCHW, bias_C = _without_bias(self.conv1, h_BCHW)
            shift_BC = shift_BC if bias_C is None else shift_BC.float() + bias_C.float()
        h_BCHW = self.dropout(group_norm(h_BCHW, self.norm2, silu=True, shift_BC=shift_BC)[1])
        h_BCHW, bias_C = _without_bias(self.conv2, h_BCHW)
        if self.conv_shortcut is not None:
            x_BCHW, other_C = _without_bias(self.conv_shortcut, x_BCHW)
            if bias_C is not None and other_C is not None:
                bias_C = bias_C.float() + other_C.float()
            else:
                bias_C = other_C if bias_C is None else bias_C
        y_BCHW = join(x_BCHW, h_BCHW, bias_C)
        return y_BCHW if self.output_scale_factor == 1.0 else y_BCHW / self.output_scale_factor


class Upsample(Upsample2D):
    """`Upsample2D` that repeats cells, with a convolution behind it.

    diffusers makes a map of 64 samples or more NCHW, and autocast makes it float32.
    """

    gathered_whole = True

    def forward(self: Any, x_BCHW: Tensor, output_size: Any = None) -> Tensor:  # type: ignore[override]
        if output_size is not None:
            with torch.autocast(x_BCHW.device.type, enabled=False):
                x_BCHW = F.interpolate(x_BCHW, size=output_size, mode="nearest")
        else:
            x_BHWC = x_BCHW.permute(0, 2, 3, 1)
            batch, height, width, channels = x_BHWC.shape
            cells = x_BHWC[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
            x_BCHW = cells.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
        y_BCHW, bias_C = _without_bias(self.conv, x_BCHW)
        return join(y_BCHW, None, bias_C)


class Downsample(Downsample2D):
    """`Downsample2D` by a convolution of stride 2 that pads both sides."""

    gathered_whole = True

    def forward(self: Any, x_BCHW: Tensor) -> Tensor:  # type: ignore[override]
        y_BCHW, bias_C = _without_bias(self.conv, x_BCHW)
        return join(y_BCHW, None, bias_C)


class TransformerBlock(BasicTransformerBlock):
    """`BasicTransformerBlock` with layer norms: what ends a branch begins the next."""

    gathered_whole = True

    def forward(  # type: ignore[override]
        self: Any,
        x_BSC: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
    ) -> Tensor:
        """Tokens [B, S, C] to tokens; the last three are for norms and attentions that are not exchanged."""
        context = encoder_hidden_states if self.only_cross_attention else None
        x_BSC, normal_BSC = add_norm(x_BSC, None, None, self.norm1)
        h_BSC, bias_C = _attend(self.attn1, normal_BSC, context, attention_mask)
        if self.attn2 is not None:
            x_BSC, normal_BSC = add_norm(x_BSC, h_BSC, bias_C, self.norm2)
            h_BSC, bias_C = _attend(self.attn2, normal_BSC, encoder_hidden_states, encoder_attention_mask)
        x_BSC, normal_BSC = add_norm(x_BSC, h_BSC, bias_C, self.norm3)
        gate, dropout, last = self.ff.net
        h_BSC, bias_C = _without_bias(last, dropout(gate(normal_BSC)))
        return _tokens(join(_map(x_BSC), _map(h_BSC), bias_C))


def _map(x_BSC: Tensor) -> Tensor:
    """Tokens as a channels-last map of one column: [B, C, S, 1]."""
    return x_BSC.permute(0, 2, 1)[..., None]


def _tokens(x_BCHW: Tensor) -> Tensor:
    """A channels-last map as tokens: [B, H W, C]."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def _attend(
    attention: Any, x_BSC: Tensor, context: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(what attention gives, the bias that is still to be added), by what is fastest here."""
    if context is None:
        projected = linear.together((attention.to_q, attention.to_k, attention.to_v), x_BSC)
    else:
        projected = attention.to_q(x_BSC), *linear.together((attention.to_k, attention.to_v), context)
    q, k, v = (each.unflatten(-1, (attention.heads, -1)) for each in projected)  # [B, S, heads, D]
    ours = attention_mask is None and on_kernels(q)
    if ours and kernels.takes_attention(q, k, v):
        mixed = kernels.attention(q, k, v)
    elif ours and kernels.takes_self_attention(q, k, v):
        mixed = kernels.self_attention(q, k, v)
    else:
        mixed = _flash(attention, q, k, v, attention_mask)
    out, dropout = attention.to_out
    mixed = mixed.flatten(2).to(q.dtype)
    if dropout.p > 0:
        return dropout(out(mixed)), None
    return _without_bias(out, mixed)


def _flash(attention: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
    """By torch: [B, S, heads, D] to the same."""
    if attention_mask is not None:
        attention_mask = attention.prepare_attention_mask(attention_mask, k.shape[1], k.shape[0])
        attention_mask = attention_mask.unflatten(0, (k.shape[0], attention.heads))
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    with sdpa_kernel(_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attention_mask).transpose(1, 2)


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
        return kernels.geglu(*_without_bias(self.proj, hidden_states))


class Transformer(Transformer2DModel):
    """`Transformer2DModel` over continuous maps: tokens are views of channels-last maps, never copies."""

    def forward(  # type: ignore[override]
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Any = None,
        added_cond_kwargs: Any = None,
        class_labels: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """A map [B, C, H, W] to a map; masks are as diffusers takes them, [B, S] or biases [B, 1, S]."""
        size = hidden_states.shape[-2:]
        masks = (_bias(mask, hidden_states.dtype) for mask in (attention_mask, encoder_attention_mask))
        attention_mask, encoder_attention_mask = masks
        x_BCHW, h_BCHW = self.norm(hidden_states)
        h_BSC = self._project(self.proj_in, _tokens(h_BCHW), size)
        for block in self.transformer_blocks:
            given = (
                h_BSC,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
            )
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h_BSC = self._gradient_checkpointing_func(block, *given)
            else:
                h_BSC = block(*given)
        if isinstance(self.proj_out, Last | LastOneByOne):
            y_BCHW = self.proj_out(h_BSC, x_BCHW)
        else:
            h_BSC = self._project(self.proj_out, h_BSC, size)
            y_BCHW = h_BSC.unflatten(1, size).permute(0, 3, 1, 2) + x_BCHW
        return Transformer2DModelOutput(sample=y_BCHW) if return_dict else (y_BCHW,)

    def _project(self, layer: nn.Module, h_BSC: Tensor, size: tuple[int, ...]) -> Tensor:
        """A linear layer, or a convolution of 1x1 cells, on tokens."""
        if self.use_linear_projection or isinstance(layer, OneByOne):
            return layer(h_BSC)
        h_BCHW: Tensor = layer(h_BSC.unflatten(1, size).permute(0, 3, 1, 2))  # an adapter's
        return _tokens(h_BCHW)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask [B, S] of tokens that count as what is added to scores, [B, 1, S]; that stays as it is."""
    if mask is None or mask.ndim != 2:
        return mask
    return (1 - mask.to(dtype))[:, None] * -10000.0


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
        h_BSC, bias_C = _attend(attn, hidden_states, encoder_hidden_states, attention_mask)
        return h_BSC if bias_C is None else h_BSC + bias_C.to(h_BSC.dtype)


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
            case Downsample2D() if module.use_conv and module.padding > 0 and module.norm is None:
                module.__class__ = Downsample
            case Transformer2DModel() if module.is_input_continuous:
                module.__class__ = Transformer
                module.norm.__class__ = Norm
                if isinstance(module.proj_in, nn.Conv2d):
                    module.proj_in.__class__ = OneByOne
                if isinstance(module.proj_out, nn.Conv2d):
                    module.proj_out.__class__ = LastOneByOne
                elif type(module.proj_out) is nn.Linear:
                    module.proj_out.__class__ = Last
            case peft.tuners.lora.Linear() if lora.takes(module):
                module.__class__ = lora.Linear
            case GEGLU():
                module.__class__ = Gate
            case Attention() if _is_plain(module):
                module.processor = Attend()
            case _:
                pass
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock) and _is_known(module):
            module.__class__ = TransformerBlock
        if isinstance(module, UpBlock2D | CrossAttnUpBlock2D) and all(
            isinstance(r, Resnet) for r in module.resnets
        ):
            module.__class__ = Up if isinstance(module, UpBlock2D) else CrossAttnUp
    last: Any = unet
    if isinstance(last.conv_norm_out, nn.GroupNorm) and isinstance(last.conv_act, nn.SiLU):
        last.conv_norm_out.__class__ = NormSiLU
        last.conv_act = nn.Identity()


def _is_known(block: Any) -> bool:
    """Whether `TransformerBlock` computes what this block does."""
    attentions = [each for each in (block.attn1, block.attn2) if each is not None]
    norms = [block.norm1, block.norm3] + ([block.norm2] if block.attn2 is not None else [])
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not hasattr(block, "fuser")
        and block._chunk_size is None
        and all(isinstance(each.processor, Attend) for each in attentions)
        and all(type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None for norm in norms)
        and len(block.ff.net) == 3
    )


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
