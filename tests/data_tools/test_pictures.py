"""Units of a source: what is read of them, while the folder changes."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_tools.pictures import Picture, PictureSource


def test_units_are_those_that_were_there_at_first(image_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    shutil.copy(image_shards / "00000.tar", folder / "b.tar")
    (folder / "._b.tar").write_bytes(b"left by a Mac")
    source = PictureSource.open(folder)
    assert [unit.name for unit in source.units()] == ["b.tar"]
    shutil.copy(image_shards / "00000.tar", folder / "a.tar")
    for item in source.read(0):
        assert isinstance(item, Picture)
        assert item.key.startswith("b_")
