"""The committed accelerate file for several machines: two launches that meet make one run."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, launch, metrics

FILE = ROOT / "launchers" / "accelerate" / "many_machines.yaml"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_machines_train_as_one(overrides: list[str], tmp_path: Path) -> None:
    """Over loopback: the lines of metrics that two processes of one machine write."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILE)]
    meeting = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    run = tmp_path / "many"
    with contextlib.ExitStack() as stack:
        machines = []
        for rank in range(2):
            place = ["--machine_rank", str(rank), "--main_process_port", str(port), "-m", "finetune.train"]
            machine = subprocess.Popen(
                [*accelerate, *meeting, *place, *overrides, "strategy=zero2", f"run.dir={run}"],
                env=environment(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(machine.terminate)  # it ends its workers
            machines.append(machine)
        said = [machine.communicate(timeout=280)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(text[-3000:] for text in said)
    one = tmp_path / "one"
    assert launch(2, [*overrides, "strategy=zero2", f"run.dir={one}"]).returncode == 0
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert metrics(run) == metrics(one)
