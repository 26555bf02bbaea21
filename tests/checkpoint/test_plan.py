"""Where tensors lie: files that safetensors reads, every byte written once, and the work shared out."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from finetune.checkpoint.host import HostMemory
from finetune.checkpoint.plan import PAGE_BYTES, Member, Plan, make_plan, share
from finetune.checkpoint.writing import Piece, Writing, sum_of_words

SHAPES = st.lists(st.integers(1, 40), max_size=4).map(tuple)


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=20))
    files = draw(st.lists(st.sampled_from(["a", "b/c"]), min_size=len(shapes), max_size=len(shapes)))
    return [Member(0, i, f, f"key.{i}", s) for i, (f, s) in enumerate(zip(files, shapes, strict=True))]


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, int, int | None]:
    """A plan, its number of ranks and its limit of host memory."""
    tensors, size = draw(members()), draw(st.integers(1, 9))
    holders = [draw(st.none() | st.integers(0, size - 1)) for _ in tensors]
    limit = draw(st.none() | st.integers(1, 1_000_000))
    return make_plan(tensors, {"a": {"format": "pt"}}, holders, size, limit), size, limit


@given(plans())
def test_every_byte_is_written_once(made: tuple[Plan, int, int | None]) -> None:
    plan, size, _ = made
    for file, length in plan.sizes.items():
        covered = np.zeros(length, dtype=int)
        covered[: len(plan.headers[file])] += 1
        for rank in range(size):
            for number in range(plan.rounds):
                for entry in plan.of(rank, number):
                    if entry.tensor.file == file:
                        covered[entry.offset : entry.offset + entry.tensor.bytes] += 1
        assert (covered == 1).all()
        assert len(plan.headers[file]) % PAGE_BYTES == 0


@given(plans())
def test_safetensors_reads_the_files(made: tuple[Plan, int, int | None]) -> None:
    plan, _, _ = made
    for file, header in plan.headers.items():
        values = {
            entry.tensor.key: torch.full(entry.tensor.shape, float(entry.tensor.index))
            for entry in plan.entries
            if entry.tensor.file == file
        }
        data = bytearray(header) + bytes(plan.sizes[file] - len(header))
        for entry in plan.entries:
            if entry.tensor.file == file:
                raw = values[entry.tensor.key].numpy().tobytes()
                data[entry.offset : entry.offset + len(raw)] = raw
        read = load(bytes(data))
        assert read.keys() == values.keys()
        assert all(torch.equal(read[key], tensor) for key, tensor in values.items())


@given(plans())
def test_no_rank_needs_more_memory_than_the_limit_or_one_tensor(made: tuple[Plan, int, int | None]) -> None:
    plan, size, limit = made
    largest = max(entry.tensor.bytes for entry in plan.entries)
    needs = [plan.bytes_of(rank) for rank in range(size)]
    if limit is None:
        assert plan.rounds == 1
        assert sum(needs) == sum(entry.tensor.bytes for entry in plan.entries)
    else:
        assert max(needs) <= max(limit, largest)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 70))
def test_ranks_own_runs_of_about_equal_size(sizes: list[int], ranks: int) -> None:
    owners = share(sizes, [None] * len(sizes), ranks)
    assert owners == sorted(owners)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(loads) <= sum(sizes) / ranks + max(sizes)


def test_ranks_share_few_pages() -> None:
    """Whole pages come first in a file, so that neighbours' writes to a U-Net's weights do not meet in one page."""
    shapes = [(64,), (64, 64, 4), (3, 5), (128, 64), (2048,), (7,), (1024, 3)]
    tensors = [Member(0, i, "file", str(i), shape) for i, shape in enumerate(shapes)]
    plan = make_plan(tensors, {}, [None] * len(shapes), 3)
    aligned = [entry.offset % PAGE_BYTES == 0 for entry in plan.entries]
    whole = sum(4 * math.prod(shape) % PAGE_BYTES == 0 for shape in shapes)
    assert whole == 4
    assert all(aligned[:whole])


@settings(max_examples=30)
@given(plans())
def test_ranks_fill_files_together(made: tuple[Plan, int, int | None]) -> None:
    """In any order, without asking each other; their sums of words add up to the file's."""
    plan, size, _ = made
    with tempfile.TemporaryDirectory() as folder:
        _fill(plan, size, Path(folder))


def _fill(plan: Plan, size: int, folder: Path) -> None:
    reports = []
    for rank in reversed(range(size)):
        writing = Writing(folder, plan.sizes)
        pieces = [
            Piece(e.tensor.file, e.offset, lambda e=e: [memoryview(value_of(e.tensor).numpy().tobytes())])
            for number in range(plan.rounds)
            for e in plan.of(rank, number)
        ]
        if rank == 0:
            pieces += [Piece(file, 0, lambda text=text: [memoryview(text)]) for file, text in plan.headers.items()]
        writing.write(pieces, lambda: None)
        reports.append(writing.sums)
    for file in plan.sizes:
        read = load_file(folder / file)
        for entry in plan.entries:
            if entry.tensor.file == file:
                assert torch.equal(read[entry.tensor.key], value_of(entry.tensor))
        meant = sum(sums.get(file, 0) for sums in reports) % 2**64
        assert meant == sum_of_words(memoryview((folder / file).read_bytes()))


def value_of(member: Member) -> torch.Tensor:
    return torch.rand(member.shape, generator=torch.Generator().manual_seed(member.index))


def test_metadata_is_kept(tmp_path: Path) -> None:
    member = Member(0, 0, "file", "key", (2,))
    plan = make_plan([member], {"file": {"format": "pt", "more": '{"a": "ü"}'}}, [None], 1)
    (tmp_path / "file").write_bytes(plan.headers["file"] + bytes(8))
    save_file({"key": torch.zeros(2)}, tmp_path / "reference", {"format": "pt", "more": '{"a": "ü"}'})
    with safe_open(tmp_path / "file", "pt") as ours, safe_open(tmp_path / "reference", "pt") as reference:
        assert ours.metadata() == reference.metadata()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 16))
def test_tensors_may_lie_across_chunks_of_host_memory(sizes: list[int], words: int) -> None:
    from finetune.checkpoint import host

    kept, host._CHUNK_BYTES = host._CHUNK_BYTES, 4 * words
    try:
        memory = HostMemory(4 * sum(sizes), pinned=False)
        starts = [4 * sum(sizes[:i]) for i in range(len(sizes))]
        for turn in range(2):  # the memory is used again
            tensors = [torch.rand(size) + turn for size in sizes]
            for start, tensor in zip(starts, tensors, strict=True):
                memory.put(start, tensor)
            for start, tensor in zip(starts, tensors, strict=True):
                assert b"".join(memory.views(start, 4 * tensor.numel())) == tensor.numpy().tobytes()
    finally:
        host._CHUNK_BYTES = kept


def test_layouts_in_memory_do_not_matter() -> None:
    memory = HostMemory(4 * 24, pinned=False)
    tensor = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    memory.put(0, tensor)
    assert b"".join(memory.views(0, 96)) == tensor.contiguous().numpy().tobytes()
