"""verify, inspect and preview tell what is there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.cli import main
from data_tools.inspect import bars, caption_bins
from data_tools.preview import colour
from finetune.data.shards import Manifest, ShardSet, ShardWriter, json_bytes, parse_npy, write_classes
from finetune.models.autoencoder import decode, load_autoencoder
from tests.data_tools.conftest import Result, encoded, smooth_picture
from tests.scenes import CLASSES, draw_scene, write_scenes

Cli = Callable[..., Result]


@pytest.fixture
def latents(cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path) -> Path:
    cli("encode", image_shards, "--vae", vae_folder, "--out", tmp_path / "latents")
    return tmp_path / "latents"


def test_verify(cli: Cli, latents: Path) -> None:
    result = cli("verify", latents)
    assert (result.code, result.out.count("\n")) == (0, 1)
    assert "6 latents, 1 shards" in result.out
    os.truncate(latents / "00000.tar", 5000)
    result = cli("verify", latents)
    assert result.code == 1
    assert "00000.tar: 5000 bytes, the manifest says" in result.out
    assert cli("verify", latents / "nowhere").code == 2


def test_verify_says_the_same_in_workers(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path / "set", "images", max_samples=2) as writer:
        for number, key in enumerate(("k0", "k1", "k2", "k3", "k0")):
            picture = encoded(smooth_picture(number, 16, 16))
            writer.write(key, {"png": picture[: len(picture) // (1 + (key == "k3"))], "json": b"{}"})
        writer.finish()
    monkeypatch.setattr("data_tools.verify._FEW_BYTES", 0)
    alone, together = (cli("verify", tmp_path / "set", "--workers", workers) for workers in (0, 2))
    assert alone == together
    assert alone.code == 1
    lines = alone.out.splitlines()
    assert [line.partition(": ")[0] for line in lines[:-1]] == ["00001.tar", "00002.tar"]
    assert "k3: png: can't be decoded" in lines[0]
    assert "k0: the key is also in 00000.tar" in lines[1]


def test_verify_decodes_pictures(cli: Cli, tmp_path: Path) -> None:
    """Pictures that were damaged before they came into the shards: every checksum is right."""
    with ShardWriter(tmp_path / "set", "images") as writer:
        for number in range(3):
            data = encoded(smooth_picture(number, 16, 16))
            writer.write(f"s{number}", {"png": data[:99] if number == 1 else data, "txt": b"a"}, (16, 16))
        writer.finish()
    result = cli("verify", tmp_path / "set")
    assert result.code == 1
    assert "00000.tar: sample s1: png: can't be decoded" in result.out
    assert cli("verify", tmp_path / "set", "--no-decode").code == 0


def test_inspect_latents(cli: Cli, latents: Path) -> None:
    facts = json.loads(cli("inspect", latents, "--json").out)
    manifest = ShardSet.open(latents).manifest
    assert manifest.latents is not None
    assert (facts["kind"], facts["samples"], facts["shards"], facts["bytes"]) == ("latents", 6, 1, manifest.bytes)
    assert facts["buckets"] == {"32x32": {"samples": 6, "shards": 1}}
    assert facts["latents"]["channel_std"] == manifest.latents.channel_std
    assert facts["captions"] == {
        "samples_read": 6,
        "missing": 0,
        "per_sample": 1.0,
        "words": {"min": 2, "median": 2, "p95": 2, "max": 2},
        "first": ["picture 1", "picture 3", "picture 5", "picture 0", "picture 2"],
    }
    table = cli("inspect", latents, "--captions", 1).out
    for part in ("6 samples in 1 shards", "4 channels, 1/2 size, scale 0.18215", "picture 1", "latent.npy, json"):
        assert part in table
    assert "picture 3" not in table


def test_inspect_counts_captions(cli: Cli, tmp_path: Path) -> None:
    captions = [[], ["one two three"], ["one", "one two"]]
    with ShardWriter(tmp_path / "set", "images") as writer:
        for number, texts in enumerate(captions):
            record = json_bytes({"captions": texts})
            writer.write(f"s{number}", {"png": encoded(smooth_picture(0, 8, 8)), "json": record}, None)
        writer.write("s3", {"png": encoded(smooth_picture(0, 9, 8)), "txt": b"one two three four\n"}, None)
        writer.finish()
    facts = json.loads(cli("inspect", tmp_path / "set", "--json").out)
    assert facts["buckets"] == {"mixed": {"samples": 4, "shards": 1}}
    assert facts["captions"]["missing"] == 1
    assert facts["captions"]["per_sample"] == pytest.approx(4 / 3)
    assert facts["captions"]["words"] == {"min": 1, "median": 2.5, "p95": pytest.approx(3.85), "max": 4}
    assert facts["captions"]["first"] == ["one two three", "one", "one two three four"]


def test_inspect_plots(cli: Cli, latents: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.png", "two.png"):
        assert cli("inspect", latents, "--plot", tmp_path / "new" / name).code == 0
    one, two = ((tmp_path / "new" / name).read_bytes() for name in ("one.png", "two.png"))
    assert one == two
    sheet = np.asarray(Image.open(tmp_path / "new" / "one.png").convert("RGB")).reshape(-1, 3)
    assert (sheet == (31, 119, 180)).all(axis=1).mean() > 0.05  # bars
    result = cli("inspect", latents, "--plot", tmp_path / "plot.txt")
    assert (result.code, "should end in .png" in result.err) == (2, True)
    code = (
        "import sys; sys.modules['matplotlib'] = None; from data_tools.cli import entry; "
        f"sys.argv = ['data-tools', 'inspect', {str(latents)!r}, '--plot', 'x.png']; entry()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --plot needs matplotlib; run `pip install matplotlib`\n")


def test_plots_of_large_sets_stay_readable(tmp_path: Path) -> None:
    buckets = {f"{64 * n}x64": {"samples": 1000 - n, "shards": 1} for n in range(1, 101)}
    names, counts = bars(buckets)
    assert len(names) == 40
    assert names[-1] == "61 others"
    assert sum(counts) == sum(bucket["samples"] for bucket in buckets.values())
    assert bars({"64x64": {"samples": 3, "shards": 1}}) == (["64x64"], [3])


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=300))
def test_caption_bins_count_every_caption(lengths: list[int]) -> None:
    edges, counts, cut = caption_bins(lengths)
    assert len(counts) <= 62
    assert sum(counts) == len(lengths)
    assert cut == (max(lengths) >= edges[-1])
    for low, high, count in zip(edges[:-2], edges[1:-1], counts):
        assert count == sum(low <= length < high for length in lengths)


def test_inspect_says_when_it_samples(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.inspect._READ_AT_MOST", 3)
    with ShardWriter(tmp_path / "set", "images") as writer:
        for number in range(50):
            data = encoded(smooth_picture(0, 8, 8))
            writer.write(f"s{number}", {"png": data, "txt": b"one two"}, (8, 8 + number))
        writer.finish()
    table = cli("inspect", tmp_path / "set").out
    assert "0 samples (of 3 evenly spaced samples of 50)" in table
    assert "10 more buckets" in table
    assert len(json.loads(cli("inspect", tmp_path / "set", "--json").out)["buckets"]) == 50


def test_preview_of_pictures(cli: Cli, image_shards: Path, tmp_path: Path) -> None:
    result = cli("preview", image_shards, "--out", tmp_path / "new" / "sheet.png", "--count", 6, "--columns", 4)
    assert result.code == 0, result.err
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert sheet.shape == (2 + 2 * 34, 2 + 4 * 34, 3)
    shards = ShardSet.open(image_shards)
    for place in range(6):
        row, column = divmod(place, 4)
        tile = sheet[2 + row * 34 :, 2 + column * 34 :][:32, :32]
        number = int(Path(shards.read_json(place)["file"]).stem[1:])
        np.testing.assert_array_equal(tile, np.asarray(smooth_picture(number, 32, 32)))


def test_preview_of_large_pictures(cli: Cli, tmp_path: Path) -> None:
    """They are shown smaller: 64 photographs would take gigabytes."""
    with ShardWriter(tmp_path / "set", "images") as writer:
        for key, size in (("a", (1500, 1000)), ("b", (20, 9000)), ("c", (1024, 1024))):
            writer.write(key, {"png": encoded(smooth_picture(1, *size)), "json": b"{}"})
        writer.finish()
    assert cli("preview", tmp_path / "set", "--out", tmp_path / "sheet.jpg", "--columns", 3).code == 0
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.size == (3 * 2050 + 2, 1254 + 4)
    command = ("preview", tmp_path / "wide", "--columns", 40, "--plain", "--out")
    with ShardWriter(tmp_path / "wide", "images") as writer:
        for number in range(9):
            writer.write(f"k{number}", {"png": encoded(smooth_picture(1, 8, 2000)), "json": b"{}"})
        writer.finish()
    assert cli(*command, tmp_path / "sheet.png").code == 0
    result = cli(*command, tmp_path / "sheet.webp")
    assert (result.code, "18020x12 pixels, and .webp holds sides of 16383; take fewer" in result.err) == (2, True)


def test_texts_that_would_write_to_the_terminal(cli: Cli, tmp_path: Path) -> None:
    """Names with line ends, captions of 100,000 characters with an escape, a folder with dollars."""
    pytest.importorskip("matplotlib")
    root = tmp_path / "of $a_{$"
    record = {"captions": ["\x1b[31m" + 25_000 * "red "], "class": 0, "boxes": [[0, 0, 0, 1, 1]]}
    with ShardWriter(root, "images") as writer:
        writer.write("a", {"png": encoded(smooth_picture(1, 99, 99)), "json": json_bytes(record)})
        Manifest("images", writer.members, writer.close(), classes=write_classes(root, ["a\nb"])).save(root)
    assert cli("preview", root, "--out", tmp_path / "sheet.png").code == 0
    result = cli("inspect", root, "--plot", tmp_path / "plot.png")
    assert result.code == 0
    assert "caption          ?[31mred red" in result.out and "1 a?b\n" in result.out
    assert "\x1b" not in result.out and max(map(len, result.out.splitlines())) < 300


def test_preview_of_latents_is_their_decoding(cli: Cli, latents: Path, vae_folder: Path, tmp_path: Path) -> None:
    result = cli("preview", latents, "--out", tmp_path / "sheet.png", "--count", 3)  # samples 0, 2 (of 2.5), 5
    assert result.code == 0, result.err
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert sheet.shape == (2 + 34, 2 + 3 * 34, 3)
    moments = np.empty((3, 8, 16, 16), np.float16)
    ShardSet.open(latents).read_latents([0, 2, 5], moments)
    images = decode(load_autoencoder(vae_folder), torch.from_numpy(moments[:, :4]).float())
    for place in range(3):
        tile = sheet[2:34, 2 + place * 34 :][:, :32]
        want = ((images[place] + 1) * 127.5).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(tile, want, atol=0.51)


def test_preview_refuses_another_vae(cli: Cli, latents: Path, vae_folder: Path, tmp_path: Path) -> None:
    vae = load_autoencoder(vae_folder)
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.5)
    vae.save_pretrained(tmp_path / "other")
    result = cli("preview", latents, "--vae", tmp_path / "other", "--out", tmp_path / "sheet.png")
    assert (result.code, "error: wrong VAE" in result.err) == (2, True)
    assert not (tmp_path / "sheet.png").exists()
    result = cli("preview", latents, "--out", tmp_path / "sheet.txt")
    assert (result.code, "should end in .png" in result.err) == (2, True)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["ingest"],
        ["ingest", "folder"],
        ["ingest", "coco"],
        ["ingest", "iconify"],
        ["dedupe"],
        ["encode"],
        ["verify"],
        ["inspect"],
        ["preview"],
    ],
)
def test_every_command_explains_itself(cli: Cli, command: list[str]) -> None:
    result = cli(*command, "--help")
    assert result.code == 0
    assert "examples:\n  data-tools " + " ".join(command) in result.out
    assert cli(*command, "--no-such-option").code == 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["dedupe", "x", "--dist", "3"], "unrecognized arguments: --dist 3; see `data-tools --help`"),
        (["encode", "x"], "the following arguments are required: --vae, --out; see `data-tools encode --help`"),
        (["dedupe"], "the following arguments are required: SHARDS; see `data-tools dedupe --help`"),
    ],
)
def test_mistakes_read_as_those_of_finetune(cli: Cli, argv: list[str], line: str) -> None:
    """And options are not abbreviated: a script would break with the next option of a like name."""
    assert cli(*argv).err == f"error: {line}\n"


def test_help_does_not_load_torch() -> None:
    code = "import sys; from data_tools.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_interrupt_while_it_loads_is_no_traceback() -> None:
    code = """if 1:
        import sys
        class Interrupted:
            def find_spec(self, name, *_):
                if name in ("numpy", "PIL"):  # what any of its modules loads first
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupted())
        from data_tools.cli import entry
        entry()"""
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# --- classes, boxes, maps, masks, holes and small pictures


@pytest.fixture(scope="module")
def labelled(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes as `images` (64 px) and, with holes and small pictures, as `latents` (32 px)."""
    root = tmp_path_factory.mktemp("labelled")
    write_scenes(root, 6)
    more = ["--captions", root / "captions.json", "--maps", root / "maps"]
    coco = [
        "ingest",
        "coco",
        root / "instances.json",
        "--images",
        root / "pictures",
        "--out",
        root / "images",
        *more,
    ]
    assert main([str(argument) for argument in coco]) == 0
    made = ["--holes", 1, "--lowres", 4, "--size", 32, "--workers", 0]
    encode = ["encode", root / "images", "--vae", vae_folder, "--out", root / "latents", *made]
    assert main([str(argument) for argument in encode]) == 0
    return root


