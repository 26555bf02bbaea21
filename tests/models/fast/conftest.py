"""Fast U-Nets on a CPU: compiled by a backend that runs what was traced, without kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from finetune.models.fast import blocks


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's operations, as where Triton is missing: the interpreter is slow, and no compiler sees through it."""
    monkeypatch.setattr(blocks, "kernels", None)


@pytest.fixture
def on_kernels() -> None:
    if blocks.kernels is None or not blocks.kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off, or there is no Triton")


@pytest.fixture
def compiled(on_torch: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Says how many graphs were compiled so far."""
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **settings: original(f, backend="aot_eager", fullgraph=True, **settings)
    )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # `make_fast` sets it where nothing has
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = torch._dynamo.config
    limits = {name: getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with config.patch(**limits):  # as they were, at the end
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
