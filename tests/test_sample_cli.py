"""`finetune` and `finetune sample` from the outside: files, their metadata, and one line for each mistake."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import UserError, asking, cli, sample
from finetune.components import load_components
from finetune.models.unet import build_unet
from finetune.pictures import save_png
from finetune.tasks import Task
from tests import fakes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fakes.full_run(tmp_path_factory.mktemp("full") / "run")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_one_prompt_makes_one_picture_with_its_settings(run, tmp_path, capsys):
    out = tmp_path / "new" / "apple.png"
    options = ["--prompt", "a red äpple", "--seed", "3", "--steps", "2", "--out", str(out)]
    assert cli.main(["sample", str(run), *options]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        assert image.size == (32, 32)
        assert image.text == {
            "prompt": "a red äpple",
            "negative prompt": "",
            "seed": "3",
            "steps": "2",
            "guidance": "3",  # the run's own
            "scheduler": "ddim",
            "size": "32x32",
            "source": f"{run} step {fakes.STEP} ema",
        }
    assert [path.name for path in out.parent.iterdir()] == ["apple.png"]
    first = pixels(out)
    assert cli.main(["sample", str(run), *options]) == 0
    assert np.array_equal(pixels(out), first)
    assert cli.main(["sample", str(run), *options, "--weights", "raw"]) == 0
    assert not np.array_equal(pixels(out), first)


def test_several_prompts_make_a_grid_and_a_folder_their_files(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa green apple\n\n  a blue heart  \n", encoding="utf-8")
    options = ["--prompt", "a red apple", "--prompts", str(tmp_path / "prompts.txt"), "--count", "2"]
    options += ["--steps", "1", "--seed", "4", "--height", "40", "--width", "24"]
    sample.main([str(run), *options, "--out", str(tmp_path / "grid.png")])
    sample.main([str(run), *options, "--out", str(tmp_path / "folder")])
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == [
        "0000-a-red-apple.png",
        "0001-a-red-apple.png",
        "0002-a-green-apple.png",
        "0003-a-green-apple.png",
        "0004-a-blue-heart.png",
        "0005-a-blue-heart.png",
        "grid.png",
    ]
    sheet = pixels(tmp_path / "grid.png")
    assert sheet.shape == (3 * 42 - 2, 2 * 26 - 2, 3)  # a row for each prompt, two pixels apart
    assert np.array_equal(sheet, pixels(tmp_path / "folder" / "grid.png"))
    for index, name in enumerate(names[:-1]):
        row, column = divmod(index, 2)
        cell = sheet[row * 42 : row * 42 + 40, column * 26 : column * 26 + 24]
        assert np.array_equal(cell, pixels(tmp_path / "folder" / name))
        with Image.open(tmp_path / "folder" / name) as image:
            assert image.text["seed"] == str(4 + index)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.text["prompt"] == "a red apple\na green apple\na blue heart"


def test_the_name_of_a_folder_may_have_a_dot(run, tmp_path):
    sample.main([str(run), "--prompt", "x", "--steps", "1", "--out", f"{tmp_path}/v1.5/"])
    assert [path.name for path in (tmp_path / "v1.5").iterdir()] == ["0000-x.png"]


def mistakes(run, tmp_path):
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    empty = tmp_path / "empty"
    (empty / "checkpoints" / "step-00000010").mkdir(parents=True)
    (empty / "config.yaml").write_text("model: {}")
    png = ["--out", str(tmp_path / "x.png")]
    prompt = ["--prompt", "x", *png]
    return {
        "no prompts; give --prompt": [str(run), *png],
        "blank.txt holds no prompt": [str(run), "--prompts", str(tmp_path / "blank.txt"), *png],
        "binary.txt cannot be read: it is no UTF-8": [str(run), "--prompts", str(tmp_path / "binary.txt"), *png],
        "cannot be read: No such file": [str(run), "--prompts", str(tmp_path / "none.txt"), *png],
        "no such folder": [str(tmp_path / "none"), *prompt],
        "empty has no complete checkpoint yet": [str(empty), *prompt],
        "no complete checkpoint of step 7": [str(run), *prompt, "--checkpoint", "7"],
        "height 36 is no multiple of 8": [str(run), *prompt, "--height", "36"],
        "--guidance 0.5: must be at least 1": [str(run), *prompt, "--guidance", "0.5"],
        "--seed -1: must be": [str(run), *prompt, "--seed", "-1"],
        "--guidance nan: must be at least 1": [str(run), *prompt, "--guidance", "nan"],
        "--guidance inf: must be at least 1": [str(run), *prompt, "--guidance", "inf"],
        "--height=1000000 must be at most 16384": [str(run), *prompt, "--height", "1000000"],
        "--count=1000000000000 must be at most": [str(run), *prompt, "--count", "1000000000000"],
        "--negative has no effect at guidance 1, which is none": [
            str(run), *prompt, "--negative", "y", "--guidance", "1",
        ],
        "--noise-level is not for this model": [str(run), *prompt, "--noise-level", "3"],
        "--out s3://bucket/x.png is an address": [str(run), "--prompt", "x", "--out", "s3://bucket/x.png"],
        "--out is empty": [str(run), "--prompt", "x", "--out", ""],
        "the name of the model is empty": ["", *prompt],
        "2000 sampling steps": [str(run), *prompt, "--steps", "2000"],
        "invalid choice: 'plms'": [str(run), *prompt, "--scheduler", "plms"],
        "'0' is not a whole number of at least 1": [str(run), *prompt, "--count", "0"],
        "invalid step value: 'last'": [str(run), *prompt, "--checkpoint", "last"],
        "written as PNG": [str(run), "--prompt", "x", "--out", str(tmp_path / "x.jpg")],
        "cannot be made": [str(run), "--prompt", "x", "--out", str(tmp_path / "blank.txt" / "x.png")],
        "no LoRA at": [str(run), *prompt, "--lora", str(tmp_path)],
        "--lora-scale 0.5 has no effect without --lora": [str(run), *prompt, "--lora-scale", "0.5"],
        "--lora-scale nan: must be a number": [str(run), *prompt, "--lora", "a", "--lora-scale", "nan"],
        "--lora-scale is given 2 times and --lora 3 times": [
            str(run), *prompt, *["--lora", "a"] * 3, *["--lora-scale", "0.5"] * 2,
        ],
        "--device cuda:99: this machine has": [str(run), *prompt, "--device", "cuda:99"],
        "--device quantum: unknown": [str(run), *prompt, "--device", "quantum"],
        "the following arguments are required: --out": [str(run), "--prompt", "x"],
        "unrecognized arguments: --prmpt": [str(run), *prompt, "--prmpt", "y"],
    }  # fmt: skip


def test_every_mistake_has_its_line(run, tmp_path):
    for line, argv in mistakes(run, tmp_path).items():
        with pytest.raises(UserError) as caught:
            sample.main(argv)
        assert line in str(caught.value)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."),
            "4.0 GiB",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried"),
    ],
)
def test_short_memory_ends_in_one_line(run, tmp_path, monkeypatch, error, says):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("finetune.sampling.generate", full)
    with pytest.raises(
        UserError, match=rf"the memory of --device auto is full \({says}.*: give a smaller --height"
    ):
        sample.main([str(run), "--prompt", "x", "--out", str(tmp_path / "x.png")])


def test_what_the_text_encoder_is_not_told_is_said(run, tmp_path, capsys):
    """12 tokens, two of which are begin and end."""
    options = ["--steps", "1", "--guidance", "2", "--out", str(tmp_path)]
    sample.main([str(run), "--prompt", "a red apple", *options])
    assert "note" not in capsys.readouterr().err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join("a " * (10 + over) + "heart" for over in range(4)))
    sample.main([str(run), "--prompts", str(prompts), "--negative", "a " * 10 + "face", *options])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: the text encoder takes 12 tokens of a prompt, not: heart; a heart; a a heart and the ends of 2 more"
    ]


def enlarger(folder, **embeds):
    """A model of captions and small pictures, trained with 10 levels of noise or with none."""
    fakes.base_model(folder)
    build_unet(fakes.UNET | {"in_channels": 7, **embeds}).save_pretrained(folder / "unet")
    Task("super_resolution", {"noise_levels": 10 if embeds else 0}).save(folder)
    return folder


def test_a_picture_is_enlarged_with_a_noise_level_that_was_trained(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    asked = {"prompt": ["x"], "image": [str(tmp_path / "small.png")]}

    def level(parts, noise_level=None):
        (made,) = asking.samples(parts, asking.Asked(**asked, noise_level=noise_level), (32, 32))
        return parts.conditioner.read(made).get("level")

    parts = load_components(enlarger(tmp_path / "noised", num_class_embeds=1000))
    assert (level(parts), level(parts, 3)) == (9, 3)
    with pytest.raises(UserError, match="noise level 10: the model was trained with 0 to 9"):
        level(parts, 10)
    parts = load_components(enlarger(tmp_path / "plain"))
    assert level(parts) is None
    with pytest.raises(UserError, match="--noise-level has no effect: .*plain was trained without noise"):
        level(parts, 3)


def test_a_size_is_refused_where_the_condition_has_one(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    argv = [str(enlarger(tmp_path / "model")), "--image", str(tmp_path / "small.png"), "--steps", "1"]
    argv += ["--out", str(tmp_path / "x.png")]
    for size in ("--height", "--width"):
        with pytest.raises(UserError, match="--height and --width have no effect: --image says how large"):
            sample.main([*argv, size, "64"])
    sample.main(argv)
    assert Image.open(tmp_path / "x.png").size == (32, 32)


def finetune(*argv):
    return subprocess.run([sys.executable, "-m", "finetune", *argv], capture_output=True, text=True, check=False)


def test_help_has_examples_and_imports_nothing_heavy():
    done = finetune("--help")
    assert done.returncode == 0 and "finetune sample runs/first" in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)
    code = (
        "import sys; from finetune import cli, sample\n"
        "try: cli.main(['sample', '--help'])\n"
        "except SystemExit: pass\n"
        "try: cli.main(['export', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples:\n  finetune") == 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["smaple"], "error: unknown command `smaple`: did you mean `sample`?"),
        (["xyz"], f"error: unknown command `xyz`: choose one of {', '.join(cli.COMMANDS)}"),
        (["--verbose"], f"error: unknown option `--verbose`: choose one of {', '.join(cli.COMMANDS)}"),
        (["sample", "x"], "error: the following arguments are required: --out; see `finetune sample --help`"),
    ],
)
def test_a_mistake_exits_with_2_and_one_line(argv, line):
    done = finetune(*argv)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")


def test_a_subcommand_gets_its_arguments_and_gives_its_exit_code(monkeypatch):
    modules = ("train", "doctor.command", "sample", "export", "autoencoder.train")
    for command, module in zip(cli.COMMANDS, modules, strict=True):
        seen = []
        monkeypatch.setattr(f"finetune.{module}.main", lambda argv, seen=seen: seen.append(argv) or 3)
        assert cli.main([command, "run.dir=x", "--help"]) == 3
        assert seen == [["run.dir=x", "--help"]]


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("finetune ")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("module", ["finetune", "data_tools"])
def test_a_closed_stream_is_no_defect(module, stream):
    """Some service managers start programs so."""
    closes = f"exec {sys.executable} -m {module} --version {1 if stream == 'stdout' else 2}>&-"
    done = subprocess.run(["sh", "-c", closes], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_folder_that_takes_no_picture_is_named_as_it_was_given(tmp_path, monkeypatch):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(UserError, match=r"gone/x.png cannot be written: its folder is not there"):
        save_png(image, tmp_path / "gone" / "x.png")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError) as caught:
        save_png(image, tmp_path / "x.png")
    assert caught.value.filename == str(tmp_path / "x.png")


def test_a_read_only_place_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what root is told of a read-only file system
    with pytest.raises(UserError, match=r"^--out .*x.png cannot be written: its folder is read-only"):
        sample.main(["emoji-base", "--prompt", "a", "--out", str(tmp_path / "x.png")])


def test_photos_are_conditions_as_they_stand_upright(tmp_path):
    """As pictures get into shards."""
    photo, exif = Image.new("RGB", (32, 48)), Image.Exif()
    exif[0x0112] = 6  # lies on its side
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert asking._picture(str(tmp_path / "photo.jpg"), "--image").size == (48, 32)