def test_inspect_tells_of_classes_and_boxes(cli: Cli, labelled: Path) -> None:
    counts = Counter(CLASSES[box[0]] for index in range(6) for box in draw_scene(index)[1])
    for name, members in (("images", {"map.png": 6}), ("latents", {"map.png": 6, "lowres.png": 6, "hole.npy": 6})):
        facts = json.loads(cli("inspect", labelled / name, "--json").out)
        assert facts["classes"] == CLASSES
        assert facts["labels"] == {"samples_read": 6, "samples": {**members, "boxes": 6}, "boxes": dict(counts)}
        table = cli("inspect", labelled / name).out
        assert "circle, square, triangle, ground" in table
        label, number = counts.most_common(1)[0]
        assert f"6 samples: {number} {label}, " in table


def test_inspect_of_a_set_without_labels_says_nothing_of_them(cli: Cli, image_shards: Path) -> None:
    facts = json.loads(cli("inspect", image_shards, "--json").out)
    assert not {"classes", "labels"} & facts.keys()


def test_verify_looks_into_maps(cli: Cli, labelled: Path, tmp_path: Path) -> None:
    assert cli("verify", labelled / "images").code == 0
    assert cli("verify", labelled / "latents").code == 0
    with ShardWriter(tmp_path / "set", "images") as writer:
        whole, odd = encoded(Image.new("L", (8, 8), 3)), b"a mask of somebody else"
        for number, label_map in enumerate([whole, encoded(Image.new("L", (8, 8), 4)), whole[:-30]]):
            picture = encoded(Image.new("RGB", (8, 8)))
            writer.write(f"k{number}", {"png": picture, "map.png": label_map, "mask.png": odd}, (8, 8))
        shards = writer.close()
    names = write_classes(tmp_path / "set", CLASSES)
    Manifest("images", writer.members, shards, classes=names).save(tmp_path / "set")
    result = cli("verify", tmp_path / "set")
    assert result.code == 1
    assert "sample k1: map.png: can't be decoded: map.png has label 4, the classes are 0 to 3" in result.out
    assert "sample k2: map.png: can't be decoded: " in result.out
    assert "2 problems" in result.out
    assert cli("verify", tmp_path / "set", "--no-decode").code == 0


