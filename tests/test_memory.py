"""Memory that a process may take: of its machine, and of its control groups."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import memory

WHOLE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for control groups, and `self`, which names this process's."""
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "self")
    return tmp_path / "groups"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.empty(2**52), r"^16777216\.0 GiB asked for$"),
        (lambda: torch.nn.Linear(10**12, 10**12), "^Storage size calculation overflowed"),
        (lambda: np.empty(2**52), "Unable to allocate"),
    ],
)
def test_shortages_have_one_name(make: Callable[[], object], says: str) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=says), memory.shortage_told():
        make()


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="^shapes$") as caught, memory.shortage_told():
        raise RuntimeError("shapes")
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def fill(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


def test_without_groups_it_is_the_machines(groups: Path) -> None:
    assert 2**20 < memory.free_bytes() < memory.limit_bytes() == WHOLE


def test_the_tightest_group_above_a_process_bounds_it(groups: Path) -> None:
    """Less what it uses, pages of files aside."""
    (groups.parent / "self").write_text("0::/slurm/job\n")
    fill(groups / "slurm" / "job", max="max", current="5", stat="anon 1")
    fill(groups / "slurm", max="3000000", current="1000000", stat="anon 1\ninactive_file 500000")
    assert (memory.limit_bytes(), memory.free_bytes()) == (3_000_000, 2_500_000)
    fill(groups / "slurm" / "job", max="2000000", current="3000000", stat="anon 1")
    assert (memory.limit_bytes(), memory.free_bytes()) == (2_000_000, 0)


def test_groups_of_the_first_version(groups: Path) -> None:
    (groups.parent / "self").write_text("4:cpu,cpuacct:/x\n3:memory:/job\n")
    fill(groups / "memory" / "job", limit_in_bytes="900", usage_in_bytes="300", stat="total_inactive_file 100")
    assert (memory.limit_bytes(), memory.free_bytes()) == (900, 700)
