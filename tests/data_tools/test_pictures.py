"""Units of a source: what is read of them, while the folder changes."""

from __future__ import annotations

import os
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


def test_a_tar_that_was_written_again_is_another(image_shards: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    tar = foreign / "00000.tar"
    identities = []
    for second in range(2):  # of the same size
        shutil.copy(image_shards / tar.name, tar)
        os.utime(tar, (second, second))
        identities.append(PictureSource.open(foreign).identity())
    assert identities[0] != identities[1]
    shutil.copytree(image_shards, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (0, 0))
    assert PictureSource.open(tmp_path / "copy").identity() == PictureSource.open(image_shards).identity()
