"""What the commands have in common on the terminal: mistakes in one line, and libraries that keep quiet."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from typing import Any, NoReturn

from finetune import UserError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are one line, and whose examples keep their line breaks."""

    def __init__(self, **arguments: Any) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(**arguments, formatter_class=shape, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


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
