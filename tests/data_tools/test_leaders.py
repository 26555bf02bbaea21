"""Who is kept is what comparing everything with everything says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.dedupe.leaders import distances, find_leaders


def brute(hashes: np.ndarray, colours: np.ndarray, distance: int, tolerance: int) -> list[int]:
    kept: list[int] = []
    numbers = [int.from_bytes(row.tobytes(), "little") for row in hashes]
    for row, number in enumerate(numbers):
        if not any(
            (number ^ numbers[k]).bit_count() <= distance and abs(colours[row] - colours[k]) <= tolerance
            for k in kept
        ):
            kept.append(row)
    return kept


def flip(base: np.ndarray, bits: list[int]) -> np.ndarray:
    row = base.copy()
    for bit in bits:
        row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return row


@settings(max_examples=100)
@given(
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.integers(0, 12),
    st.integers(1, 30),
    st.sampled_from([2, 5, 64]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([7, 20, 1 << 20]),
)
def test_it_is_the_greedy_choice(
    seed: int, count: int, distance: int, spread: int, small: int, most: int, rows: int
) -> None:
    """Few centres and few flipped bits: groups, chains, equal hashes of other colours, large groups."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, (max(count // 12, 1), 4), np.uint64)
    hashes = np.stack(
        [
            flip(centres[rng.integers(len(centres))], rng.integers(0, 256, rng.integers(0, spread)).tolist())
            for _ in range(count)
        ]
    )
    colours = rng.integers(0, 6, count)
    among = rng.random(count) < 0.8 if seed % 2 else np.ones(count, bool)
    got = find_leaders(
        hashes,
        distance,
        lambda a, b: np.abs(colours[a] - colours[b]) <= 2,
        among=among,
        rows=rows,
        small=small,
        most=most,
    )
    places = np.flatnonzero(among)
    want = places[brute(hashes[places], colours[places], distance, 2)]
    np.testing.assert_array_equal(np.flatnonzero(got == np.arange(count)), want)
    assert (got[~among] == -1).all()
    for row in places:
        assert got[row] in want
        assert got[row] <= row
        assert distances(hashes[row], hashes[got[row]]) <= distance
        assert abs(colours[row] - colours[got[row]]) <= 2


def test_many_equal_and_nearly_equal_hashes_take_no_square_of_pairs() -> None:
    """Almost blank pictures in three colours: all pairs would be eight hundred million."""
    rng = np.random.default_rng(0)
    hashes = np.zeros((40_000, 4), np.uint64)
    hashes[:, 3] = np.uint64(1) << rng.integers(0, 60, len(hashes)).astype(np.uint64)
    colours = rng.integers(0, 3, len(hashes))
    asked = 0

    def same_colour(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += len(a)
        return colours[a] == colours[b]

    got = find_leaders(hashes, 2, same_colour)
    kept = np.flatnonzero(got == np.arange(len(hashes)))
    assert kept.tolist() == sorted(int(np.flatnonzero(colours == c)[0]) for c in range(3))
    assert asked < len(hashes) ** 2 / 100


@pytest.mark.parametrize("distance", [0, 1, 8])
def test_nothing_and_one(distance: int) -> None:
    yes = lambda a, b: np.ones(len(a), bool)  # noqa: E731
    assert find_leaders(np.zeros((0, 4), np.uint64), distance, yes).tolist() == []
    assert find_leaders(np.zeros((1, 4), np.uint64), distance, yes).tolist() == [0]
    assert find_leaders(np.zeros((3, 4), np.uint64), distance, yes).tolist() == [0, 0, 0]
