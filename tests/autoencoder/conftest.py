"""Thirty small pictures of two shapes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data.shards import ShardWriter


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shards"
    generator = np.random.default_rng(0)
    with ShardWriter(root, "images") as writer:
        for number in range(30):
            size = (16, 16) if number % 3 else (8, 24)
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
            writer.write(f"{number:03d}", {"png": buffer.getvalue()}, size)
        writer.finish()
    return root
