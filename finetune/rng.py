"""Random draws as pure functions of (seed, purpose, id): the same on every rank, device and micro-batch.

A draw is addressed, not consumed: `normal(seed, "noise", ids, shape)[i]` depends on `seed`, the purpose and
`ids[i]` alone. So a resumed run repeats nothing and skips nothing, and how samples are spread over ranks and
micro-batches cannot be seen in the numbers. Nothing reads or moves torch's global generators.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), written in
integer tensor operations: its bits are equal on CPU and GPU. Normals come by Box-Muller, whose log and cosine
may differ in the last float32 bit between devices.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 random bits for each counter.

    Args:
        counter: four int64 tensors that broadcast together, each entry in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, entries in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap as two's complement; masking after the shift gives the unsigned high word.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def fold(seed: int, purpose: str) -> int:
    """A 64-bit seed for one purpose of one run: what a `numpy` or `torch` generator can be seeded with."""
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _bits(seed: int, purpose: str, ids_B: Tensor, words: int) -> tuple[Tensor, ...]:
    """Four int64 tensors [B, ceil(words / 4)] of 32 random bits."""
    key = fold(seed, purpose)
    ids_B1 = ids_B.to(torch.int64).unsqueeze(1)
    block_1N = torch.arange((words + 3) // 4, device=ids_B.device, dtype=torch.int64).unsqueeze(0)
    counter = (block_1N, torch.zeros_like(block_1N), ids_B1 & _MASK, (ids_B1 >> 32) & _MASK)
    return philox(counter, (key & _MASK, key >> 32))


def uniform(seed: int, purpose: str, ids_B: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Float32 [B, *shape] in [0, 1), with 24 random bits, on the device of `ids_B` (integers, any shape [B])."""
    words = math.prod(shape)
    bits = torch.stack(torch.broadcast_tensors(*_bits(seed, purpose, ids_B, words)), dim=2)
    return ((bits >> 8).to(torch.float32) * 2.0**-24).flatten(1)[:, :words].reshape(len(ids_B), *shape)


def integers(seed: int, purpose: str, ids_B: Tensor, high: int) -> Tensor:
    """Int64 [B] in [0, high), high at most 2^31; the bias of the multiply-shift map is below high / 2^32."""
    return (_bits(seed, purpose, ids_B, 1)[0][:, 0] * high) >> 32


def normal(seed: int, purpose: str, ids_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape] on the device of `ids_B` (integers [B])."""
    words = math.prod(shape)
    x0, x1, x2, x3 = _bits(seed, purpose, ids_B, words)
    pairs = []
    for radius_bits, angle_bits in ((x0, x1), (x2, x3)):
        # (bits + 1/2) / 2^32 stays inside (0, 1]: the logarithm is finite.
        radius = torch.sqrt(-2.0 * torch.log((radius_bits.to(torch.float32) + 0.5) * 2.0**-32))
        angle = angle_bits.to(torch.float32) * (2.0 * math.pi * 2.0**-32)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=2).flatten(1)[:, :words].reshape(len(ids_B), *shape)
