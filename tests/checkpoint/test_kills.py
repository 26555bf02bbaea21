"""kill -9 at any moment leaves a valid older checkpoint; see kills.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment


@pytest.mark.parametrize("rounds", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_kills_while_writing_leave_whole_checkpoints(tmp_path: Path, rounds: int) -> None:
    command = [
        sys.executable,
        str(Path(__file__).with_name("kills.py")),
        str(tmp_path),
        str(rounds),
    ]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
