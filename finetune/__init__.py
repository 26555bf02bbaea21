"""Fine-tune latent diffusion models: one config from a laptop's CPU to a Slurm cluster.

The plan of the package is in CONTRIBUTING.md: each module imports only from floors below its own.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

__version__ = "0.1.0"

BUNDLED = Path(__file__).resolve().parent / "bundled"
"""Models and sets of shards in the box, by the names of their folders."""

STOPPED = 75
"""Exit code of a run that was asked to stop and has saved: the same command goes on (sysexits' EX_TEMPFAIL)."""
PEER_LOST = 69
"""Exit code of a rank that another rank's death or silence has ended (sysexits' EX_UNAVAILABLE)."""

E = TypeVar("E", bound=BaseException)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of an `OSError` that `run_cli` has words for."""

# diffusers imports bitsandbytes where it is there. On some CPUs that asks for a package that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what, which value, what to do."""


class PeerLostError(Exception):
    """Another rank, or the store where ranks meet, is gone. Its text is one line; a retry may mend it."""


def by_all(error: E) -> E:
    """Mark an error as one that every rank raises: one rank's line is enough."""
    error.is_by_all = True  # type: ignore[attr-defined]
    return error


def is_by_all(error: BaseException) -> bool:
    """Whether every rank raises this error (see `by_all`)."""
    return getattr(error, "is_by_all", False)


def first_line(error: BaseException) -> str:
    """An exception's first line, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: a user's mistake becomes one line on stderr and exit code 2.

    Exit codes: what `main` returns (None is 0; training knows STOPPED and PEER_LOST), 2 for `UserError` and
    a full disk, 69 for `PeerLostError`, 130 after Ctrl-C.
    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        code = main()
    except UserError as error:
        code = _complain(" ".join(str(error).split()))
    except PeerLostError as error:
        _complain(" ".join(str(error).split()))
        code = PEER_LOST
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `finetune ... | head` closed the pipe: nothing is wrong
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        code = _complain(f"no space left on device{where}; free some space or choose another folder")
    sys.exit(code or 0)


def _complain(line: str) -> int:
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 2
