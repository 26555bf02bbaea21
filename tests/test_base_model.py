"""`benchmarks.base_model` measures what it says, on pictures where colour is the style and place is the name."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import base_model
from finetune.data.shards import ShardWriter, json_bytes
from finetune.evaluation.judge import Judge

STYLES = {"noto emoji": (200, 30, 30), "twitter emoji": (30, 30, 200), "fluent emoji": (30, 160, 30)}
PLACES = {f"place {letter}": index for index, letter in enumerate("abcdef")}


def write_places(
    root: Path, styles: Sequence[str], names: Sequence[str], draws: int, *, plain: bool = False
) -> Path:
    """64 px pictures whose style is their colour and whose name is where the square is; draws differ in shade."""
    with ShardWriter(root, "images") as writer:
        for style in styles:
            for name in names:
                for draw in range(draws):
                    pixels = np.full((64, 64, 3), 255, np.uint8)
                    row, column = divmod(PLACES[name], 3)
                    square = np.array(STYLES[style]) + 10 * draw
                    pixels[row * 32 + 4 : row * 32 + 28, column * 21 + 2 : column * 21 + 20] = square
                    buffer = io.BytesIO()
                    Image.fromarray(pixels).save(buffer, "PNG")
                    key = f"{style}-{name}".replace(" ", "-") + (f"-draw{draw + 1}" if draw else "")
                    caption = name if plain else f"{name}, {style} style"
                    writer.write(key, {"png": buffer.getvalue(), "json": json_bytes({"captions": [caption]})})
        writer.finish()
    return root


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    two, names = list(STYLES)[:2], list(PLACES)
    return {
        "train": write_places(root / "train", two, names[:4], 4),
        "held-out": write_places(root / "held-out", two, names[4:], 1),
        "fluent": write_places(root / "fluent", ["fluent emoji"], names, 1, plain=True),
    }


def test_judges_tell_styles_and_names_that_they_were_not_trained_on(places: dict[str, Path]) -> None:
    known, held_out = base_model.Pictures.read(places["train"]), base_model.Pictures.read(places["held-out"])
    fluent = base_model.Pictures.read(places["fluent"], "fluent emoji")
    cpu = torch.device("cpu")
    _, styles = base_model.judge_of_styles(known, held_out, fluent, 60, cpu)
    assert styles["trained_on"] == 4 * 2 * 4 + 4  # no name that is held out, in any style
    assert styles["pictures"] == 2 * 2 + 2 and styles["accuracy"] == 1.0
    assert styles["each"] == dict.fromkeys(STYLES, 1.0)
    _, names = base_model.judge_of_names(known, held_out, fluent, 60, cpu)
    assert names["classes"] == 6
    assert names["trained_on"] == 4 * 2 * 3 + 2 * 2  # all but the fourth draws
    assert names["unseen_draws"] == {"pictures": 8, "top1": 1.0, "top5": 1.0}
    assert names[base_model.FLUENT]["pictures"] == 6
    _, names = base_model.judge_of_names(known, held_out, fluent, 1, cpu, all_styles=True, width=8, places=2)
    assert names["trained_on"] == 4 * 2 * 3 + 2 * 2 + 6  # and Fluent Emoji's, which have no fourth draws
    assert base_model.FLUENT not in names


def test_rows_of_pictures_stay_together(places: dict[str, Path]) -> None:
    known = base_model.Pictures.read(places["train"])
    some = known.some([name == "place b" for name in known.names])
    both = some + known.some([style == "noto emoji" for style in known.styles])
    assert len(some.names) == 8 and len(both.names) == 8 + 16
    for pixels, key, name, style in zip(both.pixels, both.keys, both.names, both.styles, strict=True):
        assert key.startswith(f"{style}-{name}".replace(" ", "-"))
        row, column = divmod(PLACES[name], 3)
        colour = pixels[row * 32 + 16, column * 21 + 10].astype(int)
        assert abs(colour - STYLES[style]).max() <= 30
    assert not both.grounds.any()


def test_names_are_chosen_by_a_hash() -> None:
    names = [f"name {number}" for number in range(50)]
    found = base_model.chosen(set(names), 9)
    assert len(set(found)) == 9 and set(found) < set(names) and found != sorted(found)
    # Others coming or going do not change who is chosen of the rest.
    assert base_model.chosen(set(names) - {found[0]}, 8) == found[1:]
    assert base_model.chosen(set(names), 4) == found[:4]


def test_the_base_is_measured(tmp_path: Path, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--{name}={path}" for name, path in places.items()]
    words += ["--names=1", "--steps=2", "--guidance", "2", "--style-epochs=2", "--name-epochs=2"]
    out, judge, names = (tmp_path / name for name in ("measures.json", "styles.safetensors", "names.safetensors"))
    words += [f"--style-judge={judge}", f"--name-judge={names}"]
    assert base_model.main(["emoji-base", *words, f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["model"] == "emoji-base" and found["steps"] == 2 and list(found["samples"]) == ["guidance 2"]
    assert found["reconstructions"]["pictures"] == found["autoencoder"]["pictures"] == 4
    assert found["autoencoder"]["psnr"] > 22 and found["autoencoder"]["ssim"] > 0.8  # of flat grey: 9.6 dB
    for group in ("known", "held_out"):
        measured = found["samples"]["guidance 2"][group]
        assert measured["pictures"] == 2  # one name in both styles
        assert 0 <= measured["name_top1"] <= measured["name_top5"] <= 1
    assert Judge.load(judge).classes == sorted(STYLES)
    assert Judge.load(names).classes == sorted(PLACES)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["names"] for line in told if "guidance" in line] == ["known", "held_out"]
