"""No command deletes what it is asked to read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data_tools.conftest import Result

Cli = Callable[..., Result]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_set_is_not_written_over_its_own_source(
    cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path, overwrite: list[str], through_a_link: bool
) -> None:
    source = tmp_path / "foreign"
    source.mkdir()
    shutil.copy(image_shards / "00000.tar", source)
    out = source
    if through_a_link:
        out = tmp_path / "link"
        out.symlink_to(source)
    before = content(source)
    for command in (
        ["ingest", "tars", source / "00000.tar"],
        ["ingest", "hf", source],
        ["ingest", "folder", source],
        ["encode", source, "--vae", vae_folder, "--size", 32],
    ):
        result = cli(*command, "--out", out, *overwrite)
        assert result.code == 2
        assert str(out) in result.err
        assert content(source) == before


def test_the_shards_of_an_image_set_stay(cli: Cli, image_shards: Path, vae_folder: Path) -> None:
    before = content(image_shards)
    result = cli("encode", image_shards, "--vae", vae_folder, "--out", image_shards, "--overwrite")
    assert (result.code, content(image_shards)) == (2, before)
    assert "is where the pictures come from" in result.err


def test_places_that_cannot_be_written(cli: Cli, image_shards: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for command in (
        ["preview", image_shards, "--out", tmp_path / "file" / "sheet.png"],
        ["inspect", image_shards, "--plot", tmp_path / "file" / "plot.png"],
        ["ingest", "folder", photos, "--out", tmp_path / "file" / "shards"],
        ["ingest", "folder", photos, "--out", "/proc/shards"],
    ):
        result = cli(*command)
        assert (result.code, "cannot write" in result.err) == (2, True)
    (tmp_path / "folder.png").mkdir()
    assert cli("preview", image_shards, "--out", tmp_path / "folder.png").code == 2
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png", "images", "photos"}
