"""What an optimizer remembers, in files without names."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from finetune import UserError
from finetune.distributed.files import in_file


def test_a_tensor_in_a_file_is_used_as_any_other(tmp_path):
    values = torch.randn(3, 1000)
    mapped = in_file(values, tmp_path)
    assert torch.equal(mapped, values) and mapped.data_ptr() != values.data_ptr()
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, even by a kill -9
    assert f"{tmp_path}/offload-" in Path("/proc/self/maps").read_text()  # it is a file's memory all the same
    mapped[1].mul_(2)
    assert torch.equal(mapped[1], values[1] * 2)
    assert in_file(torch.empty(0), tmp_path).numel() == 0


def test_a_disk_without_room_says_so_at_once(tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        UserError, match=r"no file of 0.00 GiB can be made there \(.*No space left.*choose a folder"
    ):
        in_file(torch.zeros(1000), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="strategy.offload_path=/not/there"):
        in_file(torch.zeros(1000), Path("/not/there"))
