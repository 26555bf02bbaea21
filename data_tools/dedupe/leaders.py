"""Which of many pictures are kept when those near an earlier kept one go: exactly, and in bounded memory.

Pictures come in the order of preference. The first is kept; every further one is kept unless a kept one is near it:
so each that goes is near one that stays, and chains of ever so slightly different pictures don't swallow a set.

Near pairs of 256-bit hashes are found by the pigeonhole principle: hashes that differ in at most d bits agree in
at least one of d + 1 bands. The pictures are sorted by each band, in partitions that fit into memory, and compared
within groups of equal bands. A group that is large (a million blank pictures) is not compared with itself, but with
its own leaders; whoever that leaves in doubt is looked at again in another round, when those that go are out of the
way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

HASH_BITS = 256

Near = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Rows of pairs (int64 [n], int64 [n]) whose hashes are near, to bool [n]: are the pictures near, too?"""

_KEPT, _GONE, _OPEN = 0, 1, 2
_CHUNK = 1 << 20  # rows or pairs at a time
_BLOCK = 256  # members of a large group at a time, and leaders they are compared with at once, times 16


def distances(a_N4: np.ndarray, b_N4: np.ndarray) -> np.ndarray:
    """Differing bits of pairs of hashes (uint64 [..., 4]), as int64 [...]."""
    return np.bitwise_count(a_N4 ^ b_N4).sum(axis=-1, dtype=np.int64)


def find_leaders(
    hashes_N4: np.ndarray,
    distance: int,
    near: Near,
    *,
    among: np.ndarray | None = None,
    rows: int = 1 << 23,
    small: int = 64,
    most: int = 8,
) -> np.ndarray:
    """For each picture the kept one that stands for it, int64 [N]; itself if it is kept, -1 if not in `among`.

    Args:
        hashes_N4: uint64 [N, 4], in the order of preference; may be a memory map.
        distance: bits in which the hashes of near pictures differ at most.
        near: the second check of pairs that pass the first.
        among: bool [N]: which rows take part (default: all).
        rows: sorted at a time; memory is about 80 bytes for each, and 10 for each of N, and 24 for each near pair
            (at most `most` for a row).
        small: larger groups of equal bands are compared with their leaders alone.
        most: near rows remembered for one row; the earliest.
    """
    count = len(hashes_N4)
    state_N = np.full(count, _OPEN, np.uint8)
    if among is not None:
        state_N[~among] = _GONE
    leader_N = np.full(count, -1, np.int64)
    bands = _bands(distance)
    while len(open_rows := np.flatnonzero(state_N == _OPEN)):
        doubt_N = np.zeros(count, bool)
        pairs: list[np.ndarray] = []  # int64 [n, 3]: row, an earlier row near it, distance
        for band in bands:
            for rows_n, key_n in _partitions(hashes_N4, band, state_N, open_rows, rows):
                found_n3 = _pairs_of(rows_n, key_n, hashes_N4, distance, near, state_N, doubt_N, small, most)
                if len(found_n3):
                    pairs.append(found_n3)
            if len(pairs) > 1:  # most pairs agree in several bands
                pairs = [_unique(np.concatenate(pairs), count)]
        _decide(open_rows, pairs, state_N, doubt_N, leader_N)
    kept = np.flatnonzero(state_N == _KEPT)
    leader_N[kept] = kept
    return leader_N


def _bands(distance: int) -> list[tuple[int, int]]:
    """(first bit, width) of distance + 1 bands that cover the hash."""
    marks = np.linspace(0, HASH_BITS, distance + 2).round().astype(int).tolist()
    return [(low, high - low) for low, high in itertools.pairwise(marks)]


def _band_keys(hashes_n4: np.ndarray, band: tuple[int, int]) -> np.ndarray:
    """The bits of a band as uint64 [n]; of a wider one the first 64, which only makes more pairs to check."""
    low, width = band[0], min(band[1], 64)
    word, shift = divmod(low, 64)
    key_n = hashes_n4[:, word] >> np.uint64(shift)
    if shift + width > 64:
        key_n = key_n | (hashes_n4[:, word + 1] << np.uint64(64 - shift))
    return key_n if width == 64 else key_n & np.uint64((1 << width) - 1)


