"""Tables of buckets, the choice of buckets for a data set, and what small buckets come to."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.encode import buckets
from data_tools.encode.buckets import (
    GRID,
    aspect_step,
    aspect_table,
    candidates,
    choose_buckets,
    crop_loss,
    merge_small,
    nearest,
    one_per_aspect,
    sdxl_table,
)
from finetune.data.shards import ShardSet, verify
from tests.data_tools.conftest import Result, encoded, smooth_picture

Cli = Callable[..., Result]

# Podell et al. 2023 (arXiv 2307.01952), appendix I: height, width.
PAPER = """
512 2048, 512 1984, 512 1920, 512 1856, 576 1792, 576 1728, 576 1664, 640 1600, 640 1536, 704 1472, 704 1408,
704 1344, 768 1344, 768 1280, 832 1216, 832 1152, 896 1152, 896 1088, 960 1088, 960 1024, 1024 1024, 1024 960,
1088 960, 1088 896, 1152 896, 1152 832, 1216 832, 1280 768, 1344 768, 1408 704, 1472 704, 1536 640, 1600 640,
1664 576, 1728 576, 1792 576, 1856 512, 1920 512, 1984 512, 2048 512
"""
Bucket = tuple[int, int]


def test_aspect_table_is_sdxls() -> None:
    table = aspect_table(1024, 64)
    # From the table of Podell et al. 2023, appendix I.
    for bucket in [(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1344, 768), (1216, 832), (1152, 896)]:
        assert bucket in table
    for height, width in table:
        assert height % 64 == width % 64 == 0
        assert height * width <= 1024 * 1024
        assert (height + 64) * width > 1024 * 1024  # no side can grow
        assert height * (width + 64) > 1024 * 1024
        assert (width, height) in table


def test_nearest_is_the_one_of_nearest_log_aspect() -> None:
    table = aspect_table(512, 64)
    for height, width in table:
        assert nearest(height * 3, width * 3, table) == (height, width)
    assert nearest(10, 1000, table) == (384, 640)
    assert nearest(1000, 10, table) == (640, 384)
    assert nearest(100, 110, table) == (512, 512)
    assert nearest(100, 116, table) == (448, 576)  # sqrt(576 / 448) is 1.134
    assert nearest(1, 1, [(256, 256), (512, 512)]) == (512, 512)


def test_the_sdxl_table_is_the_papers() -> None:
    paper = {tuple(map(int, row.split())) for row in PAPER.split(",")}
    assert len(paper) == 40
    assert set(sdxl_table(1024, 64)) == paper | {(1344, 704)}


@pytest.mark.parametrize(("size", "step"), [(256, 16), (512, 32), (512, 64), (768, 64), (1024, 64)])
def test_tables_keep_to_their_rules(size: int, step: int) -> None:
    for rule, limit in (("sd", 2), ("sdxl", 4), ("data", 4)):
        table = candidates(rule, size, step)
        assert (size, size) in table
        for height, width in table:
            assert height % step == width % step == 0
            assert height * width <= size * size
            assert max(height, width) <= limit * min(height, width)
    assert len({aspect_step(*bucket) for bucket in candidates("data", size, step)}) == len(
        candidates("data", size, step)
    )


def test_the_nearest_is_the_nearest_in_log_scale() -> None:
    table = sdxl_table(1024, 64)
    for height, width in itertools.product(range(300, 2000, 170), repeat=2):
        bucket = nearest(height, width, table)
        distance = abs(math.log(bucket[1] / bucket[0]) - math.log(width / height))
        best = min(abs(math.log(w / h) - math.log(width / height)) for h, w in table)
        assert distance <= best + 2 * math.log(2) / GRID  # the grid that aspects are rounded to


def mean_loss(chosen: list[Bucket], histogram: dict[int, int]) -> float:
    total = 0.0
    for step, count in histogram.items():
        total += count * min(1 - 2 ** (-abs(aspect_step(*bucket) - step) / GRID) for bucket in chosen)
    return total / sum(histogram.values())


@settings(max_examples=60)
@given(
    histogram=st.dictionaries(st.integers(-1100, 1100), st.integers(1, 50), min_size=1, max_size=12),
    most=st.integers(1, 5),
)
def test_chosen_buckets_lose_least(histogram: dict[int, int], most: int) -> None:
    """Against all subsets."""
    table = one_per_aspect(sdxl_table(256, 64))
    assert len(table) >= 5
    chosen = choose_buckets(table, histogram, most)
    assert 1 <= len(chosen) <= most
    assert set(chosen) <= set(table)
    best = min(
        mean_loss(list(some), histogram)
        for size in range(1, most + 1)
        for some in itertools.combinations(table, size)
    )
    assert mean_loss(chosen, histogram) == pytest.approx(best, abs=1e-9)


def test_no_more_buckets_than_help() -> None:
    histogram = {aspect_step(512, 512): 100, aspect_step(384, 640): 3}
    assert choose_buckets(candidates("data", 512, 64), histogram, 12) == [(512, 512), (384, 640)]
    assert choose_buckets(candidates("data", 512, 64), {}, 3) == candidates("data", 512, 64)[:3]


@settings(max_examples=60)
@given(
    histogram=st.dictionaries(st.integers(-1100, 1100), st.integers(1, 50), min_size=1, max_size=12),
    least=st.integers(0, 100),
)
def test_merged_buckets_are_large_enough(histogram: dict[int, int], least: int) -> None:
    table = sdxl_table(256, 32)
    merged = merge_small(table, histogram, least)
    assert set(merged) <= set(table)
    assert len(merged) >= 1
    sizes = dict.fromkeys(merged, 0)
    for step, count in histogram.items():
        sizes[min(merged, key=lambda b: (abs(aspect_step(*b) - step), -b[0] * b[1], b))] += count
    assert sum(sizes.values()) == sum(histogram.values())
    if least == 0:
        assert merged == table
    elif len(merged) > 1:
        assert min(sizes.values()) >= least


def test_merging_looks_again_only_at_what_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each removed bucket all steps were compared with all buckets: minutes with steps of 16 pixels."""
    looked: list[int] = []
    nearest_index = buckets._nearest_index
    monkeypatch.setattr(buckets, "_nearest_index", lambda step, t: looked.append(step) or nearest_index(step, t))
    table, histogram = sdxl_table(1024, 32), dict.fromkeys(range(-1024, 1024), 1)
    assert len(table) == 144
    assert len(merge_small(table, histogram, 100)) > 10
    assert len(looked) < 6 * len(histogram)


