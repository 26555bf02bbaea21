"""What the commands have in common on the terminal: one line for a mistake, quiet libraries, ranks, signals."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from finetune import INTERRUPTED, STOPPED, UserError, is_by_all

_LATE_SECONDS = 5.0


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are one line, and whose examples keep their line breaks."""

    def __init__(self, **arguments: Any) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(**arguments, formatter_class=shape, allow_abbrev=False)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        value = super()._get_value(action, arg_string)
        if isinstance(value, Path) and not arg_string:  # as of a variable that is not set
            raise argparse.ArgumentError(action, "the path is empty; write . for the current folder")
        return value

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text) if text.strip().removeprefix("+").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def nonempty(text: str) -> str:
    """An argument that says something, as a path that may also be a URL or a name does."""
    if not text:  # as of a variable that is not set
        raise argparse.ArgumentTypeError("it is empty; write . for the current folder")
    return text


def require_settings(words: Sequence[str], command: str) -> None:
    """Refuse an option where settings are expected.

    Raises:
        UserError: names the first.
    """
    if unknown := [word for word in words if word.startswith("-")]:
        raise UserError(f"unknown option {unknown[0]}: settings are KEY=VALUE, see {command} --help")


def speak_in_turn(main: Callable[[], int]) -> int:
    """Run a command that a launcher starts on several ranks, and leave a mistake of all to rank 0's line.

    Raises:
        UserError: the command's, with the rank in front where that is not rank 0.
    """
    try:
        return main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if not rank.isdecimal() or int(rank) == 0:
            raise
        # A launcher ends all ranks with the first one: most errors are everyone's, and rank 0 says them best.
        time.sleep(_LATE_SECONDS)
        if is_by_all(error):
            return error.exit_code
        raise type(error)(f"[rank {rank}] {error}") from None


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """While libraries are loaded, for seconds, there is nothing to save; `StopRequest` takes over after that.

    Ctrl-C would be an exception inside of somebody's import, who may take it for a want of that library.
    """
    codes = {signal.SIGUSR1: STOPPED, signal.SIGTERM: STOPPED, signal.SIGINT: INTERRUPTED}
    old = {number: signal.getsignal(number) for number in codes}
    for number in old:
        signal.signal(number, lambda number, frame: os._exit(codes[signal.Signals(number)]))
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def quiet_libraries() -> None:
    """Keep the libraries' bars and advice off the terminal; what goes wrong still comes as an exception.

    Warnings, ours among them, become one line each.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    # accelerate imports DeepSpeed, which says on stdout that there is no GPU. It sets its logger's level itself.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def ranks_text(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "ranks 0-2, 5"; [3] as "rank 3"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    written = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {written}"
