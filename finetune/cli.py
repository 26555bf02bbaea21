"""The `finetune` command: each subcommand is imported when it is called, so that `--help` is quick."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from finetune import UserError, __version__, run_cli
from finetune.terminal import stopped_at_once

COMMANDS = {
    "train": "fine-tune a model, or train one from scratch",
    "doctor": "look whether a launch will train, before it has to",
    "sample": "draw pictures from captions, labels, layouts, maps or other pictures",
    "export": "write a run's result for other tools",
    "autoencoder": "train the first stage on pictures",
}

_MULTIRUN = {"--multirun", "-m"}

_EXAMPLES = """examples:
  finetune train experiment=smoke data.shards=shards/latents run.dir=runs/first
  finetune sample runs/first --prompt "a red apple" --seed 1 --out apple.png
  finetune export runs/first --format diffusers --out models/first
  finetune autoencoder data.shards=shards/images run.dir=runs/vae

`finetune COMMAND --help` tells more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code.

    Raises:
        UserError: no such subcommand, with the nearest name.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"finetune {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"choose one of {', '.join(COMMANDS)}"
        what = "option" if name.startswith("-") else "command"
        raise UserError(f"unknown {what} `{name}`: {hint}")
    with stopped_at_once():
        command = _command(name, rest)
    return command(rest)


def _command(name: str, arguments: list[str]) -> Callable[[list[str]], int]:
    match name:
        case "train" if _MULTIRUN & {*arguments}:
            from finetune import sweep

            return lambda words: sweep.main([word for word in words if word not in _MULTIRUN])
        case "train":
            from finetune import train

            return train.main
        case "doctor":
            from finetune.doctor import command as doctor

            return doctor.main
        case "sample":
            from finetune import sample

            return sample.main
        case "export":
            from finetune import export

            return export.main
        case "autoencoder":
            from finetune.autoencoder import train as autoencoder

            return autoencoder.main
    raise AssertionError(name)


def entry() -> NoReturn:
    """The console script."""
    run_cli(main)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"usage: finetune COMMAND ...\n\nFine-tune latent diffusion models.\n\ncommands:\n{lines}\n\n{_EXAMPLES}"
