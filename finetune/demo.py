"""`make demo`: the model in the box learns a style from pictures in the box, by commands that a user would type.

The base draws emoji in the styles of Noto and Twemoji. LoRA teaches it that of Microsoft's Fluent Emoji. Half of
the names in its rows are not among those pictures: of them it has never seen the style. Each step is one command,
printed before it runs, all in one process. Started again, finished steps are skipped and a killed one goes on.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune import BUNDLED, UserError, run_cli

BASE, PICTURES = "emoji-base", "fluent-emoji"  # in the box
CAPTION = "{}, emoji style"  # words that the base knows: a new one would lead it away from what it draws
SEEN = ["red apple", "cow face", "rocket", "frog", "mushroom", "strawberry"]
# Names that the base knows and the pictures do not have. The first have rows, all are judged.
UNSEEN = [
    *("avocado", "dog face", "hamburger", "cactus", "light bulb", "palm tree"),
    *("astronaut", "automobile", "basketball", "bell", "bomb", "butterfly", "cookie", "croissant", "donkey"),
    *("eggplant", "elephant", "evergreen tree", "ghost", "guitar", "horse face", "koala", "lemon", "lion"),
    *("pig", "rabbit", "top hat", "treasure chest"),
]
ROWS = [*SEEN, *UNSEEN[: len(SEEN)]]
MIDDLE = 120  # the step of the column between before and after: a checkpoint that is kept
STYLES, NAMES = "styles.safetensors", "names.safetensors"  # judges of pictures, beside the base
STYLE = "fluent emoji"  # as the judge of styles calls it


def main(argv: list[str]) -> int:
    """Run the demo in a folder (`demo/` by default); returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m finetune.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all that the demo makes")
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    # Threads that spin long while they wait take the cores from the readers and from whatever else runs here;
    # threads that never spin (OMP_WAIT_POLICY=passive) halve the speed of such small layers. Read with torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    started = time.perf_counter()

    latents, run = out / "latents", out / "run"
    step(f"1. 1,200 emoji in the style to be learned, each encoded once by the autoencoder of {BASE}.")
    if not (latents / "manifest.json").exists():
        words = ["--vae", BASE, "--caption", CAPTION, "--out", latents, "--overwrite"]
        command("data-tools", "encode", PICTURES, *words)
    step(f"2. LoRA on the U-Net of {BASE}.")
    command("finetune", "train", "experiment=demo", f"data.shards={latents}", f"run.dir={run}")
    step("3. The same prompts and seeds before, on the way, and after.")
    (out / "rows.txt").write_text(lines_of(ROWS))
    (out / "prompts.txt").write_text(lines_of([*ROWS, *UNSEEN[len(SEEN) :]]))
    draw(BASE, out / "prompts.txt", out / "before")
    draw(run, out / "rows.txt", out / "during", "--checkpoint", MIDDLE)
    draw(run, out / "prompts.txt", out / "after")

    sheet(out, {"before": "before", "during": f"{MIDDLE} steps", "after": "after"}, out / "demo.png")
    minutes = (time.perf_counter() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes. Of {len(UNSEEN)} names that are not among the pictures, small")
    print("classifiers of real emoji find")
    judged = [files(out / name)[len(SEEN) :] for name in ("before", "after")]
    for what, judge, wanted in (("the style", STYLES, [STYLE] * len(UNSEEN)), ("the name", NAMES, UNSEEN)):
        before, after = (share_found(judge, paths, wanted) for paths in judged)
        print(f"  {what:<9} in {before:.0%} before and in {after:.0%} after")
    print("Look at:")
    print(f"  {out / 'demo.png'}   before, after {MIDDLE} steps, and after all; its rows are")
    print(f"  {', '.join(SEEN)} (among the pictures),")
    print(f"  {', '.join(ROWS[len(SEEN) :])} (never seen in this style)")
    return 0


def lines_of(names: Sequence[str]) -> str:
    """A prompt on each line."""
    return "".join(CAPTION.format(name) + "\n" for name in names)


def draw(model: object, prompts: Path, folder: Path, *words: object) -> None:
    """A picture for each prompt, numbered, into a folder that has no others; nothing is drawn twice."""
    sampling = ("--seed", 0, "--scheduler", "dpm++", "--steps", 12, "--batch-size", 16)
    if not (folder / "grid.png").exists():  # written last
        command("finetune", "sample", model, *words, "--prompts", prompts, *sampling, "--out", folder)


def files(folder: Path) -> list[Path]:
    """The numbered pictures of a folder, in the order of the prompts."""
    return sorted(folder.glob("[0-9]*.png"))


def sheet(out: Path, columns: Mapping[str, str], to: Path) -> None:
    """One picture: a row for each of `ROWS`, `SEEN` on the left; a column for each folder, under its title."""
    from PIL import Image, ImageDraw, ImageFont

    from finetune import pictures

    half, side, line = len(SEEN), 128, 22
    blocks = []
    for title, rows in (("among the pictures", range(half)), ("never seen in this style", range(half, 2 * half))):
        found = [[files(out / folder)[row] for folder in columns] for row in rows]
        cells = [Image.open(path).resize((side, side)) for row in found for path in row]
        grid = pictures.grid(cells, len(columns), gap=8)
        block = Image.new("RGB", (grid.width, grid.height + 2 * line), "white")
        block.paste(grid, (0, 2 * line))
        pen, font = ImageDraw.Draw(block), ImageFont.load_default(15)
        pen.text((grid.width / 2, 0), title, "black", font, anchor="ma")
        for number, text in enumerate(columns.values()):
            pen.text((number * (side + 8) + side / 2, line), text, "black", font, anchor="ma")
        blocks.append(block)
    pictures.save_png(pictures.grid(blocks, 2, gap=40), to)


def share_found(judge: str, paths: Sequence[Path], wanted: Sequence[str]) -> float:
    """Share of pictures that a classifier beside the base takes for what each should be: a style, or a name."""
    import numpy as np
    from PIL import Image

    from finetune.evaluation.judge import Judge, top

    classifier = Judge.load(BUNDLED / BASE / judge)
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return top(classifier.logits(pixels), [classifier.classes.index(each) for each in wanted])


def step(title: str) -> None:
    print(f"\n{title}", flush=True)


def command(program: str, *arguments: object) -> None:
    """Print a command and run it in this process: to load the libraries may take longer than to train.

    Raises:
        UserError: it failed; it has said why.
    """
    words = [str(argument) for argument in arguments]
    print(f"$ {shlex.join([program, *words])}", flush=True)
    argv, sys.argv = sys.argv, [program, *words]
    try:
        runpy.run_module(program.replace("-", "_"), run_name="__main__", alter_sys=True)  # as `python -m` does
    except SystemExit as end:
        if end.code == 130:
            raise KeyboardInterrupt from None
        if end.code:
            raise UserError(
                f"the demo stopped at `{program} {words[0]}` (exit code {end.code}); its message is above"
            ) from None
    finally:
        sys.argv = argv


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
