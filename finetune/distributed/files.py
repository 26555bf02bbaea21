"""Tensors whose memory is a file: what an optimizer remembers, on a local disk instead of in host memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from finetune import UserError, first_line


def in_file(tensor: Tensor, folder: Path) -> Tensor:
    """A copy in a file of `folder`, which has no name and is gone with the process, however that ends.

    The system holds in memory what is in use as long as nothing else needs it, and writes the rest back.

    Raises:
        UserError: the folder can't be written to, or its disk has no room.
    """
    if not tensor.numel():
        return tensor
    try:
        handle, path = tempfile.mkstemp(dir=folder, prefix="offload-")
        try:
            # A disk that is full says so now, and not by a signal in the midst of a step.
            os.posix_fallocate(handle, 0, tensor.nbytes)
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(handle)
            os.unlink(path)
    except OSError as error:
        raise UserError(
            f"strategy.offload_path={folder}: no file of {tensor.nbytes / 2**30:.2f} GiB can be made there "
            f"({first_line(error)}); choose a folder on a local disk with room, or strategy.offload=cpu"
        ) from error
    return mapped.view(tensor.shape).copy_(tensor)
