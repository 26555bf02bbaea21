"""Fine-tune latent diffusion models: one config from a laptop's CPU to a Slurm cluster.

The plan of the package is in CONTRIBUTING.md: each module imports only from floors below its own.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

__version__ = "0.1.0"

BUNDLED = Path(__file__).resolve().parent / "bundled"
"""Models and sets of shards in the box, by the names of their folders."""

STOPPED = 75
"""Exit code of a run that was asked to stop and has saved: the same command goes on (sysexits' EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell says of SIGINT."""
PEER_LOST = 69
"""Exit code of a rank that another rank's death or silence has ended (sysexits' EX_UNAVAILABLE)."""

_YOUNG_COLLECTIONS = 1000
"""Of Python's cycle collector, before it looks at what has lived long as well: 10 by default."""

E = TypeVar("E", bound=BaseException)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of an `OSError`: there is no room."""
AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN)
"""Error numbers of an `OSError`: a disk, or the server that has it, does not answer. A retry may mend it."""
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of an `OSError`: a file is not to be read or written."""
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Error numbers of an `OSError`: this process, or the machine, has no more files to open, or memory."""

# diffusers imports bitsandbytes where it is there. On some CPUs that asks for a package that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what, which value, what to do."""

    exit_code = 2


class AwayError(UserError):
    """A disk does not answer now (see `AWAY`): the user need not do anything, since a retry may mend it."""

    exit_code = 74


class PeerLostError(Exception):
    """Another rank, or the store where ranks meet, is gone. Its text is one line; a retry may mend it."""


def by_all(error: E) -> E:
    """Mark an error as one that every rank raises: one rank's line is enough."""
    error.is_by_all = True  # type: ignore[attr-defined]
    return error


def is_by_all(error: BaseException) -> bool:
    """Whether every rank raises this error (see `by_all`)."""
    return getattr(error, "is_by_all", False)


def is_of_machine(error: BaseException) -> bool:
    """Whether an error keeps this process from a file now, and says nothing of what is in the file."""
    return isinstance(error, OSError) and error.errno in (*AWAY, *REFUSED, *SCARCE)


def first_line(error: BaseException) -> str:
    """An exception's first line, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: a user's mistake becomes one line on stderr and exit code 2.

    Exit codes: what `main` returns (None is 0; training knows STOPPED and PEER_LOST), 2 for `UserError` and
    a disk that is full or refuses, or a want of open files or memory, 69 for `PeerLostError`, 74 for a disk or
    a store that does not answer (sysexits' EX_IOERR), 130 after Ctrl-C, 141 where who reads the output has gone,
    as a shell says of SIGPIPE.
    Anything else is a defect of ours and keeps its traceback.
    """
    # While libraries are imported, everything there is would be walked through eight times: a sixth of a start.
    gc.set_threshold(*gc.get_threshold()[:2], _YOUNG_COLLECTIONS)
    try:
        code = main()
    except UserError as error:
        _complain(" ".join(str(error).split()))
        code = error.exit_code
    except PeerLostError as error:
        _complain(" ".join(str(error).split()))
        code = PEER_LOST
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    except OSError as error:
        if error.errno in DISK_FULL:
            where = f" while writing {error.filename}" if error.filename else ""
            code = _complain(f"no space left on device{where}; free some space or choose another folder")
        elif error.errno in AWAY and error.filename:
            _complain(f"{error.filename}: {error.strerror}; start the same command again when it answers")
            code = 74
        elif error.errno in REFUSED and error.filename:
            code = _complain(f"{error.filename}: {error.strerror}; choose another place or mend its permissions")
        elif error.errno in SCARCE and error.filename:
            remedy = "end other programs or raise the limit (`ulimit -n` of files, -v of memory)"
            code = _complain(f"{error.filename}: {error.strerror}; {remedy}")
        else:
            raise
    sys.exit(code or 0)


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Work inside goes on where its output has nowhere to go: `| head` has ended, a log's disk is full."""
    kept = sys.stdout, sys.stderr
    outlets = [_Outlet(stream) for stream in kept]
    sys.stdout, sys.stderr = outlets  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = kept
        for outlet in outlets:
            outlet.end()


class _Outlet:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            if error.errno not in DISK_FULL:  # a disk may have room again
                _leave(self._stream)

    def end(self) -> None:
        """Leave nothing in a buffer that could not be written when the interpreter ends."""
        try:
            self._stream.flush()
        except OSError:
            _leave(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _leave(stream: Any) -> None:
    """Let what is written from now on go nowhere, and what is still in a buffer too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say_at_once(text: str) -> None:
    """To stderr past Python's streams, as from a thread or a signal's handler; where it has gone, to nobody."""
    with contextlib.suppress(OSError):  # Ctrl-C ends `| tee log` as well; a log's disk may be full
        os.write(2, text.encode())


def _complain(line: str) -> int:
    try:
        print(f"error: {line}", file=sys.stderr, flush=True)
    except OSError:  # the exit code says the rest
        _leave(sys.stderr)
    return 2
