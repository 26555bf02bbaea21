"""A run's folder: the lock on it, and whether all ranks see the same one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from finetune import UserError, by_all
from finetune.distributed import World

LOCKS_REMEDY = (
    "mount the file system with locks (Lustre: -o flock; NFS: no nolock, no local_lock): they keep two jobs from "
    "writing one run"
)
_LOOK_SECONDS = 10.0  # a network file system may show a new file late


class RunFolder:
    """A run's folder, held by one process at a time.

    The lock is the kernel's: it goes with the process, however that ends.

    Raises:
        UserError: another process holds it, no folder can be made there, or files can't be locked there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")  # held as long as the run
        except OSError as error:
            raise UserError(
                f"run.dir={self.path} cannot be a run's folder ({error.strerror}); choose another run.dir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise UserError(
                f"run.dir={self.path} is in use by {holder}; stop that run or choose another run.dir"
            ) from None
        except OSError as error:
            raise UserError(
                f"run.dir={self.path}: files can't be locked there ({error.strerror}); {LOCKS_REMEDY}"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def close(self) -> None:
        """Let it go; where nothing came of a folder that was made for the run, as of a mistake, it goes too."""
        with contextlib.suppress(OSError):
            if self._made and os.listdir(self.path) == [".lock"]:
                (self.path / ".lock").unlink()
                for folder in self._made:
                    folder.rmdir()
        self._lock.close()


@contextlib.contextmanager
def held_folder(world: World, path: str | Path) -> Iterator[None]:
    """A run's folder for all ranks, which rank 0 holds. Collective.

    Raises:
        UserError: as `RunFolder` and `require_shared` do, on every rank.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(contextlib.closing(RunFolder(path)))

        world.on_main(hold)
        require_shared(world, path)
        yield


def require_shared(world: World, path: str | Path, seconds: float = _LOOK_SECONDS) -> None:
    """Refuse a folder that rank 0 made and another rank doesn't see, or can't write in. Collective.

    All ranks write their part of a checkpoint there.

    Args:
        seconds: how long a rank goes on looking.

    Raises:
        UserError, on every rank: names the first such rank and its host.
    """
    if world.size == 1:
        return
    folder = Path(path)
    token = world.on_main(lambda: _leave_token(folder))
    faults = world.gather(None if world.is_main else _fault(folder, token, world.rank, seconds))
    if world.is_main:
        (folder / token).unlink(missing_ok=True)
    for rank, fault in enumerate(faults):
        if fault is not None:
            raise by_all(
                UserError(
                    f"run.dir={folder} on rank {rank} ({fault[0]}) {fault[1]}: choose a run.dir on a file system "
                    "that all machines share"
                )
            )


def _leave_token(folder: Path) -> str:
    token = f".seen-by-all-{secrets.token_hex(8)}"
    (folder / token).touch()
    return token


def _fault(folder: Path, token: str, rank: int, seconds: float) -> tuple[str, str] | None:
    """(host, what is wrong) of this rank's view of the folder, or None."""
    host = socket.gethostname()
    ends = time.monotonic() + seconds
    while not _sees(folder, token):
        if time.monotonic() > ends:
            return host, "is not the folder that rank 0 made"
        time.sleep(0.1)
    probe = folder / f"{token}-{rank}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return host, f"cannot be written ({error.strerror})"
    return None


def _sees(folder: Path, token: str) -> bool:
    with contextlib.suppress(OSError):
        # A list of names is asked for anew; that a name is missing may be remembered.
        return token in os.listdir(folder)
    return False
