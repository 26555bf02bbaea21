"""`make demo`: the whole way from pictures to samples, with the commands that a user would type.

Real pictures (the bundled emoji), an autoencoder, latent shards, a text-to-image model, samples. Each step is one
command, printed before it runs. Started again, finished steps are skipped and a killed one goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from finetune import UserError, run_cli

PROMPTS = ["red apple", "grinning face", "blue heart", "cat face", "pizza", "rocket", "sunflower", "snowman"]


def main(argv: list[str]) -> int:
    """Run the demo in a folder (`demo/` by default); returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m finetune.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all that the demo makes")
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    pictures, autoencoder, latents, run = emoji_shards(), out / "autoencoder", out / "latents", out / "run"
    step("The pictures: emoji with their names as captions.")
    command("data-tools", "inspect", pictures)
    step("1. The first stage: an autoencoder that makes 64x64 pictures 16x16 latents.")
    command("finetune", "autoencoder", "experiment=emoji", f"data.shards={pictures}", f"run.dir={autoencoder}")
    step("2. Every picture encoded once, into shards of latents.")
    if not (latents / "manifest.json").exists():
        command("data-tools", "encode", pictures, "--vae", autoencoder / "vae", "--out", latents, "--overwrite")
    command("data-tools", "preview", latents, "--out", out / "reconstructions.png")
    step("3. A U-Net and its text encoder, trained on the latents.")
    command("finetune", "train", "experiment=emoji", f"data.shards={latents}", f"run.dir={run}")
    step("4. Pictures for prompts.")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    sampling = ("--seed", 0, "--steps", 25, "--columns", 4)
    command("finetune", "sample", run, *prompts, *sampling, "--out", out / "samples.png")

    first, last = losses(run)
    minutes = (time.perf_counter() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes. Held-out loss {first:.3f} -> {last:.3f}. Look at:")
    print(f"  {out / 'reconstructions.png'}   what the autoencoder keeps of the pictures")
    print(f"  {out / 'samples.png'}           drawn for: {', '.join(PROMPTS)}")
    print(f"  {run / 'samples'}/              the same prompts while the model learned")
    return 0


def emoji_shards() -> Path:
    """The bundled image shards, relative to here where that is shorter to read."""
    import importlib.resources

    path = Path(str(importlib.resources.files("data_tools"))) / "emoji" / "fluent-emoji"
    if not (path / "manifest.json").exists():
        raise UserError(f"the bundled pictures are missing from {path}; install or clone ldm-finetune again")
    return min(path, Path(os.path.relpath(path)), key=lambda p: len(str(p)))


def losses(run: Path) -> tuple[float, float]:
    """First and last held-out loss of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [line["validation/loss"] for line in lines if "validation/loss" in line]
    return values[0], values[-1]


def step(title: str) -> None:
    print(f"\n{title}", flush=True)


def command(program: str, *arguments: object) -> None:
    """Print a command and run it with this interpreter.

    Raises:
        UserError: it failed; it has said why.
    """
    words = [str(argument) for argument in arguments]
    print(f"$ {shlex.join([program, *words])}", flush=True)
    module = program.replace("data-tools", "data_tools")
    # Threads that spin long while they wait take the cores from the readers and from whatever else runs here;
    # threads that never spin (OMP_WAIT_POLICY=passive) halve the speed of such small layers.
    env = {"GOMP_SPINCOUNT": "20000", **os.environ}
    code = subprocess.run([sys.executable, "-m", module, *words], env=env).returncode
    if code:
        raise UserError(f"the demo stopped at `{program} {words[0]}` (exit code {code}); its message is above")


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
