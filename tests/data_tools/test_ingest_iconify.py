"""Iconify sets: what is drawn, which names, what is said of the source."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.ingest.iconify import GROUNDS, base_name, is_held_out
from finetune import BUNDLED
from finetune.data.shards import ShardSet, verify
from finetune.data.shards.images import decode_rgb
from tests.data_tools.conftest import Result

Cli = Callable[..., Result]

HALF = '<path fill="#f00" d="M0 0h8v16H0z"/>'  # the left half of a 16x16 frame
ICONS: dict[str, dict[str, Any]] = {
    "left-half": {"body": HALF},
    "flipped": {"body": HALF, "hFlip": True},
    "turned": {"body": HALF, "rotate": 1},
    "moved": {"body": '<path fill="#f00" d="M10 20h5v10h-5z"/>', "left": 10, "top": 20, "width": 10, "height": 10},
    "wide": {"body": '<path fill="#f00" d="M0 0h32v16H0z"/>', "width": 32},
    "old-name": {"body": HALF, "hidden": True},
    "broken": {"body": '<path d="M0 0'},
    "blank": {"body": '<path fill="none" d="M0 0h8v16H0z"/>'},
    "no-body": {},
    "bad-frame": {"body": HALF, "width": "many"},
}


def package(path: Path, icons: dict[str, dict[str, Any]], title: str = "Half Things") -> Path:
    files = {
        "package.json": {"name": "@iconify-json/half", "version": "1.2.3", "license": "MIT"},
        "info.json": {
            "name": title,
            "license": {"title": "MIT", "spdx": "MIT", "url": "https://example.org/licence"},
            "author": {"name": "Someone"},
        },
        "icons.json": {
            "prefix": "half",
            "icons": icons,
            "aliases": {"right-half": {"parent": "left-half", "hFlip": True}},
            "width": 16,
            "height": 16,
        },
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def drawn(root: Path, member: str = "png") -> dict[str, np.ndarray]:
    shards = ShardSet.open(root, "images")
    ids = range(len(shards))
    return {shards.key(i): np.asarray(decode_rgb(shards.read_member(i, member))) for i in ids}


def reds(pixels: np.ndarray) -> np.ndarray:
    red, white = (pixels == (255, 0, 0)).all(-1), (pixels == 255).all(-1)
    assert (red | white).all()
    return red


def test_icons_are_drawn_where_their_frame_says(cli: Cli, tmp_path: Path) -> None:
    source = package(tmp_path / "half.tgz", ICONS)
    result = cli("ingest", "iconify", source, "--out", tmp_path / "out", "--size", 32, "--format", "png")
    assert result.code == 0
    assert "icons of Half Things, licence: MIT" in result.out
    assert "4 set aside" in result.out
    icons = drawn(tmp_path / "out")
    assert sorted(icons) == ["flipped", "left-half", "moved", "turned", "wide"]
    columns, rows = np.meshgrid(np.arange(32), np.arange(32))
    np.testing.assert_array_equal(reds(icons["left-half"]), columns < 16)
    np.testing.assert_array_equal(reds(icons["moved"]), columns < 16)
    np.testing.assert_array_equal(reds(icons["flipped"]), columns >= 16)
    np.testing.assert_array_equal(reds(icons["turned"]), rows < 16)
    np.testing.assert_array_equal(reds(icons["wide"]), (rows >= 8) & (rows < 24))
    reasons = {
        row["file"]: row["reason"]
        for row in map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    }
    assert set(reasons) == {"broken", "blank", "no-body", "bad-frame"}
    assert reasons["blank"] == "draws nothing"
    assert verify(tmp_path / "out") == []


def test_captions_and_source(cli: Cli, tmp_path: Path) -> None:
    source = package(tmp_path / "half.tgz", {"left-half": ICONS["left-half"]})
    cli("ingest", "iconify", source, "--out", tmp_path / "a", "--size", 16)
    cli("ingest", "iconify", source, "--out", tmp_path / "b", "--size", 16, "--style-caption")
    assert ShardSet.open(tmp_path / "a").read_json(0) == {"captions": ["left half"], "original_size": [16, 16]}
    assert ShardSet.open(tmp_path / "b").read_json(0)["captions"] == ["left half, half things style"]
    assert json.loads((tmp_path / "a" / "SOURCE.json").read_text()) == {
        "package": "@iconify-json/half",
        "version": "1.2.3",
        "set": "Half Things",
        "license": {"title": "MIT", "spdx": "MIT", "url": "https://example.org/licence"},
        "author": {"name": "Someone"},
    }


def test_background_and_plain_json(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "icons.json").write_text(json.dumps({"prefix": "half", "icons": {"a": ICONS["left-half"]}}))
    cli(
        "ingest",
        "iconify",
        tmp_path / "icons.json",
        "--out",
        tmp_path / "out",
        "--background",
        "#0000ff",
        "--format",
        "png",
        "--size",
        8,
    )
    icon = drawn(tmp_path / "out")["a"]
    assert (icon[:, :4] == (255, 0, 0)).all()
    assert (icon[:, 4:] == (0, 0, 255)).all()


def test_choice_of_names(cli: Cli, tmp_path: Path) -> None:
    names = [f"icon-{n}" for n in range(20)]
    a = package(tmp_path / "a.tgz", dict.fromkeys(names, ICONS["left-half"]))
    b = package(tmp_path / "b.tgz", dict.fromkeys(reversed(names[5:]), ICONS["left-half"]))
    c = package(tmp_path / "c.tgz", {name: {**ICONS["left-half"], "hidden": name == "icon-7"} for name in names})

    def chosen(source: Path, *args: object) -> list[str]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        assert cli("ingest", "iconify", source, "--out", out, "--size", 8, *args).code == 0
        return list(drawn(out, "webp"))

    common = sorted(set(names[5:]) - {"icon-7"})
    assert chosen(a, "--common-with", b, c) == common
    few = chosen(a, "--common-with", b, c, "--limit", 6)
    assert few == chosen(b, "--common-with", a, c, "--limit", 6)  # the same whatever the set and its order
    assert len(few) == 6
    assert set(few) < set(chosen(a, "--common-with", b, c, "--limit", 9)) < set(common)
    (tmp_path / "names.txt").write_text("icon-3\nicon-1\n\n")
    assert chosen(a, "--names", tmp_path / "names.txt") == ["icon-1", "icon-3"]
    (tmp_path / "names.txt").write_text("icon-3\nnobody\n")
    result = cli("ingest", "iconify", a, "--out", tmp_path / "x", "--names", tmp_path / "names.txt")
    assert (result.code, "1 names are not in" in result.err) == (2, True)


def test_mistakes(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "not.tgz").write_bytes(b"no archive")
    (tmp_path / "not.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    for name, says in [
        ("nowhere.tgz", "npm pack"),
        ("not.tgz", "is no Iconify set (it is no tar)"),
        ("not.json", "is no Iconify set (it has no object `icons`)"),
        ("list.json", "is no Iconify set (icons.json is no JSON object)"),
        ("bytes.json", "is no Iconify set (icons.json is not JSON"),
        ("empty.tgz", "is no Iconify set (it has no icons.json)"),
    ]:
        result = cli("ingest", "iconify", tmp_path / name, "--out", tmp_path / "out")
        assert (result.code, says in result.err) == (2, True), result.err
        assert "Error" not in result.err  # a name of Python's
    source = package(tmp_path / "half.tgz", ICONS)
    result = cli("ingest", "iconify", source, "--out", tmp_path / "out", "--size", 99999999)
    assert (result.code, "--size 99999999 is too large a side" in result.err) == (2, True)


def test_odd_icons_are_set_aside(cli: Cli, tmp_path: Path) -> None:
    odd = {"no-object": 3, "half-\ud83d": {"body": HALF}, "huge": {"body": HALF, "width": 10**400}}
    content = {"prefix": "half", "info": {"license": "MIT"}, "icons": {"a": {"body": HALF}, **odd}}
    (tmp_path / "icons.json").write_text(json.dumps(content))
    result = cli("ingest", "iconify", tmp_path / "icons.json", "--out", tmp_path / "out")
    assert (result.code, "licence: MIT" in result.out) == (0, True)
    assert list(drawn(tmp_path / "out", "webp")) == ["a"]
    assert "3 set aside" in result.out


def test_same_package_same_bytes(cli: Cli, tmp_path: Path) -> None:
    source = package(tmp_path / "half.tgz", ICONS)
    for out in ("a", "b"):
        cli("ingest", "iconify", source, "--out", tmp_path / out)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


# --- the pictures in the box


def test_the_box_is_a_whole_set_under_its_licence(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("verify", "fluent-emoji").code == 0
    shards = ShardSet.open("fluent-emoji", "images")
    assert len(shards) == 1200
    assert shards.bucket_sizes == {(64, 64): 1200}
    folder = BUNDLED / "fluent-emoji"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4_000_000
    assert "Copyright (c) Microsoft Corporation." in (folder / "LICENSE").read_text()
    assert json.loads((folder / "SOURCE.json").read_text())["license"]["spdx"] == "MIT"
    assert not (folder / "rejects.jsonl").exists()


def test_the_box_has_pictures_of_what_it_says() -> None:
    shards = ShardSet.open("fluent-emoji")
    captions = {shards.read_json(i)["captions"][0]: i for i in range(len(shards))}
    assert len(captions) == 1200
    pictures = {}
    for colour in ("red", "green", "blue"):
        name = next(
            name for name in captions if name in (f"{colour} heart", f"{colour} square", f"{colour} circle")
        )
        pictures[colour] = np.asarray(decode_rgb(shards.read_member(captions[name], "webp")))[24:40, 24:40]
    for channel, colour in enumerate(("red", "green", "blue")):
        assert pictures[colour].mean(axis=(0, 1)).argmax() == channel


def test_held_out_names_take_their_disguises_along() -> None:
    names = ["cook", "man-cook", "woman-cook", "man-cook-dark-skin-tone", "woman-cook-medium-light-skin-tone"]
    assert {base_name(name) for name in names} == {"cook"}
    assert base_name("woman-walking-facing-right") == base_name("person-walking") == "walking"
    assert base_name("man") == base_name("woman-dark-skin-tone") == "person"
    assert base_name("red-apple") != base_name("green-apple")
    drawn_names = [f"icon-{i}" for i in range(2000)]
    assert 0.08 < sum(is_held_out(name, 0.1) for name in drawn_names) / 2000 < 0.12
    # A larger share holds out the same ones and more.
    assert all(is_held_out(name, 0.2) for name in drawn_names if is_held_out(name, 0.1))


def test_held_out_and_drawn_names_are_all_of_them(cli: Cli, tmp_path: Path) -> None:
    icons = {f"icon-{i}": {"body": HALF} for i in range(30)} | {"icon-0-dark-skin-tone": {"body": HALF}}
    source = package(tmp_path / "half.tgz", icons)
    some = ("ingest", "iconify", source, "--no-skin-tones", "--hold-out", 0.3)
    assert cli(*some, "--out", tmp_path / "train").code == 0
    assert cli(*some, "--held-out", "--out", tmp_path / "test").code == 0
    train, test = set(drawn(tmp_path / "train", "webp")), set(drawn(tmp_path / "test", "webp"))
    assert train and test and not train & test
    assert train | test == {f"icon-{i}" for i in range(30)}
    result = cli("ingest", "iconify", source, "--held-out", "--out", tmp_path / "none")
    assert result.code != 0 and "--hold-out 0.1" in result.err


def test_draws_keep_the_icon_whole_and_name_its_ground(cli: Cli, tmp_path: Path) -> None:
    source = package(tmp_path / "half.tgz", {"square": {"body": '<path fill="#f00" d="M0 0h16v16H0z"/>'}})
    out = tmp_path / "out"
    command = ("ingest", "iconify", source, "--draws", 7, "--size", 32, "--format", "png", "--style-caption")
    assert cli(*command, "--out", out).code == 0
    shards = ShardSet.open(out, "images")
    records = {shards.key(i): json.loads(shards.read_member(i, "json")) for i in range(len(shards))}
    pictures = drawn(out)
    assert len(pictures) == 7 and (pictures["square"] == (255, 0, 0)).all()
    for number in range(2, 8):
        key = f"square-draw{number}"
        (caption,) = records[key]["captions"]
        pixels = pictures[key].astype(int)
        _, _, ground = caption.partition(", on ")
        assert caption.startswith("square, half things style") and bool(ground) == (number % 2 == 1)
        distance = np.abs(pixels - (255, 0, 0)).max(-1)
        side = (distance < 40).sum() ** 0.5
        assert 0.8 * 32 <= side <= 32
        off = np.abs(pixels - GROUNDS.get(ground, (255, 255, 255))).max(-1)
        assert (off == 0).sum() > 0 or side > 31
    assert cli(*command, "--out", tmp_path / "again").code == 0
    assert all((picture == pictures[key]).all() for key, picture in drawn(tmp_path / "again").items())


def test_several_sets_go_into_the_same_shards(cli: Cli, tmp_path: Path) -> None:
    paths = []
    for title in ("Left Things", "Other Things"):
        folder = tmp_path / title.split()[0].lower()
        folder.mkdir()
        (folder / "info.json").write_text(json.dumps({"name": title, "prefix": folder.name}))
        icons = {"half": {"body": HALF}, folder.name: {"body": HALF}}
        (folder / "icons.json").write_text(json.dumps({"prefix": folder.name, "icons": icons}))
        paths.append(folder / "icons.json")
    assert cli("ingest", "iconify", *paths, "--common-with", *paths, "--out", tmp_path / "out").code == 0
    assert set(drawn(tmp_path / "out", "webp")) == {"left-half", "other-half"}
    assert [each["set"] for each in json.loads((tmp_path / "out/SOURCE.json").read_text())] == [
        "Left Things",
        "Other Things",
    ]
    result = cli("ingest", "iconify", paths[0], paths[0], "--out", tmp_path / "twice")
    assert result.code != 0 and "the same set twice" in result.err


def test_sets_whose_names_run_into_one_another(cli: Cli, tmp_path: Path) -> None:
    """Plain icons.json, whose `info` has no prefix; two icons that would have one key, in different shards."""
    paths = []
    for prefix, names in (("a", ["b-c", "x"]), ("a-b", ["c"])):
        paths.append(tmp_path / f"{prefix}.json")
        icons = {name: {"body": HALF} for name in names}
        paths[-1].write_text(json.dumps({"prefix": prefix, "icons": icons, "info": {"name": prefix.upper()}}))
    out = tmp_path / "out"
    assert cli("ingest", "iconify", *paths, "--shard-samples", 1, "--out", out).code == 0
    assert [*drawn(out, "webp")] == ["a-b-c", "a-x"] and verify(out) == []
    (row,) = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    assert row == {"file": "c", "reason": "another icon has its key, a-b-c; draw the sets one by one"}
