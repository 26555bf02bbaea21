"""`make demo`: what it says of its names is so, its picture has what it says, and its parts fit each other."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import BUNDLED, UserError, __version__, cli, demo
from finetune.config import Config, compose
from finetune.data.shards import ShardSet
from finetune.evaluation.judge import Judge
from tests.conftest import ROOT


def names_in_the_box() -> set[str]:
    shards = ShardSet.open(demo.PICTURES, "images")
    names = {shards.read_json(index)["captions"][0] for index in range(len(shards))}
    shards.close()
    return names


def test_half_of_the_rows_were_never_seen_in_the_style() -> None:
    box = names_in_the_box()
    assert set(demo.SEEN) <= box
    assert not set(demo.UNSEEN) & box
    assert len(set(demo.UNSEEN)) == len(demo.UNSEEN)
    assert [*demo.SEEN, *demo.UNSEEN[: len(demo.SEEN)]] == demo.ROWS
    # A prompt on each line, in words that the base has read: two styles of emoji.
    assert demo.lines_of(["bell", "lion"]) == "bell, emoji style\nlion, emoji style\n"


def test_the_column_in_the_middle_is_of_a_checkpoint_that_is_kept() -> None:
    config, _ = compose("train", ["experiment=demo", "data.shards=x"], Config)
    steps = range(config.checkpoint.every, config.train.steps + 1, config.checkpoint.every)
    assert demo.MIDDLE in steps[-config.checkpoint.keep :]
    assert config.train.steps > demo.MIDDLE
    assert config.model.pretrained == demo.BASE


def test_the_judge_tells_fluent_emoji_from_the_same_without_colours(tmp_path: Path) -> None:
    shards = ShardSet.open(demo.PICTURES, "images")
    pictures = []
    for index in range(0, len(shards), 20):
        path = tmp_path / f"{index}.webp"
        path.write_bytes(shards.read_member(index, "webp"))
        pictures.append(path)
    shards.close()
    grey = []
    for path in pictures:
        grey.append(path.with_suffix(".grey.png"))
        Image.open(path).convert("L").save(grey[-1])
    wanted = [demo.STYLE] * len(pictures)
    real = demo.share_found(demo.STYLES, pictures, wanted)
    assert real > 0.8
    assert demo.share_found(demo.STYLES, grey, wanted) < real - 0.3


def test_the_judge_of_names_knows_what_is_drawn(tmp_path: Path) -> None:
    assert set(demo.ROWS + demo.UNSEEN) <= set(Judge.load(BUNDLED / demo.BASE / demo.NAMES).classes)
    shards, paths = ShardSet.open(demo.PICTURES, "images"), {}
    for index in range(len(shards)):
        if (name := shards.read_json(index)["captions"][0]) in demo.SEEN:
            paths[name] = tmp_path / f"{index}.webp"
            paths[name].write_bytes(shards.read_member(index, "webp"))
    shards.close()
    pictures = [paths[name] for name in demo.SEEN]
    assert demo.share_found(demo.NAMES, pictures, demo.SEEN) == 1
    assert demo.share_found(demo.NAMES, pictures, demo.SEEN[1:] + demo.SEEN[:1]) == 0


def test_the_picture_has_a_row_for_each_name_and_a_column_for_each_title(tmp_path: Path) -> None:
    for column, count in (("before", len(demo.ROWS) + 2), ("after", len(demo.ROWS))):
        (tmp_path / column).mkdir()
        for row in range(count):
            level = 10 * row + (5 if column == "after" else 0)
            Image.new("RGB", (4, 4), (level, level, level)).save(tmp_path / column / f"{row:04d}-name.png")
        Image.new("RGB", (9, 9)).save(tmp_path / column / "grid.png")
    demo.sheet(tmp_path, {"before": "first", "after": "then"}, tmp_path / "demo.png")
    pixels = np.asarray(Image.open(tmp_path / "demo.png"))
    side, half = 128 + 8, len(demo.SEEN)  # a picture, and the gap
    width, top = 2 * side - 8, 2 * 22
    assert pixels.shape == (top + side * half - 8, 2 * width + 40, 3)
    assert (pixels[:top] < 128).any()  # titles
    for number in range(len(demo.ROWS)):
        left, row = divmod(number, half)
        block = pixels[top + side * row : top + side * row + 128, left * (width + 40) :]
        assert (block[:, :128] == 10 * number).all()
        assert (block[:, side : side + 128] == 10 * number + 5).all()


def test_nothing_is_drawn_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo, "command", lambda *words: asked.append(tuple(map(str, words))))
    demo.draw("model", tmp_path / "prompts.txt", tmp_path / "before")
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "grid.png").touch()
    demo.draw("model", tmp_path / "prompts.txt", tmp_path / "before")
    assert len(asked) == 1 and asked[0][:3] == ("finetune", "sample", "model")


def test_a_step_is_a_command_that_runs_in_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, seen = list(sys.argv), []

    def main() -> int:
        seen.append(sys.argv[1:])
        return {"train": 0, "sample": 2, "export": 130}[sys.argv[1]]

    monkeypatch.setattr(cli, "main", main)
    demo.command("finetune", "train", "run.dir=a b")
    with pytest.raises(UserError, match=r"stopped at `finetune sample` \(exit code 2\)"):
        demo.command("finetune", "sample", Path("run"), "--seed", 0)
    with pytest.raises(KeyboardInterrupt):
        demo.command("finetune", "export")
    demo.command("data-tools", "--version")
    assert seen == [["train", "run.dir=a b"], ["sample", "run", "--seed", "0"], ["export"]]
    assert capsys.readouterr().out.splitlines() == [
        *("$ finetune train 'run.dir=a b'", "$ finetune sample run --seed 0", "$ finetune export"),
        *("$ data-tools --version", __version__),
    ]
    assert sys.argv == before


@pytest.mark.slow  # a minute or two of two cores
@pytest.mark.timeout(600)
def test_the_style_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert demo.main(["--out", str(tmp_path)]) == 0
    before, after = (demo.files(tmp_path / name)[len(demo.SEEN) :] for name in ("before", "after"))
    style = [demo.STYLE] * len(after)
    assert demo.share_found(demo.STYLES, before, style) < 0.2 < 0.5 < demo.share_found(demo.STYLES, after, style)
    assert demo.share_found(demo.NAMES, after, demo.UNSEEN) > 0.5
    assert Image.open(tmp_path / "demo.png").size[1] > Image.open(tmp_path / "demo.png").size[0]
