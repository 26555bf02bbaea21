"""Who keeps which moments under ZeRO-1; that it trains the same is shown in `test_processes`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.autoencoder.train import main
from finetune.autoencoder.zero import ShardedAdamW, deal
from finetune.distributed import World
from tests.autoencoder.runs import arguments, assert_same_run

CPU = torch.device("cpu")


@pytest.mark.parametrize("hands", [1, 2, 3, 8])
def test_weights_are_dealt_once_and_evenly(hands: int) -> None:
    sizes = {f"{number}": number * number % 37 + 1 for number in range(40)}
    dealt = deal(sizes, hands)
    assert sorted(name for hand in dealt for name in hand) == sorted(sizes)
    held = [sum(sizes[name] for name in hand) for hand in dealt]
    assert max(held) - min(held) <= max(sizes.values())


def test_a_process_keeps_the_moments_of_its_share_alone() -> None:
    """With four processes and three weights one has nothing to keep; gradients go on all of them."""
    weights = {name: torch.nn.Parameter(torch.ones(size)) for name, size in (("a", 5), ("b", 3), ("c", 2))}
    kept = []
    for rank in range(4):
        optimizer = ShardedAdamW(weights, World(rank, 4, rank, CPU), lr=1e-3, fused=True)
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        torch.optim.AdamW.step(optimizer)
        kept += [name for name, weight in weights.items() if weight in optimizer.state]
        optimizer.zero_grad()
        assert all(weight.grad is None for weight in weights.values())
    assert sorted(kept) == ["a", "b", "c"]


def test_alone_it_is_adamw(shards: Path, tmp_path: Path) -> None:
    """Also where a part of the weights is trained, and from each other's checkpoints."""
    more = ("checkpoint.every=1", "optim.schedule=constant")
    base = tmp_path / "base"
    main(arguments(shards, base, "train.steps=1"))
    more += (f"model.pretrained={base / 'vae'}", "train.decoder_only=true", "loss.discriminator_weight=0.5")
    more += ("loss.discriminator_layers=1", "loss.discriminator_width=8")
    main(arguments(shards, tmp_path / "ddp", *more, "train.steps=4"))
    for strategy, steps in (("zero1", 2), ("ddp", 3), ("zero1", 4)):
        main(arguments(shards, tmp_path / "mixed", *more, f"train.steps={steps}", f"strategy={strategy}"))
    assert_same_run(tmp_path / "mixed", tmp_path / "ddp", 4, discriminator=True)
