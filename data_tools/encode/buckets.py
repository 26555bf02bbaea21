"""Which shapes pictures are cut to: tables of buckets, and the choice of one for a picture.

A bucket is (height, width) in pixels. Aspects are compared in log scale, on a grid of 1/512 of an octave
(0.14 %): so that counting pictures beforehand and placing them later agree to the last picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from finetune.data.shards import Bucket

GRID = 512
"""Steps of log aspect for each doubling of width / height."""

Histogram = Mapping[int, int]
"""Number of pictures by `aspect_step`."""


def aspect_step(height: int, width: int) -> int:
    """log2(width / height) on the grid."""
    return round(GRID * math.log2(width / height))


def aspect_table(size: int, step: int, max_aspect: float = 2.0) -> list[Bucket]:
    """Aspect buckets (height, width) for a budget of size^2 pixels, as SDXL's table has them (step 64).

    Sides are multiples of `step`, areas at most size^2 and as near to it as the step allows, and the
    longer side is at most `max_aspect` times the shorter. Podell et al. 2023 (arXiv 2307.01952), section
    2.3.
    """
    found = set()
    for short in range(step, size + 1, step):
        long = size * size // short // step * step
        both_full = size * size // long // step * step == short  # neither side can grow by a step
        if both_full and 1 / max_aspect <= long / short <= max_aspect:
            found |= {(short, long), (long, short)}
    return sorted(found)


def sdxl_table(size: int, step: int) -> list[Bucket]:
    """Shapes with sides that are multiples of `step`, from 1:4 to 4:1, of 90 % to 100 % of size^2 pixels.

    With size 1024 and step 64 these are the 40 rows of Podell et al. 2023 (arXiv 2307.01952), appendix I, and
    1344 x 704, the mirror of their 704 x 1344.
    """
    sides = range(step, 2 * size + 1, step)
    return [
        (height, width)
        for height in sides
        for width in sides
        if 0.9 * size * size <= height * width <= size * size and max(height, width) <= 4 * min(height, width)
    ]


def candidates(rule: str, size: int, step: int) -> list[Bucket]:
    """The table of a rule: `sd` (sides up to 2:1), `sdxl` (up to 4:1), and what `data` chooses from."""
    match rule:
        case "sd":
            return aspect_table(size, step)
        case "sdxl":
            return sdxl_table(size, step)
        case "data":
            return one_per_aspect([*aspect_table(size, step), *sdxl_table(size, step)])
        case _:
            raise ValueError(f"no rule {rule!r}")


def one_per_aspect(table: list[Bucket]) -> list[Bucket]:
    """The table in the order of aspects, with the largest bucket of each aspect."""
    best: dict[int, Bucket] = {}
    for bucket in sorted(table, key=lambda hw: (hw[0] * hw[1], hw)):
        best[aspect_step(*bucket)] = bucket
    return [best[step] for step in sorted(best)]


def nearest(height: int, width: int, table: list[Bucket]) -> Bucket:
    """The bucket of nearest aspect in log scale; of equals, the largest, then the first by (height, width)."""
    return table[_nearest_index(aspect_step(height, width), table)]


def _nearest_index(step: int, table: list[Bucket]) -> int:
    def badness(index: int) -> tuple[int, int, Bucket]:
        bucket = table[index]
        return abs(aspect_step(*bucket) - step), -bucket[0] * bucket[1], bucket

    return min(range(len(table)), key=badness)


def crop_loss(height: int, width: int, bucket: Bucket) -> float:
    """The share of the picture that is cut away when it is resized to cover the bucket."""
    ratio = (width * bucket[0]) / (height * bucket[1])
    return 1 - min(ratio, 1 / ratio)


def choose_buckets(table: list[Bucket], histogram: Histogram, most: int) -> list[Bucket]:
    """The at most `most` buckets of the table that minimise the mean share of a picture that is cropped away.

    A picture of log aspect x loses 1 - exp(-|x - b|) in the bucket of log aspect b. Sorted by aspect, what lies
    between two chosen buckets depends on these two alone, so a recursion over the last chosen one is exact: the
    k-median problem on a line. Takes O(most * len(table)^2) steps of the size of the histogram.

    Args:
        table: of distinct aspects; `one_per_aspect` gives such a table.
    """
    steps = np.array(sorted(histogram), np.int64)
    counts = np.array([histogram[step] for step in steps.tolist()], np.float64)
    if not len(steps):
        return table[:most]
    table = sorted(table, key=lambda hw: aspect_step(*hw))
    centres = np.array([aspect_step(*bucket) for bucket in table], np.int64)
    size = len(table)
    # loss[j, p]: of all pictures at step p in bucket j
    loss = counts * -np.expm1(-np.abs(centres[:, None] - steps) * (math.log(2) / GRID))

    def between(left: int, right: int) -> float:
        """Loss of the pictures above bucket `left` and up to bucket `right`; -1 and `size` are the ends."""
        low = -np.inf if left < 0 else centres[left]
        high = np.inf if right == size else centres[right]
        inside = (steps > low) & (steps <= high)
        sides = [loss[j, inside] for j in (left, right) if 0 <= j < size]
        return float(np.minimum.reduce(sides).sum()) if sides else math.inf

    cost = np.array([[between(i, j) if i < j else np.inf for j in range(size + 1)] for i in range(-1, size)])
    # total[k][j]: the least loss of pictures up to bucket j with k+1 buckets chosen, of which j is the last
    total = [cost[0, :size]]
    before: list[np.ndarray] = []
    for _ in range(1, min(most, size)):
        ways = total[-1][:, None] + cost[1:, :size]
        before.append(ways.argmin(axis=0))
        total.append(ways.min(axis=0))
    ends = [row + cost[1:, size] for row in total]
    # Of equally good choices, the one of fewest buckets: a bucket that nobody needs makes nothing better.
    least = min(float(row.min()) for row in ends)
    used = next(k for k, row in enumerate(ends) if row.min() <= least + 1e-12 * counts.sum())
    last = int(ends[used].argmin())
    chosen = [last]
    for k in range(used - 1, -1, -1):
        last = int(before[k][last])
        chosen.append(last)
    return [table[index] for index in reversed(chosen)]


def merge_small(table: list[Bucket], histogram: Histogram, least: int) -> list[Bucket]:
    """The table without buckets that fewer than `least` pictures would get.

    The smallest bucket goes first; its pictures count for the nearest of those that remain. One bucket always
    remains. Buckets that nobody needs go too, if `least` is 1 or more.
    """
    table = list(table)
    steps: dict[Bucket, list[int]] = {bucket: [] for bucket in table}  # of the pictures that each would get
    for step in histogram:
        steps[table[_nearest_index(step, table)]].append(step)
    sizes = {bucket: sum(histogram[step] for step in mine) for bucket, mine in steps.items()}
    while len(table) > 1:
        smallest = min(table, key=lambda bucket: (sizes[bucket], bucket))
        if sizes[smallest] >= least:
            break
        table.remove(smallest)
        for step in steps.pop(smallest):  # only these have another nearest one now
            heir = table[_nearest_index(step, table)]
            steps[heir].append(step)
            sizes[heir] += histogram[step]
    return table