def test_preview_draws_boxes_and_tints_maps(cli: Cli, labelled: Path, tmp_path: Path) -> None:
    for name, more in (("drawn", []), ("plain", ["--plain"])):
        result = cli("preview", labelled / "images", "--out", tmp_path / f"{name}.png", "--columns", 6, *more)
        assert result.code == 0, result.err
    drawn, plain = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("drawn", "plain"))
    assert drawn.shape == plain.shape == (2 + 66, 2 + 6 * 66, 3)
    for index in range(6):
        picture, boxes, labels, _ = draw_scene(index)
        left = 2 + 66 * index
        here, was = (sheet[2:66, left : left + 64] for sheet in (drawn, plain))
        np.testing.assert_array_equal(was, picture)
        tints = np.array([colour(label) for label in range(4)])[labels]
        inside = np.zeros((64, 64), bool)
        for label, *fractions in boxes:
            x0, y0, x1, y1 = (round(fraction * 64) for fraction in fractions)
            assert (here[y0, x0:x1] == colour(label)).all() and (here[y0:y1, x1 - 1] == colour(label)).all()
            inside[y0:y1, x0:x1] = True
        np.testing.assert_allclose(here[~inside], (0.45 * tints + 0.55 * picture)[~inside], atol=0.51)
    assert len({colour(label) for label in range(200)}) == 200


