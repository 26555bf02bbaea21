"""Fast U-Nets on a CPU: by torch's own operations, or by kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from finetune.models import fast
from finetune.models.fast import blocks


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's interpreter gets wrong.

    It cuts float32's last bits off for bf16, and multiplies bf16's bits as integers; newer NumPy refuses the arrays
    of one number that it makes bounds of loops of.
    """
    if blocks.kernels is None or not blocks.kernels.INTERPRETED:
        return
    from triton.runtime import interpreter

    original: Callable[..., Any] = interpreter._convert_float

    def convert(values: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if (given.name, wanted.name) != ("fp32", "bf16"):
            return original(values, given, wanted, mode)
        floats = torch.from_numpy(np.array(values).view(np.float32))
        return floats.bfloat16().view(torch.int16).numpy().view(np.uint16)

    product: Callable[..., Any] = interpreter.InterpreterBuilder.create_dot

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(builder, *(widened(each) for each in (a, b)), *rest)

    def widened(handle: Any) -> Any:
        if handle.dtype.name != "bf16":
            return handle
        return interpreter.TensorHandle(
            (handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32
        )

    patched: Callable[..., Any] = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's operations, as where Triton is missing: the interpreter is slow."""
    monkeypatch.setattr(blocks, "kernels", None)


@pytest.fixture
def on_kernels() -> None:
    if blocks.kernels is None or not blocks.kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off, or there is no Triton")


@pytest.fixture
def fastened(on_torch: None, monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """U-Nets are made fast, as on a GPU; those that were so far."""
    made: list[torch.nn.Module] = []
    original = fast.make_fast
    monkeypatch.setattr(fast, "available", lambda device: True)
    monkeypatch.setattr(fast, "missing", lambda: None)
    monkeypatch.setattr(fast, "make_fast", lambda unet: made.append(unet) or original(unet))
    return made
