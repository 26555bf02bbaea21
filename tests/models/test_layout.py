"""Convolutions with channels-last storage compute what torch's do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from finetune.models.adapters import add_lora
from finetune.models.layout import store_channels_last, stored_channels_last
from finetune.models.unet import enable_gradient_checkpointing
from tests import fakes


def gradients(unet, seed=3):
    """Output and gradients by name, of the mean of a fixed projection."""
    generator = torch.Generator().manual_seed(seed)
    z, states, weight = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 32), (2, 4, 8, 8))
    )
    output = unet(z, torch.tensor([3, 700]), states, return_dict=False)[0]
    (output * weight).mean().backward()
    return output.detach(), {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_outputs_and_gradients_are_those_of_the_eager_model(lora, checkpointing):
    unet = fakes.unet().train()
    if lora:  # of convolutions too
        add_lora(unet, 2, 2.0, target_modules=["to_q", "conv1"])
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    stored = copy.deepcopy(unet)
    if checkpointing:
        enable_gradient_checkpointing(stored)
    store_channels_last(stored)
    (output, wanted), (other, found) = gradients(unet), gradients(stored)
    torch.testing.assert_close(other, output, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys()
    parameters = dict(stored.named_parameters())
    permuted = {name for name, parameter in parameters.items() if stored_channels_last(parameter)}
    assert permuted == {name for name, parameter in unet.named_parameters() if parameter.dim() == 4}
    for name, gradient in found.items():
        assert gradient.is_contiguous() and gradient.shape == parameters[name].shape
        gradient = gradient.permute(0, 3, 1, 2) if name in permuted else gradient
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_convolution_sees_a_channels_last_weight_without_a_copy():
    layer = nn.Conv2d(8, 16, 3)
    parameter, values = layer.weight, layer.weight.detach().clone()
    store_channels_last(layer)
    assert layer.weight is parameter and parameter.shape == (16, 3, 3, 8) and parameter.is_contiguous()
    assert torch.equal(parameter.permute(0, 3, 1, 2), values)
    seen = []
    kept = nn.functional.conv2d
    try:
        nn.functional.conv2d = lambda x, weight, *rest: seen.append(weight) or kept(x, weight, *rest)
        layer(torch.randn(1, 8, 5, 5))
    finally:
        nn.functional.conv2d = kept
    assert seen[0].shape == (16, 8, 3, 3) and seen[0].data_ptr() == parameter.data_ptr()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
