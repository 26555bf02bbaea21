"""COCO's files become boxes, captions, labels and maps, and what is wrong in them is counted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.ingest import coco
from finetune import UserError
from finetune.data.shards import ShardSet, verify
from tests.data_tools.conftest import Result, encoded
from tests.scenes import CLASSES, GROUND, draw_scene, write_scenes

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_scenes(folder, 9)
    return folder


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def rejects(root: Path) -> dict[str, str]:
    rows = map(json.loads, (root / "rejects.jsonl").read_text().splitlines())
    return {row["file"]: row["reason"] for row in rows}


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], object], source: Path) -> Path:
    data = json.loads((source / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    return folder / name


def ingest(cli: Cli, out: Path, annotations: Path, images: Path, *more: object) -> Result:
    return cli("ingest", "coco", annotations, "--images", images, "--out", out, *more)


def test_scenes_come_back_as_they_were_drawn(cli: Cli, scenes: Path, tmp_path: Path) -> None:
    more = ["--captions", scenes / "captions.json", "--maps", scenes / "maps"]
    result = ingest(cli, tmp_path / "out", scenes / "instances.json", scenes / "pictures", *more)
    assert result.code == 0, result.err
    assert "left out" not in result.out
    assert verify(tmp_path / "out") == []
    assert cli("verify", tmp_path / "out").code == 0
    shards = ShardSet.open(tmp_path / "out", "images")
    assert shards.classes() == CLASSES
    assert len(shards) == 9
    for index in range(9):
        picture, boxes, labels, caption = draw_scene(index)
        record = shards.read_json(index)
        assert (record["captions"], record["image_id"]) == ([caption], 1000 + index)
        assert [box[0] for box in record["boxes"]] == [box[0] for box in boxes]
        np.testing.assert_allclose(record["boxes"], boxes, atol=1e-6)
        np.testing.assert_array_equal(pixels_of(shards.read_member(index, "png")), picture)
        np.testing.assert_array_equal(pixels_of(shards.read_member(index, "map.png")), labels)


def test_captions_alone(cli: Cli, scenes: Path, tmp_path: Path) -> None:
    def another(data: dict[str, Any]) -> None:
        data["annotations"] += [{"image_id": 1002, "caption": " a  second one "}, {"image_id": 1002, "caption": 7}]
        data["annotations"].append({"image_id": 1, "caption": "whose?"})

    file = changed(tmp_path, "captions.json", another, scenes)
    result = ingest(cli, tmp_path / "out", file, scenes / "pictures")
    assert "2 captions left out: 1 that are no text, 1 of pictures that ANNOTATIONS doesn't list" in result.out
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes() == []
    assert shards.read_json(2)["captions"] == [draw_scene(2)[3], "a second one"]
    assert "boxes" not in shards.read_json(2)


def test_bad_entries_are_counted_and_the_rest_goes_on(cli: Cli, scenes: Path, tmp_path: Path) -> None:
    def worse(data: dict[str, Any]) -> None:
        good = {"image_id": 1000, "category_id": 30, "iscrowd": 0}
        data["annotations"] = [
            {**good, "bbox": [-4, 10, 20, 20]},  # 16 of 20 pixels are inside
            {**good, "bbox": [50.5, 60.5, 13.7, 3.6]},  # a fraction of a pixel too much, as COCO's own are
            {**good, "bbox": [64, 0, 5, 5]},
            {**good, "bbox": [-9, -9, 5, 5]},
            {**good, "bbox": [0, 0, 0, 5]},
            {**good, "bbox": [0, 0, 5]},
            {**good, "bbox": [0, 0, 5, float("inf")]},
            {**good, "bbox": [10**400, 0, 5, 5]},
            {**good, "bbox": [0, 0, 5, 5], "category_id": 35},
            {**good, "bbox": [0, 0, 5, 5], "category_id": [3]},
            {**good, "bbox": [0, 0, 5, 5], "image_id": 1},
            {**good, "bbox": [0, 0, 32, 64], "iscrowd": 1},
            {**good, "bbox": [0, 0, 5, 5], "image_id": 1008},
        ]
        data["images"][1]["file_name"] = "gone.png"
        data["images"][2]["width"] = 63
        data["images"][3]["file_name"] = "../up.png"
        data["images"][4]["file_name"] = "/etc/passwd"
        del data["images"][8]["width"]
        data["categories"].reverse()

    file = changed(tmp_path, "instances.json", worse, scenes)
    result = ingest(cli, tmp_path / "out", file, scenes / "pictures")
    assert result.code == 0, result.err
    assert (
        "11 boxes left out: 3 that are not four numbers, 2 outside their picture, 2 of an unknown category"
        in result.out
    )
    for reason in (
        "1 of crowds",
        "1 without width or height",
        "1 of pictures that",
        "1 of pictures without height",
    ):
        assert reason in result.out
    assert "1 boxes reached out of their picture by more than a pixel, and were clipped" in result.out
    assert "5 pictures in" in result.out
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes() == CLASSES
    boxes = shards.read_json(0)["boxes"]
    assert boxes == [
        [2, 0.0, 10 / 64, 0.25, 30 / 64],
        [2, pytest.approx(50.5 / 64), pytest.approx(60.5 / 64), 1.0, 1.0],
    ]
    reasons = rejects(tmp_path / "out")
    assert len(reasons) == 4
    assert reasons["gone.png"] == "no such file"
    assert reasons["../up.png"].startswith("a path that leads out of")
    assert [r for r in reasons.values() if "64x64 pixels, its annotations are for 64x63" in r]
    result = ingest(cli, tmp_path / "crowds", file, scenes / "pictures", "--crowds")
    assert "10 boxes left out" in result.out
    assert len(ShardSet.open(tmp_path / "crowds").read_json(0)["boxes"]) == 3


def test_outlines_are_not_kept_in_memory(scenes: Path, tmp_path: Path) -> None:
    import tracemalloc

    def outlined(data: dict[str, Any]) -> None:
        data["annotations"] = [
            {"image_id": 1000, "category_id": 10, "bbox": [0, 0, 1, 1], "segmentation": [[0.5] * 500]}
            for _ in range(200)
        ]

    file = changed(tmp_path, "instances.json", outlined, scenes)
    size = file.stat().st_size
    tracemalloc.start()
    data = coco.load(file)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data["annotations"]) == 200
    assert kept < size / 4


@pytest.mark.parametrize(
    ("values", "of"),
    [
        ("class", lambda label: label),
        ("id", lambda label: 10 * (label + 1)),
        ("id-1", lambda label: 10 * label + 9),
    ],
)
def test_what_the_pixels_of_maps_mean(
    cli: Cli, scenes: Path, tmp_path: Path, values: str, of: Callable[[np.ndarray], np.ndarray]
) -> None:
    for index in range(9):
        labels = draw_scene(index)[2].astype(int)
        path = tmp_path / "maps" / f"{CLASSES[index % 3]}/{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = of(labels).astype(np.uint8)
        stored[:3] = 255 if values == "class" else 7  # of no category
        Image.fromarray(stored).save(path)
    more = ["--maps", tmp_path / "maps", "--map-values", values]
    result = ingest(cli, tmp_path / "out", scenes / "instances.json", scenes / "pictures", *more)
    assert result.code == 0, result.err
    shards = ShardSet.open(tmp_path / "out")
    for index in range(9):
        want = draw_scene(index)[2].copy()
        want[:3] = 255
        np.testing.assert_array_equal(pixels_of(shards.read_member(index, "map.png")), want)


def write_panoptic(folder: Path, scenes: Path) -> tuple[Path, Path]:
    """Each shape a segment; the ground's category, 5, is none of the instances'; the last scene is left out."""
    (folder / "segments").mkdir()
    annotations = []
    for index in range(8):
        labels = draw_scene(index)[2].astype(np.int64)
        ids = np.where(labels == GROUND, 0, 66_051 * (labels + 1))
        ids[:8][labels[:8] == GROUND] = 300
        split = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(split).save(folder / "segments" / f"{index}.png")
        segments = [{"id": 66_051 * (kind + 1), "category_id": 10 * (kind + 1)} for kind in range(3)]
        segments.append({"id": 300, "category_id": 5})
        annotations.append({"image_id": 1000 + index, "file_name": f"{index}.png", "segments_info": segments})
    categories = [{"id": 5, "name": "soil"}, *({"id": 10 * n + 10, "name": CLASSES[n]} for n in range(3))]
    data = {"images": [], "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(data))
    return folder / "panoptic.json", folder / "segments"


def test_panoptic_maps(cli: Cli, scenes: Path, tmp_path: Path) -> None:
    file, folder = write_panoptic(tmp_path, scenes)
    more = ["--panoptic", file, folder]
    result = ingest(cli, tmp_path / "out", scenes / "instances.json", scenes / "pictures", *more)
    assert result.code == 0, result.err
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes() == ["soil", *CLASSES]
    assert len(shards) == 8
    assert list(rejects(tmp_path / "out").values()) == ["the panoptic file says nothing of it"]
    for index in range(8):
        _, boxes, labels, _ = draw_scene(index)
        want = np.where(labels == GROUND, 255, labels + 1)
        want[:8][labels[:8] == GROUND] = 0
        np.testing.assert_array_equal(pixels_of(shards.read_member(index, "map.png")), want)
        assert [box[0] for box in shards.read_json(index)["boxes"]] == [box[0] + 1 for box in boxes]


def test_size_cuts_boxes_and_maps(cli: Cli, tmp_path: Path) -> None:
    """A picture twice as wide as high: half of it is cut away, a quarter on each side."""
    picture, boxes, labels, _ = draw_scene(2, 64)
    for name, pixels in (("pictures", picture), ("maps", labels)):
        (tmp_path / name).mkdir()
        wide = np.concatenate([pixels[:, ::-1], pixels], axis=1)
        (tmp_path / name / "a.png").write_bytes(encoded(Image.fromarray(wide)))
    rows = []
    for kind, *fractions in boxes:
        x0, y0, x1, y1 = (fraction * 64 for fraction in fractions)
        rows += [
            {"image_id": 1, "category_id": kind, "bbox": [64 + x0, y0, x1 - x0, y1 - y0]},
            {"image_id": 1, "category_id": kind, "bbox": [64 - x1, y0, x1 - x0, y1 - y0]},
        ]
    images = [{"id": 1, "file_name": "a.png", "height": 64, "width": 128}]
    categories = [{"id": n, "name": name} for n, name in enumerate(CLASSES)]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    more = ["--size", 32, "--maps", tmp_path / "maps", "--min-box", 0.75]
    result = ingest(cli, tmp_path / "out", tmp_path / "a.json", tmp_path / "pictures", *more)
    assert result.code == 0, result.err
    assert " boxes left out: --size leaves less than 75% of each" in result.out
    shards = ShardSet.open(tmp_path / "out")
    cut = pixels_of(shards.read_member(0, "map.png"))
    want = (
        Image.fromarray(np.concatenate([labels[:, ::-1], labels], axis=1)).resize((64, 32), 0).crop((16, 0, 48, 32))
    )
    np.testing.assert_array_equal(cut, np.asarray(want))
    kept = shards.read_json(0)["boxes"]
    assert 0 < len(kept) < len(rows)
    for kind, *fractions in kept:
        x0, y0, x1, y1 = (round(32 * fraction) for fraction in fractions)
        assert (cut[y0:y1, x0:x1] == kind).mean() > 0.4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not JSON"),
        (b"[]", "has no list of images"),
        (b'{"images": [], "annotations": [3]}', "has no list of annotations"),
        (b'{"images": [{"id": "a", "file_name": "b"}], "annotations": []}', "has no id or file_name"),
        (
            b'{"images": [{"id": 1, "file_name": "b"}, {"id": 1, "file_name": "c"}], "annotations": []}',
            "two images have",
        ),
        (b'{"images": [], "annotations": [], "categories": [{"id": 1}]}', "has no id or name"),
        (
            b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "the category id 1 stands for 'a' and for 'b'",
        ),
        (
            b'{"images": [{"id": 1, "file_name": "x"}], "annotations": [], "categories": '
            b'[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "can be used",  # nothing is left, before the names are written
        ),
        (b'{"images": [], "annotations": [{"segments_info": []}]}', "is a panoptic file; give the instances file"),
        (b'{"images": [], "annotations": [{"keypoints": []}]}', "neither boxes nor captions"),
        (None, "no file"),
    ],
)
def test_files_that_are_none_of_cocos(cli: Cli, tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "images").mkdir()
    result = ingest(cli, tmp_path / "out", tmp_path / "a.json", tmp_path / "images")
    assert (result.code, says in result.err) == (2, True), result.err
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--maps", "MAPS", "--panoptic", "x", "y"], "--maps and --panoptic are both label maps"),
        (["--map-values", "id"], "--map-values id is for --maps"),
        (["--maps", "nowhere"], "no folder nowhere"),
        (["--maps", "RGB"], "none of 9 pictures in"),
        (["--maps", "RGB"], "map.png is RGB of 8 bits; it must be 8-bit grey, or a palette"),
        (["--maps", "EMPTY"], "none of 9 pictures in"),
    ],
)
def test_wrong_arguments(cli: Cli, scenes: Path, tmp_path: Path, more: list[str], says: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"MAPS": scenes / "maps", "RGB": scenes / "pictures", "EMPTY": tmp_path / "empty"}
    arguments = [places.get(argument, argument) for argument in more]
    result = ingest(cli, tmp_path / "out", scenes / "instances.json", scenes / "pictures", *arguments)
    assert (result.code, says in result.err) == (2, True), result.err


def test_odd_values_anywhere_end_in_shards_or_one_line(tmp_path: Path) -> None:
    """A value of the files is replaced by another, anywhere: that is a reject, a count or a UserError."""
    write_scenes(tmp_path / "in", 3)
    (tmp_path / "panoptic").mkdir()
    panoptic, folder = write_panoptic(tmp_path / "panoptic", tmp_path)
    files = {name: json.loads((tmp_path / "in" / name).read_text()) for name in ("instances.json", "captions.json")}
    files["panoptic.json"] = json.loads(panoptic.read_text())
    odd = [None, True, -1, 0, 10**30, 0.5, float("nan"), "", "a\x00", "é" * 300, "../x", [], [[]], {}, {"id": 10}]
    random = np.random.default_rng(0)
    refused = 0
    for attempt in range(90):
        damaged = json.loads(json.dumps(files))
        node = damaged[list(damaged)[attempt % 3]]
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[random.integers(len(keys))]
            if not isinstance(node[key], dict | list) or not node[key] or random.random() < 0.15:
                break
            node = node[key]
        node[key] = odd[random.integers(len(odd))]
        for name, content in damaged.items():
            (tmp_path / name).write_text(json.dumps(content))
        out = tmp_path / f"out{attempt}"
        images = ["--images", tmp_path / "in" / "pictures", "--captions", tmp_path / "captions.json"]
        maps = ["--panoptic", tmp_path / "panoptic.json", folder] if attempt % 3 == 2 else []
        command = ["ingest", "coco", tmp_path / "instances.json", *images, *maps, "--out", out]
        said = ""
        try:
            assert main([str(argument) for argument in command]) == 0
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        assert said or verify(out) == []
        refused += bool(said)
    assert 5 < refused < 80


# --- folders


def test_folders_with_classes_maps_and_masks(cli: Cli, scenes: Path, tmp_path: Path) -> None:
    more = ["--classes", "--maps", scenes / "maps", "--masks", scenes / "masks"]
    result = cli("ingest", "folder", scenes / "pictures", "--out", tmp_path / "out", *more)
    assert result.code == 0, result.err
    assert verify(tmp_path / "out") == []
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes() == CLASSES
    for number in range(9):
        record = shards.read_json(number)
        index = int(Path(record["file"]).stem)
        _, _, labels, caption = draw_scene(index)
        assert (record["class"], record["captions"]) == (index % 3, [caption])
        np.testing.assert_array_equal(pixels_of(shards.read_member(number, "map.png")), labels)
        mask = pixels_of(shards.read_member(number, "mask.png"))
        assert set(np.unique(mask)) == {128, 255}
        assert (mask[labels != GROUND] == 255).all()


def test_class_folders_by_name(cli: Cli, tmp_path: Path) -> None:
    for name in ("tulip/a/1.png", "aster/2.png", "0.png", "tulip/3.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.new("RGB", (16, 16))))
    (tmp_path / "in" / "empty").mkdir()
    assert cli("ingest", "folder", tmp_path / "in", "--classes", "--out", tmp_path / "out").code == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes() == ["aster", "tulip"]
    found = {record["file"]: record["class"] for record in map(shards.read_json, range(3))}
    assert found == {"aster/2.png": 0, "tulip/3.png": 1, "tulip/a/1.png": 1}
    assert "so it has no class" in rejects(tmp_path / "out")["0.png"]
    (tmp_path / "in" / "classes.json").write_text('["tulip", "rose", "aster"]')
    assert cli("ingest", "folder", tmp_path / "in", "--classes", "--out", tmp_path / "two").code == 0
    shards = ShardSet.open(tmp_path / "two")
    assert shards.classes() == ["tulip", "rose", "aster"]
    assert [shards.read_json(n)["class"] for n in range(3)] == [2, 0, 0]
    (tmp_path / "in" / "classes.json").write_text('["tulip"]')
    result = cli("ingest", "folder", tmp_path / "in", "--classes", "--out", tmp_path / "three")
    assert (result.code, "has no 'aster', which is a folder of pictures" in result.err) == (2, True)
    (tmp_path / "in" / "classes.json").write_text('{"tulip": 1}')
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "three")
    assert (result.code, "is no list of names" in result.err) == (2, True)
    result = cli("ingest", "folder", tmp_path / "in" / "aster", "--classes", "--out", tmp_path / "three")
    assert (result.code, "no folders with pictures" in result.err) == (2, True)


def test_pictures_without_map_or_mask(cli: Cli, tmp_path: Path) -> None:
    for folder in ("in", "in/maps", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    for number in range(2):
        (tmp_path / "in" / "maps" / f"{number}.png").write_bytes(encoded(Image.new("L", (16, 16), 40 * number)))
    (tmp_path / "masks" / "1.png").write_bytes(encoded(Image.new("1", (16, 16), 1)))
    more = ["--maps", tmp_path / "in" / "maps", "--masks", tmp_path / "masks"]
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "out", *more)
    assert result.code == 0, result.err
    assert "2 of 3 pictures have no mask in" in result.out
    assert "2 pictures in" in result.out  # the maps are none, though they lie below
    (reason,) = rejects(tmp_path / "out").values()
    assert reason == f"{tmp_path / 'in' / 'maps' / '2.png'}: no such file"
    shards = ShardSet.open(tmp_path / "out")
    assert [shards.has_member(n, "mask.png") for n in range(2)] == [False, True]
    assert pixels_of(shards.read_member(1, "mask.png")).min() == 255
    assert pixels_of(shards.read_member(1, "map.png")).max() == 40
    (tmp_path / "in" / "classes.json").write_text('["a", "b"]')
    cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "few", "--maps", tmp_path / "in" / "maps")
    assert "map.png has label 40, the classes are 0 to 1" in rejects(tmp_path / "few")["1.jpg"]
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "x", "--maps", tmp_path / "in")
    assert (result.code, "is the folder of the pictures" in result.err) == (2, True)
    result = cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "masks", "--masks", tmp_path / "masks")
    assert (result.code, "is where the pictures come from" in result.err) == (2, True)


def test_boxes_and_classes_in_metadata(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = []
    for number, (label, boxes) in enumerate([(1, [[0, 0, 0, 0.5, 1]]), (2, []), (0, [[5, 0, 0, 1, 1]]), ("a", [])]):
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(Image.new("RGB", (32, 16))))
        rows.append(json.dumps({"file_name": f"{number}.png", "class": label, "boxes": boxes}))
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(rows))
    assert cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "any").code == 0
    assert len(ShardSet.open(tmp_path / "any")) == 4
    (tmp_path / "in" / "classes.json").write_text('["a", "b"]')
    assert cli("ingest", "folder", tmp_path / "in", "--size", 16, "--out", tmp_path / "out").code == 0
    assert verify(tmp_path / "out") == []
    shards = ShardSet.open(tmp_path / "out")
    assert len(shards) == 1
    assert shards.read_json(0)["boxes"] == [[0, 0.0, 0.0, 0.5, 1.0]]
    reasons = rejects(tmp_path / "out")
    assert reasons["1.png"] == "its class is 2, the classes are 0 to 1"
    assert reasons["2.png"] == "a box has class 5, the classes are 0 to 1"
    assert reasons["3.png"] == "its class is 'a', the classes are 0 to 1"
