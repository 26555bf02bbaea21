"""Weights that are cast once a step: what is trained is what autocast trains, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.distributed import DataParallel, OptimizerSettings, ParamGroup, World
from finetune.distributed.copies import Copies

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Model(nn.Module):
    """Convolutions, linear layers of which two share a weight, a norm, a weight without a layer, one not called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.first, self.tied = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.tied.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(8))
        self.frozen, self.never = nn.Linear(8, 8), nn.Linear(8, 8)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
        self.frozen.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BHWC = F.silu(self.norm(self.conv(x_BCHW))).permute(0, 2, 3, 1)
        h_BHWC = self.frozen(self.tied(F.silu(self.first(h_BHWC)))) * self.scale
        return h_BHWC.float().square().mean((1, 2, 3))


def strategy_of(precision: str, *, casts_once: bool) -> DataParallel:
    model = Model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return DataParallel(
        World(0, 1, 0, torch.device("cpu")),
        model,
        [ParamGroup("all", trained)],
        optimizer=OptimizerSettings(),
        max_grad_norm=0.1,
        precision=precision,
        casts_once=casts_once,
    )


def step(strategy: DataParallel, number: int, micro_batches: int = 3) -> list[float]:
    generator = torch.Generator().manual_seed(number)
    losses = []
    for index in range(micro_batches):
        x = torch.randn(2, 3, 6, 6, generator=generator)
        last = index == micro_batches - 1
        losses.append(float(strategy.backward((x,), global_batch=2 * micro_batches, last=last)))
    gradients = [None if p.grad is None else p.grad.clone() for p in strategy.parameters.values()]
    return [
        *losses,
        float(strategy.step(1e-2).grad_norm),
        *(0.0 if g is None else float(g.sum()) for g in gradients),
    ]


@pytest.mark.parametrize("precision", DTYPES)
def test_training_is_that_of_autocast_to_the_bit(precision):
    plain, ours = strategy_of(precision, casts_once=False), strategy_of(precision, casts_once=True)
    assert plain.copies is None and ours.copies is not None
    for number in range(4):
        assert step(ours, number) == step(plain, number)
    for name, parameter in ours.parameters.items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, plain.parameters[name])
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(ours(x), plain(x))


def test_passes_see_masters_that_something_else_changed():
    """A checkpoint that is read, or an average that is evaluated: whoever changes masters calls `refresh`."""
    plain, ours = strategy_of("bf16", casts_once=False), strategy_of("bf16", casts_once=True)
    for strategy in (plain, ours):
        step(strategy, 0)
        with strategy.evaluating([shard.master * 2 for shard in strategy.shards]):
            pass
        for shard in strategy.shards:
            shard.master.mul_(0.5)
        strategy.refresh()
    assert step(ours, 1) == step(plain, 1)


def test_layers_have_their_own_weights_between_passes():
    model = Model()
    before = dict(model.named_parameters())
    copies = Copies(model, [p for p in model.parameters() if p.requires_grad], torch.bfloat16)
    with copies.in_use():
        inside = {name: p.dtype for name, p in model.named_parameters()}
        assert model.first.weight is model.tied.weight
    assert {name for name, dtype in inside.items() if dtype == torch.bfloat16} == {
        "conv.weight", "first.weight", "never.weight",
    }  # fmt: skip
    with pytest.raises(RuntimeError), copies.in_use():
        raise RuntimeError
    assert all(p is before[name] for name, p in model.named_parameters())


def test_a_pass_that_fails_leaves_the_gradients_before_it():
    strategy = strategy_of("bf16", casts_once=True)
    x = torch.randn(2, 3, 6, 6)
    strategy.backward((x,), global_batch=4, last=False)
    before = {name: p.grad for name, p in strategy.parameters.items()}
    values = {name: None if grad is None else grad.clone() for name, grad in before.items()}
    with pytest.raises(RuntimeError):
        strategy.backward((torch.randn(2, 5, 6, 6),), global_batch=4, last=True)
    for name, parameter in strategy.parameters.items():
        assert parameter.grad is before[name]
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])


def test_nothing_is_copied_where_nothing_is_cast():
    assert strategy_of("fp32", casts_once=True).copies is None
