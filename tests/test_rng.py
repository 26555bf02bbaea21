"""Draws against Random123's known answers, and the invariants that training rests on."""

import numpy as np
import pytest
import torch

from finetune import rng

# Known-answer vectors of Random123 (kat_vectors, philox4x32-10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = rng.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_a_draw_depends_on_its_own_id_alone():
    ids = torch.tensor([5, 0, 2**40 + 3, 7])
    together = rng.normal(1, "noise", ids, (4, 3, 5))
    for i, one in enumerate(ids):
        assert torch.equal(together[i], rng.normal(1, "noise", one[None], (4, 3, 5))[0])
    assert torch.equal(rng.uniform(1, "t", ids)[2], rng.uniform(1, "t", ids[2:3])[0])


def test_seeds_purposes_and_ids_give_other_draws():
    ids = torch.arange(4)
    base = rng.uniform(0, "a", ids, (64,))
    for other in (
        rng.uniform(1, "a", ids, (64,)),
        rng.uniform(0, "b", ids, (64,)),
        rng.uniform(0, "a", ids + 2**32, (64,)),
    ):
        assert (base == other).float().mean() < 0.01
    assert abs(np.corrcoef(base.numpy()).ravel()[1]) < 0.5


def test_moments_and_range():
    ids = torch.arange(64)
    z = rng.normal(0, "noise", ids, (4, 32, 32)).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5 and abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    u = rng.uniform(0, "u", ids, (4096,))
    assert u.min() >= 0 and u.max() < 1 and abs(u.double().mean() - 0.5) < 5 / (12 * u.numel()) ** 0.5
    counts = torch.bincount(rng.integers(0, "t", torch.arange(100_000), 1000), minlength=1000)
    assert len(counts) == 1000 and counts.min() > 40 and counts.max() < 180


def test_global_generators_are_left_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rng.normal(0, "noise", torch.arange(2), (8,))
    assert torch.equal(state, torch.get_rng_state())
