"""Memory layouts of convolutions: channels-last (NHWC) weights under every strategy.

torch's own way, a memory format, is a matter of strides, and DeepSpeed's flat buffers keep none: they copy a
weight's elements one after another, and its first broadcast (0.19.8) refuses other strides at all. There the weight
itself is stored as [O, kh, kw, I], and the convolution is given the view [O, I, kh, kw] of it, whose strides are
channels-last.
"""

from __future__ import annotations

from torch import Tensor, nn

_STORED = "channels_last_storage"


class _ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose weight is stored as [O, kh, kw, I]."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.permute(0, 3, 1, 2), bias)


def store_channels_last(module: nn.Module) -> None:
    """Store the weights of all 2-d convolutions in `module` as contiguous [O, kh, kw, I], and run them so.

    Parameters stay the same objects, under the same names, with another shape: see `stored_channels_last`. For what
    reads a weight's elements by their order in memory; else `module.to(memory_format=torch.channels_last)` will do.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d:
            layer.weight.data = layer.weight.data.permute(0, 2, 3, 1).contiguous()
            setattr(layer.weight, _STORED, True)
            layer.__class__ = _ChannelsLastConv2d


def stored_channels_last(parameter: nn.Parameter) -> bool:
    """Whether a parameter [O, kh, kw, I] stands for a weight [O, I, kh, kw]."""
    return getattr(parameter, _STORED, False)
