"""Arrays in files."""

from __future__ import annotations

import numpy as np
import pytest

from finetune import npy


def test_an_array_is_read_though_other_threads_parse_at_once(tmp_path, monkeypatch):
    """Some versions of Python then raise SystemError."""
    array = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "a.npy", array)
    real, calls = np.load, []

    def load(*args, **settings):
        calls.append(args)
        if len(calls) % 3:
            args[0].read() if hasattr(args[0], "read") else None
            raise SystemError("AST constructor recursion depth mismatch (before=54, after=50)")
        return real(*args, **settings)

    monkeypatch.setattr(np, "load", load)
    for source in (tmp_path / "a.npy", (tmp_path / "a.npy").read_bytes()):
        assert np.array_equal(npy.load(source), array)
    mapped = npy.load(tmp_path / "a.npy", mmap_mode="r")
    assert np.array_equal(mapped, array) and not mapped.flags.writeable


def test_what_goes_on_failing_is_raised(tmp_path, monkeypatch):
    def load(*_, **__):
        raise SystemError("broken")

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(SystemError, match="broken"):
        npy.load(b"")
