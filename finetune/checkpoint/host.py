"""Host memory for snapshots: taken once, used again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 28  # torch rounds page-locked memory up to a power of two: only the last chunk is a rounded one


class HostMemory:
    """`size` bytes in chunks, page-locked where `pinned` and the system allows.

    A tensor may lie across chunks; its place is counted in bytes from the first chunk's start.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.size = size
        self._views: dict[int, Tensor] = {}
        self.chunks: list[Tensor] = []
        for at in range(0, size, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, size - at)
            try:
                chunk = torch.empty(length, dtype=torch.uint8, pin_memory=pinned)
            except RuntimeError:
                if not pinned:
                    raise
                chunk, pinned = torch.empty(length, dtype=torch.uint8), False
            self.chunks.append(chunk)
        self.pinned = pinned

    def _parts(self, start: int, length: int) -> Iterator[tuple[int, Tensor]]:
        at = start
        while at < start + length:
            number, inside = divmod(at, _CHUNK_BYTES)
            part = self.chunks[number][inside : inside + start + length - at]
            yield at - start, part
            at += part.numel()

    def put(self, start: int, tensor: Tensor) -> None:
        """Copy values to byte `start`; from a GPU without waiting, on its current stream."""
        view = self._views.get(start)
        if view is None or view.shape != tensor.shape or view.dtype != tensor.dtype:
            parts = [part for _, part in self._parts(start, tensor.nbytes)]
            if len(parts) != 1:
                flat = tensor.contiguous().view(-1).view(torch.uint8)
                for at, part in self._parts(start, flat.numel()):
                    part.copy_(flat[at : at + part.numel()], non_blocking=True)
                return
            view = self._views[start] = parts[0].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor, non_blocking=True)  # of thousands of tensors: one call each

    def views(self, start: int, length: int) -> Iterator[memoryview]:
        """The bytes of a range, without a copy."""
        for _, part in self._parts(start, length):
            yield part.numpy().data
