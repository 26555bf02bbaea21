"""A rank that dies, freezes, hangs or never comes ends the job in bounded time, by name; it can go on after."""

from __future__ import annotations

import signal
import socket
import time

import pytest

from finetune import PEER_LOST, STOPPED
from tests.survival.runs import OURS, PLAIN, Run, same_end, steps_of

HOST = socket.gethostname()
HUNG = """
import os, sys, time
from finetune import run_cli, train
from finetune.data.loader import Data
original = Data.loader
def slow(self, **settings):
    loader = original(self, **settings)
    batches = iter(loader)
    def read():
        for index, batch in enumerate(batches):
            if os.environ["RANK"] == "1" and index == 5 and not os.path.exists(sys.argv[1]):
                open(sys.argv[1], "w").close()
                time.sleep(1000)
            yield batch
    return type("Slow", (), {"__iter__": lambda self: read(), "close": loader.close})()
Data.loader = slow
run_cli(lambda: train.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_then_stopped_it_goes_on_each_time(settings, calm, tmp_path):
    """One rank is killed; one rank is told to stop, and all save; then to the end, in one W&B run."""
    folder = tmp_path / "run"
    logged = [*settings, "tracker=wandb", "tracker.mode=offline", "tracker.every=1"]
    with Run(folder, logged) as run:
        run.until_line(13).kill(signal.SIGKILL, 1)
        assert run.end() == 128 + signal.SIGKILL
        assert f"launchers.torchrun: rank 1 on {HOST} failed first: killed by SIGKILL" in run.output
        (line,) = run.errors
        assert f"rank 1 on {HOST} has given no sign of life" in line and "at step " in line
        assert "Traceback" not in run.output
    assert steps_of(folder) == [10]
    with Run(folder, logged) as run:
        run.until_line(23).kill(signal.SIGUSR1, 1)
        assert run.end() == STOPPED, run.output[-4000:]
        assert "stopped: the same command goes on" in run.output
        assert run.errors == [] and "failed first" not in run.output
    assert steps_of(folder)[-1] > 22
    with Run(folder, logged) as run:
        assert run.end() == 0, run.output[-4000:]
    same_end(folder, calm)
    identity = (folder / "wandb-id").read_text().strip()
    runs = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(runs) == 3
    assert all(name.endswith(f"-{identity}") for name in runs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", [PLAIN, OURS], ids=["plain", "ours"])
def test_a_frozen_rank_is_named(settings, calm, tmp_path, launcher):
    folder = tmp_path / "run"
    with Run(folder, settings, launcher=launcher) as run:
        run.until_line(13).kill(signal.SIGSTOP, 0)
        since = time.monotonic()
        run.until(lambda: bool(run.errors), "verdict", 20)
        assert time.monotonic() - since > 3  # watch.lost_s is 4, and a beat old at most
        (line,) = run.errors
        assert f"rank 0 on {HOST} has given no sign of life" in line
        if launcher is PLAIN:  # which waits 30 s before it kills; ours takes who is killed by others for the cause
            run.kill(signal.SIGKILL, 0)
        assert run.end(40) == (PEER_LOST if launcher is OURS else 1)
    with Run(folder, settings, launcher=launcher) as run:
        assert run.end() == 0
    same_end(folder, calm)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_hung_in_its_data_is_named(settings, calm, tmp_path):
    folder, script = tmp_path / "run", tmp_path / "worker.py"
    script.write_text(HUNG)
    hung = [str(script), str(tmp_path / "hung")]
    with Run(folder, [*settings, "watch.stalled_s=5"], train=hung) as run:
        assert run.end() == PEER_LOST
        (line,) = run.errors
        assert f"rank 1 on {HOST} hangs: waiting for data at step 6 for " in line
    with Run(folder, settings, train=hung) as run:
        assert run.end() == 0
    same_end(folder, calm)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_never_comes_is_named(settings, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    bounds = ["watch.start_s=6", "watch.lost_s=3"]
    runs = [
        Run(tmp_path / "run", [*settings, *bounds], processes=1, variables={**world, "RANK": rank})
        for rank in ("0", "2")
    ]
    for run in runs:
        with run:
            assert run.end() == PEER_LOST
            (line,) = run.errors
            assert "ranks 1, 3 of 4 did not come within" in line and "here: ranks 0, 2" in line
