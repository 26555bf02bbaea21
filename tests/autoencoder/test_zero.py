"""Who keeps what under ZeRO; that it trains the same is shown in `test_processes`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

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


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(5, 1, bias=False),
            nn.Linear(3, 1, bias=False),
            nn.Linear(2, 1, bias=False),
        )


@pytest.mark.parametrize("offload", [False, True])
def test_a_process_keeps_the_moments_of_its_share_alone(offload: bool) -> None:
    """With four processes and three weights one has nothing to keep; gradients go on all of them."""
    kept = []
    for rank in range(4):
        model = Model()
        optimizer = ShardedAdamW(model, World(rank, 4, rank, CPU), stage=1, offload=offload, lr=1e-3, fused=True)
        for name, weight in optimizer.parameters.items():
            optimizer.masters.get(name, weight).grad = torch.ones_like(weight)
        optimizer.step()
        kept += [name for name, master in optimizer.masters.items() if master in optimizer.state]
        optimizer.zero_grad()
        assert all(weight.grad is None for weight in model.parameters())
    assert sorted(kept) == ["a.weight", "b.weight", "c.weight"]


@pytest.mark.parametrize("offload", [False, True])
def test_a_process_keeps_the_weights_of_its_share_alone(offload: bool) -> None:
    """Under stage 3, of several processes; with offload none is on the device, where a block is not computed."""
    for rank in range(3):
        model = Model()
        optimizer = ShardedAdamW(model, World(rank, 3, rank, CPU), stage=3, offload=offload, lr=1e-3)
        optimizer.begin()
        held = {name for name, weight in model.named_parameters() if weight.untyped_storage().nbytes()}
        assert held == (set() if offload else set(optimizer.own)) and len(optimizer.own) == 1
        assert [weight.shape for weight in model.parameters()] == [(1, 5), (1, 3), (1, 2)]


def test_what_is_read_aside_stays_with_all() -> None:
    """A codebook is looked into without a call."""
    from diffusers import VQModel

    model = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=6, latent_channels=2)
    optimizer = ShardedAdamW(model, World(0, 2, 0, CPU), stage=3, lr=1e-3)
    spread = {name for unit in optimizer.units for name in unit}
    assert set(optimizer.parameters) - spread == {"quantize.embedding.weight"}
    resnets = [unit for unit in optimizer.units if unit[0].startswith("encoder.down_blocks.0.resnets.0.")]
    assert len(resnets) == 1 and len(resnets[0]) == 8


def test_alone_it_is_adamw(shards: Path, tmp_path: Path) -> None:
    """Also where a part of the weights is trained, and from each other's checkpoints."""
    more = ("checkpoint.every=1", "optim.schedule=constant")
    base = tmp_path / "base"
    main(arguments(shards, base, "train.steps=1"))
    more += (f"model.pretrained={base / 'vae'}", "train.decoder_only=true", "loss.discriminator_weight=0.5")
    more += ("loss.discriminator_layers=1", "loss.discriminator_width=8")
    main(arguments(shards, tmp_path / "ddp", *more, "train.steps=4"))
    for strategy, steps in (("zero1", 1), ("zero2", 2), ("ddp", 3), ("zero3_offload", 4)):
        main(arguments(shards, tmp_path / "mixed", *more, f"train.steps={steps}", f"strategy={strategy}"))
    assert_same_run(tmp_path / "mixed", tmp_path / "ddp", 4, discriminator=True)