def test_preview_dims_what_a_mask_leaves_out(cli: Cli, tmp_path: Path) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    with ShardWriter(tmp_path / "set", "images") as writer:
        picture = Image.new("RGB", (16, 16), (200, 100, 40))
        members = {"png": encoded(picture), "mask.png": encoded(Image.fromarray(mask))}
        writer.write("k", members, (16, 16))
        writer.finish()
    assert cli("preview", tmp_path / "set", "--out", tmp_path / "sheet.png").code == 0
    tile = np.asarray(Image.open(tmp_path / "sheet.png"))[2:18, 2:18]
    assert (tile[:, 8:] == (200, 100, 40)).all()
    assert (tile[:, :8] == (60, 30, 12)).all()


def test_preview_shows_small_pictures_and_holes(cli: Cli, labelled: Path, vae_folder: Path, tmp_path: Path) -> None:
    result = cli("preview", labelled / "latents", "--out", tmp_path / "sheet.png", "--columns", 1)
    assert result.code == 0, result.err
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert sheet.shape == (2 + 6 * 34, 2 + 3 * 32 + 2, 3)
    shards, vae = ShardSet.open(labelled / "latents"), load_autoencoder(vae_folder)
    for number in range(6):
        row = sheet[2 + 34 * number :][:32, 2:98]
        small = np.asarray(Image.open(io.BytesIO(shards.read_member(number, "lowres.png"))))
        np.testing.assert_array_equal(row[:, 32:64], small.repeat(4, 0).repeat(4, 1))
        masked = parse_npy(shards.read_member(number, "masked.npy"))
        assert masked is not None
        image = decode(vae, torch.from_numpy(masked[:1, :4].astype(np.float32)))[0]
        np.testing.assert_allclose(row[:, 64:], ((image + 1) * 127.5).permute(1, 2, 0).numpy(), atol=0.51)
