"""What the commands that take a model have in common on the command line."""

from __future__ import annotations

import argparse
import logging
from typing import Any, NoReturn

from finetune import UserError

DTYPES = ("float32", "float16", "bfloat16")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are one line, and whose examples keep their line breaks."""

    def __init__(self, **arguments: Any) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(**arguments, formatter_class=shape, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def add_source_arguments(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    """The model that a command works on."""
    parser.add_argument("source", metavar=metavar, help=text)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Which of a run's weights, and in which precision."""
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="a run's averaged weights, or the last step's (default: ema)",
    )
    parser.add_argument("--checkpoint", type=step, metavar="STEP", help="a run's checkpoint (default: the latest)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")


def step(text: str) -> int:
    """A checkpoint's step: `1000`, or its folder's name, `step-00001000`."""
    return int(text.strip("/").removeprefix("step-"))


def count(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def torch_dtype(name: str) -> Any:
    """One of `DTYPES` as torch's."""
    import torch

    return getattr(torch, name)


def quiet_libraries() -> None:
    """Keep the libraries' bars and advice off the terminal; what goes wrong still comes as an exception."""
    # accelerate imports DeepSpeed, which says on stdout that there is no GPU. It sets its logger's level
    # itself.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