def test_crop_loss() -> None:
    assert crop_loss(100, 100, (64, 64)) == 0
    assert crop_loss(100, 200, (64, 64)) == pytest.approx(0.5)
    assert crop_loss(300, 100, (64, 64)) == pytest.approx(2 / 3)


@pytest.fixture
def wide_and_square(cli: Cli, tmp_path: Path) -> Path:
    """20 pictures 1:1, 6 of 2:1, 1 of 1:2, in shards of 10."""
    (tmp_path / "in").mkdir()
    for number, (height, width) in enumerate([(40, 40)] * 20 + [(30, 60)] * 6 + [(60, 30)]):
        (tmp_path / "in" / f"{number:02d}.png").write_bytes(encoded(smooth_picture(number, height, width)))
    assert cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "images", "--shard-samples", 10).code == 0
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("extra", "want"),
    [
        (["sd"], [1, 6, 20]),
        (["sd", "--min-bucket", "2"], [6, 21]),
        (["sd", "--min-bucket", "7"], [27]),
        (["sdxl"], [1, 6, 20]),
        (["data", "--max-buckets", "1"], [27]),
        (["data", "--max-buckets", "2"], [6, 21]),
    ],
)
def test_encode_by_rule(
    cli: Cli, wide_and_square: Path, vae_folder: Path, tmp_path: Path, extra: list[str], want: list[int]
) -> None:
    common = ["--size", "32", "--bucket-step", "4", "--workers", "0"]
    result = cli(
        "encode",
        wide_and_square,
        "--vae",
        vae_folder,
        "--out",
        tmp_path / "out",
        *common,
        "--aspect-buckets",
        *extra,
    )
    assert result.code == 0, result.err
    assert verify(tmp_path / "out") == []
    sizes = ShardSet.open(tmp_path / "out").bucket_sizes
    assert sorted(sizes.values()) == want
    assert (32, 32) in sizes
    printed = re.findall(r"^ *(\d+) x (\d+) +(\d+) +[\d.]+%$", result.out, flags=re.MULTILINE)
    assert {(int(h), int(w)): int(n) for h, w, n in printed} == (sizes if len(sizes) > 1 else {})
