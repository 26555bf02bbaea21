"""A file of weights is whole or not there, and as private as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.models import weight_files
from finetune.models.weight_files import read_weights, write_weights


def test_what_is_written_is_read(tmp_path):
    file, weight = tmp_path / "weights.safetensors", torch.arange(6.0).view(2, 3).requires_grad_()
    write_weights(file, {"weight": weight.t()}, {"made": "here"})
    tensors, metadata = read_weights(file)
    assert torch.equal(tensors["weight"], weight.t()) and list(tensors) == ["weight"]
    assert dict(metadata) == {"format": "pt", "made": "here"}


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    write_weights(tmp_path / "weights.safetensors", {"weight": torch.ones(2)})
    (tmp_path / "any").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    write_weights(file, {"weight": torch.ones(2)})

    def refused(tensors: object, path: Path, **settings: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "save_file", refused)
    with pytest.raises(OSError, match="No space left"):
        write_weights(file, {"weight": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert torch.equal(load_file(file)["weight"], torch.ones(2))
