"""How a command ends: its exit code, and one line for what is no defect of ours."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import INTERRUPTED, PEER_LOST, PeerLostError, UserError, run_cli


def of_disk(number: int) -> OSError:
    return OSError(number, os.strerror(number), "runs/a/x")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("seed=-1\nis none"), 2, "seed=-1 is none"),
        (PeerLostError("rank 1 is gone"), PEER_LOST, "rank 1 is gone"),
        (of_disk(errno.ENOSPC), 2, "no space left on device while writing runs/a/x; free some space or choose"),
        (of_disk(errno.EROFS), 2, "runs/a/x: Read-only file system; choose another place"),
        (of_disk(errno.EMFILE), 2, "runs/a/x: Too many open files; end other programs or raise the limit"),
        (of_disk(errno.ESTALE), 74, "runs/a/x: Stale file handle; start the same command again"),
    ],
)
def test_what_is_no_defect_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception, code: int, line: str):
    def fail() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_cli(fail)
    (told,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == code
    assert told.startswith(f"error: {line}")


def test_a_reader_that_has_gone_is_no_success() -> None:
    """`finetune train --help | head -1`: nothing is said, and the code is a shell's for SIGPIPE."""
    show = "from finetune import run_cli; run_cli(lambda: print('many lines\\n' * 100_000))"
    started = subprocess.Popen([sys.executable, "-c", show], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.stdout.readline()
    started.stdout.close()
    assert started.stderr.read() == b""
    assert started.wait() == 141


LOG = """
import io, os, sys
from finetune import outliving_readers
refusals = 1
class Disk(io.FileIO):
    def write(self, data):
        global refusals
        refusals -= 1
        if refusals >= 0:
            raise OSError(28, os.strerror(28))
        return super().write(data)
sys.stdout = io.TextIOWrapper(io.BufferedWriter(Disk(1, "w", closefd=False)))
with outliving_readers():
    for line in ("one", "two", "three"):
        print(line, flush=True)
"""


def test_a_log_goes_on_when_its_disk_has_room_again() -> None:
    done = subprocess.run([sys.executable, "-c", LOG], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == ["two", "three"]


@pytest.mark.parametrize(("error", "code"), [(UserError("a mistake"), 2), (PeerLostError("gone"), PEER_LOST)])
def test_a_full_log_changes_no_exit_code(error: Exception, code: int) -> None:
    """Launchers go by it."""
    fail = f"from finetune import *; run_cli(lambda: (_ for _ in ()).throw({type(error).__name__}('{error}')))"
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", fail], stderr=full).returncode == code


def test_ctrl_c_while_libraries_are_loaded_ends_at_once() -> None:
    """An import swallowed it, and the run trained on; or it ended in the traceback of somebody's ImportError."""
    script = """
import os, signal
from finetune.terminal import stopped_at_once
with stopped_at_once():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # as a library does that can go without another
        pass
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (INTERRUPTED, "")