def _partitions(
    hashes_N4: np.ndarray, band: tuple[int, int], state_N: np.ndarray, open_rows: np.ndarray, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, band keys) sorted by key and then by row, without those alone; equal keys come together.

    Only keys that some open row has: after the first round those are few.
    """
    count = len(hashes_N4)
    parts = -(-len(open_rows) // rows)
    all_open = len(open_rows) * 2 > count
    for part in range(parts):
        wanted = (
            None
            if all_open
            else np.unique(
                np.concatenate(
                    [
                        _of_part(_band_keys(hashes_N4[chunk], band), part, parts)[1]
                        for chunk in np.split(open_rows, range(_CHUNK, len(open_rows), _CHUNK))
                    ]
                )
            )
        )
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, count, _CHUNK):
            keys_n = _band_keys(hashes_N4[start : start + _CHUNK], band)
            place_n, keys_n = _of_part(keys_n, part, parts)
            use_n = state_N[start + place_n] != _GONE
            if wanted is not None:
                at = np.searchsorted(wanted, keys_n).clip(max=len(wanted) - 1)
                use_n &= wanted[at] == keys_n if len(wanted) else False
            found.append((start + place_n[use_n], keys_n[use_n]))
        rows_n = np.concatenate([rows_n for rows_n, _ in found])
        key_n = np.concatenate([key_n for _, key_n in found])
        del found
        order = np.argsort(key_n, kind="stable")
        rows_n, key_n = rows_n[order], key_n[order]
        same = key_n[1:] == key_n[:-1]
        company = np.zeros(len(key_n), bool)
        company[1:] |= same
        company[:-1] |= same
        yield rows_n[company], key_n[company]


def _of_part(keys_n: np.ndarray, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and keys of one of the partitions; keys are mixed first, as some bits of hashes hardly vary."""
    if parts == 1:
        return np.arange(len(keys_n)), keys_n
    mixed = (keys_n * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    place = np.flatnonzero(mixed % np.uint64(parts) == part)
    return place, keys_n[place]


def _pairs_of(
    rows_n: np.ndarray,
    key_n: np.ndarray,
    hashes_N4: np.ndarray,
    distance: int,
    near: Near,
    state_N: np.ndarray,
    doubt_N: np.ndarray,
    small: int,
    most: int,
) -> np.ndarray:
    """Near pairs (open row, earlier row, distance) within groups of equal keys; marks rows in doubt."""
    if not len(rows_n):
        return np.zeros((0, 3), np.int64)
    starts = np.flatnonzero(np.concatenate([[True], key_n[1:] != key_n[:-1]]))
    sizes = np.diff(np.append(starts, len(rows_n)))
    place_n = np.arange(len(rows_n)) - np.repeat(starts, sizes)
    found: list[np.ndarray] = []
    at = np.flatnonzero((np.repeat(sizes, sizes) <= small) & (state_N[rows_n] == _OPEN))
    for back in range(1, small):
        at = at[place_n[at] >= back]
        if not len(at):
            break
        for chunk in np.split(at, range(_CHUNK, len(at), _CHUNK)):
            found.append(_check(rows_n[chunk], rows_n[chunk - back], hashes_N4, distance, near))
    for start, size in zip(starts[sizes > small].tolist(), sizes[sizes > small].tolist(), strict=True):
        members = rows_n[start : start + size]
        found.append(_scan(members, hashes_N4, distance, near, state_N, doubt_N, most))
    pairs_n3 = np.concatenate(found) if found else np.zeros((0, 3), np.int64)
    return _earliest(pairs_n3, most, doubt_N)


def _check(a_n: np.ndarray, b_n: np.ndarray, hashes_N4: np.ndarray, distance: int, near: Near) -> np.ndarray:
    """Those of the pairs that are near, with their distances."""
    bits_n = distances(hashes_N4[a_n], hashes_N4[b_n])
    close = np.flatnonzero(bits_n <= distance)
    close = close[near(a_n[close], b_n[close])] if len(close) else close
    return np.stack([a_n[close], b_n[close], bits_n[close]], axis=1)


def _earliest(pairs_n3: np.ndarray, most: int, doubt_N: np.ndarray) -> np.ndarray:
    """At most `most` pairs for a row, those with the earliest others; rows that had more are in doubt."""
    pairs_n3 = pairs_n3[np.lexsort((pairs_n3[:, 1], pairs_n3[:, 0]))]
    if len(pairs_n3) <= most:
        return pairs_n3
    beyond = np.zeros(len(pairs_n3), bool)
    beyond[most:] = pairs_n3[most:, 0] == pairs_n3[:-most, 0]
    doubt_N[pairs_n3[beyond, 0]] = True
    return pairs_n3[~beyond]


def _scan(
    members: np.ndarray,
    hashes_N4: np.ndarray,
    distance: int,
    near: Near,
    state_N: np.ndarray,
    doubt_N: np.ndarray,
    most: int,
) -> np.ndarray:
    """Near pairs of a large group, each with a leader of the group: a kept row, or one near no leader before it.

    A row that comes after one that is no leader was not compared with all before it: it is in doubt.
    """
    leaders = np.zeros(0, np.int64)
    found: list[np.ndarray] = []
    followers = False
    for start in range(0, len(members), _BLOCK):
        block = members[start : start + _BLOCK]
        is_open = state_N[block] == _OPEN
        led = ~is_open  # rows of which nothing more need be known
        for low in range(0, len(leaders), _BLOCK * 16):
            some = leaders[low : low + _BLOCK * 16]
            asks = np.flatnonzero(is_open)
            pairs_n3 = _check_all(block[asks], some, hashes_N4, distance, near)
            pairs_n3 = _earliest(pairs_n3, most, doubt_N)
            found.append(pairs_n3)
            led |= np.isin(block, pairs_n3[:, 0])
        led_open = led & is_open  # whoever has a leader is none, and needs no further look here
        doubt_N[block[led_open]] = True
        followers_before = followers or bool(led_open.any())
        first_led = -1 if followers else int(led_open.argmax()) if followers_before else len(block)
        rest = np.flatnonzero(~led_open)
        inside_n3 = _check_all(block[~led], block[rest], hashes_N4, distance, near)
        inside_n3 = inside_n3[inside_n3[:, 0] > inside_n3[:, 1]]
        others: dict[int, list[int]] = {}
        for pair, row in enumerate(inside_n3[:, 0].tolist()):
            others.setdefault(row, []).append(pair)
        new = set(block[~is_open].tolist())
        for place, row in zip(rest.tolist(), block[rest].tolist(), strict=True):
            if row in new:
                continue
            mine = [pair for pair in others.get(row, ()) if int(inside_n3[pair, 1]) in new]
            doubt_N[row] |= bool(mine) or place > first_led
            if mine:
                found.append(inside_n3[mine])
                followers_before = True
                first_led = min(first_led, place)
            else:
                new.add(row)
        followers = followers_before
        leaders = np.concatenate([leaders, np.array(sorted(new), np.int64)])
    return np.concatenate(found) if found else np.zeros((0, 3), np.int64)


def _check_all(a_n: np.ndarray, b_m: np.ndarray, hashes_N4: np.ndarray, distance: int, near: Near) -> np.ndarray:
    """`_check` of every a with every b."""
    bits_nm = distances(hashes_N4[a_n][:, None], hashes_N4[b_m][None])
    at_a, at_b = np.nonzero(bits_nm <= distance)
    found = []
    for low in range(0, max(len(at_a), 1), _CHUNK):
        a, b = at_a[low : low + _CHUNK], at_b[low : low + _CHUNK]
        good = near(a_n[a], b_m[b]) if len(a) else np.zeros(0, bool)
        found.append(np.stack([a_n[a[good]], b_m[b[good]], bits_nm[a[good], b[good]]], axis=1))
    return np.concatenate(found)


def _unique(pairs_n3: np.ndarray, count: int) -> np.ndarray:
    """Each pair once, in order."""
    _, first = np.unique(pairs_n3[:, 0] * count + pairs_n3[:, 1], return_index=True)
    return pairs_n3[first]


def _decide(
    open_rows: np.ndarray, pairs: list[np.ndarray], state_N: np.ndarray, doubt_N: np.ndarray, leader_N: np.ndarray
) -> None:
    """In the order of preference: gone if near a kept row, kept if surely near none, else open for another round.

    The first open row has only kept ones before it, so it is never in doubt for long: every round decides some.
    """
    state_N[open_rows[~doubt_N[open_rows]]] = _KEPT  # unless a pair below says otherwise
    if not pairs:
        return
    pairs_n3 = _unique(np.concatenate(pairs), len(state_N))
    rows_n, starts = np.unique(pairs_n3[:, 0], return_index=True)
    ends = np.append(starts[1:], len(pairs_n3))
    for row, start, end in zip(rows_n.tolist(), starts.tolist(), ends.tolist(), strict=True):
        best: tuple[int, int] | None = None
        waits = bool(doubt_N[row])
        for _, other, bits in pairs_n3[start:end].tolist():
            match state_N[other]:
                case 0:  # _KEPT
                    best = (bits, other) if best is None else min(best, (bits, other))
                case 2:  # _OPEN
                    waits = True
        if best is not None:
            state_N[row], leader_N[row] = _GONE, best[1]
        else:
            state_N[row] = _OPEN if waits else _KEPT
