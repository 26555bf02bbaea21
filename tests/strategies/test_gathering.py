"""ZeRO-3's weights are whole while they are computed with, and nowhere else.

A rank is played here: its pieces are whole weights, so that what others would send is there. Real ranks are
compared with each other in test_parity.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from finetune.distributed import World
from finetune.distributed.gathering import Gathering
from finetune.models.fast.linear import linear
from finetune.models.layout import store_channels_last

WIDTH = 80  # of matrices that are not kept whole


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # As a block does that takes weights from its layers without calling them.
        return x + nn.functional.linear(torch.tanh(self.first(x)), self.second.weight)


class Net(nn.Module):
    def __init__(self, *, tied: bool = False, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.own = nn.Parameter(torch.ones(WIDTH, WIDTH))  # of no layer
        self.checkpointing = checkpointing
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 9
        if tied:
            self.last.weight = self.blocks[0].first.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return (self.last(x) @ self.own).square().mean()


class Played:
    """A net whose weights are in pieces; `seen`: how many blocks were whole whenever one was computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: int, **settings: bool) -> None:
        self.net, self.plain = Net(**settings), Net(**settings)
        for parameter in self.net.parameters():
            parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
            parameter.ds_tensor = parameter.data.clone().view(-1)
        monkeypatch.setattr(Gathering, "_joined", self.joined)
        self.gathered: list[int] = []
        world = World(0, ranks, 0, torch.device("cpu"))
        self.gathering = Gathering(world, self.net, lambda module: isinstance(module, Block))
        self.gathering.renew()
        self.seen: list[int] = []
        for block in self.net.blocks:
            block.register_forward_hook(lambda *_: self.seen.append(self.whole()))
        self.gathered.clear()

    def joined(self, pieces: list[Tensor]) -> list[Tensor]:
        self.gathered.append(len(pieces))
        return [piece.clone() for piece in pieces]

    def whole(self) -> int:
        return sum(block[0].numel() > 0 for block in self.gathering.blocks)

    def compare(self, x: Tensor) -> None:
        with self.gathering.of_a_pass():
            loss = self.net(x)
            loss.backward()
        wanted = self.plain(x)
        wanted.backward()
        assert torch.equal(loss, wanted)
        named = dict(self.plain.named_parameters())
        for name, parameter in self.net.named_parameters():
            assert torch.equal(parameter.grad, named[name].grad), name
            parameter.grad = named[name].grad = None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_passes_are_those_of_whole_weights(monkeypatch, ranks, checkpointing):
    one = Played(monkeypatch, ranks, checkpointing=checkpointing)
    assert one.whole() == 0
    for number in range(3):
        one.compare(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(number)))
        assert one.whole() == 0  # after a pass
    assert max(one.seen) == ranks  # of several ranks the next block is on its way meanwhile
    one.gathered.clear()
    one.compare(torch.ones(2, WIDTH))
    assert len(one.gathered) == 2 * 5 - 1  # each block's once a direction, but the last one's once


def test_pieces_that_change_are_seen_by_the_next_pass(monkeypatch):
    one = Played(monkeypatch, 2)
    one.compare(torch.ones(2, WIDTH))
    places = [parameter.data_ptr() for parameter in one.gathering.kept]
    for parameter, plain in zip(one.net.parameters(), one.plain.parameters(), strict=True):
        parameter.ds_tensor.mul_(1.5)
        plain.data.mul_(1.5)
    one.gathering.renew()
    assert places == [parameter.data_ptr() for parameter in one.gathering.kept]  # where a CUDA graph reads them
    one.compare(torch.ones(2, WIDTH))


def test_evaluation_after_training_gathers_nothing_in_vain(monkeypatch):
    one = Played(monkeypatch, 2)
    one.compare(torch.ones(2, WIDTH))
    one.gathered.clear()
    for _ in range(2):
        with torch.no_grad(), one.gathering.of_a_pass():
            found = one.net(torch.ones(2, WIDTH))
    assert torch.equal(found, one.plain(torch.ones(2, WIDTH)))
    assert len(one.gathered) == 2 * 5 and one.whole() == 0


def test_weights_that_two_blocks_have_stay_whole(monkeypatch):
    one = Played(monkeypatch, 2, tied=True)
    assert any(p is one.net.last.weight for p in one.gathering.kept)
    assert any(p is one.net.own for p in one.gathering.kept)
    for _ in range(2):
        one.compare(torch.ones(2, WIDTH))


def test_a_pass_that_fails_leaves_nothing_whole(monkeypatch):
    one = Played(monkeypatch, 2)
    with pytest.raises(RuntimeError), one.gathering.of_a_pass():
        one.net(torch.ones(2, WIDTH + 1))
    assert one.whole() == 0
    one.compare(torch.ones(2, WIDTH))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        store_channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(1, (WIDTH, 1, 1))).flatten(1)


class Fast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)[0] + self.bias


@pytest.mark.parametrize("kind", [lambda: nn.Linear(WIDTH, WIDTH), Conv, lambda: Fast(WIDTH, WIDTH)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_of_weights_is_given_back_though_autograd_keeps_views_of_them(monkeypatch, ranks, kind):
    torch.manual_seed(0)
    net = nn.Sequential(*(kind() for _ in range(6)))
    plain = copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.ds_tensor = parameter.data.clone().view(-1)
    gathered: list[StorageWeakRef] = []

    def joined(_: Gathering, pieces: list[Tensor]) -> list[Tensor]:
        whole = [piece.clone() for piece in pieces] if ranks > 1 else pieces
        gathered.extend(StorageWeakRef(one.untyped_storage()) for one in whole)
        return whole

    monkeypatch.setattr(Gathering, "_joined", joined)
    gathering = Gathering(World(0, ranks, 0, torch.device("cpu")), net, lambda module: module in set(net))
    gathering.renew()
    for number in range(2):
        gathered.clear()
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(number))
        with gathering.of_a_pass():
            loss = net(x).square().mean()
            alive = sum(not one.expired() for one in gathered)
            assert alive == (6 if ranks == 1 else 1)  # pieces; the last block's
            loss.backward()
        plain(x).square().mean().backward()
        for one, other in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
            one.grad = other.grad = None
