"""Being told to stop: all ranks agree on a step, save together and exit with a code; the same command goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import STOPPED
from tests.survival.runs import PLAIN, Run, same_end, steps_of

INTERRUPTED = 128 + signal.SIGINT
SLOW = """
import os, sys, time
from finetune import checkpoint, run_cli, train, loop
folder = sys.argv[1]
def slowly(function, name, seconds):
    def slow(*arguments, **settings):
        if not os.path.exists(f"{folder}/{name}"):
            open(f"{folder}/{name}", "w").close()
            time.sleep(seconds)
        return function(*arguments, **settings)
    return slow
if sys.argv[2] == "save":
    checkpoint.Checkpoints.save = slowly(checkpoint.Checkpoints.save, "save", 1000)
else:
    loop._validate = slowly(loop._validate, "validate", 2)
    loop._sample = slowly(loop._sample, "sample", 2)
run_cli(lambda: train.main(sys.argv[3:]))
"""


@pytest.fixture
def slow(tmp_path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(SLOW)
    return [str(script), str(tmp_path)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_alone_ctrl_c_saves_and_a_second_one_ends_at_once(settings, tmp_path, slow):
    folder, undisturbed = tmp_path / "run", tmp_path / "calm"
    alone = [*settings, "train.steps=30"]
    with Run(undisturbed, alone, processes=1) as run:
        assert run.end() == 0
    with Run(folder, alone, processes=1) as run:
        run.until_line(5).kill(signal.SIGINT)
        assert run.end() == INTERRUPTED, run.output[-4000:]
    (first,) = steps_of(folder)
    with Run(folder, alone, processes=1, train=[*slow, "save"]) as run:
        run.until_line(first + 3).kill(signal.SIGINT)
        run.until(lambda: (tmp_path / "save").exists(), "a save")
        time.sleep(1.1)  # what comes within a second is the same request
        run.kill(signal.SIGINT)
        assert run.end(10) == INTERRUPTED
        assert "SIGINT once more: stopping at once" in run.output
    assert steps_of(folder)[-1] in (first, 10)
    with Run(folder, alone, processes=1) as run:
        assert run.end() == 0
    same_end(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["ours", "plain"])
def test_a_short_grace_leaves_the_older_checkpoint(settings, calm, tmp_path, slow, launcher):
    """SIGTERM to every process and, while they save, a second one or SIGKILL."""
    folder = tmp_path / "run"
    options = {"launcher": PLAIN} if launcher == "plain" else {}
    with Run(folder, settings, train=[*slow, "save"], **options) as run:
        run.until_line(13).kill(signal.SIGTERM, 0, 1)
        run.until(lambda: (tmp_path / "save").exists(), "a save")
        time.sleep(5.1)  # what comes earlier may be the same request, passed on
        if launcher == "ours":
            run.kill(signal.SIGTERM)
            assert run.end(20) == STOPPED
        else:
            run.kill(signal.SIGKILL, 0, 1)
            assert run.end(60) == 1
    assert steps_of(folder) == [10]
    with Run(folder, settings, **options) as run:
        assert run.end() == 0
    same_end(folder, calm)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_signals_while_starting_validating_and_sampling(settings, tmp_path, slow, processes):
    folder, undisturbed = tmp_path / "run", tmp_path / "calm"
    busy = [*settings, "validation.every=6", "sample.every=9", "sample.steps=2", "train.steps=20"]
    began = time.monotonic()
    with Run(undisturbed, busy, processes=processes) as run:
        assert run.end() == 0
    took = time.monotonic() - began
    for share in (0.1, 0.3, 0.5):  # imports, the processes' meeting, the model
        with Run(folder, busy, processes=processes) as run:
            # At its first step at the latest: the machine may have more time for this one.
            later = time.monotonic() + share * took
            run.until(lambda run=run, later=later: time.monotonic() > later or run.lines() > 0, "its time")
            # Until the interpreter has come to our first line a signal ends it in the system's own way.
            run.until(lambda run=run: run.catches(signal.SIGUSR1), "a handler")
            run.kill(signal.SIGUSR1)
            assert run.end() == STOPPED, run.output[-4000:]
    for name in ("validate", "sample"):
        with Run(folder, busy, processes=processes, train=[*slow, "both"]) as run:
            run.until(lambda name=name: (tmp_path / name).exists(), name)
            run.kill(signal.SIGTERM, *([0] if processes > 1 else []))
            assert run.end() == STOPPED, run.output[-4000:]
            assert run.errors == []
    with Run(folder, busy, processes=processes) as run:
        assert run.end() == 0
    same_end(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_process_told_at_once_stops_once(settings, calm, tmp_path):
    """As Slurm does it: the launcher passes on what the workers have heard already. And the launcher alone."""
    folder = tmp_path / "run"
    with Run(folder, settings) as run:
        run.until_line(5).kill(signal.SIGTERM)
        assert run.end() == STOPPED, run.output[-4000:]
    with Run(folder, settings) as run:
        run.until_line(13)
        run.kill(signal.SIGUSR1, 0, 1)
        run.kill(signal.SIGUSR1)
        assert run.end() == STOPPED, run.output[-4000:]
        assert "once more:" not in run.output  # what a second signal says
    with Run(folder, settings) as run:
        assert run.end() == 0
    same_end(folder, calm)


TOLD_TWICE = """
import os, signal, time
from finetune.distributed import StopRequest
with StopRequest(0) as request:
    request.can_save = True
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("saved", request.number == signal.SIGUSR1)
"""


def test_a_copy_of_a_request_that_comes_late_does_not_cost_the_checkpoint():
    """The job's script passes a signal on after it has asked Slurm for the job's state."""
    done = subprocess.run([sys.executable, "-c", TOLD_TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "saved True\n"), done.stderr


TOLD_TWICE_UNHEARD = """
import os, signal, time
from finetune.distributed import StopRequest
with StopRequest(0) as request:
    request.can_save = True
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.5)
"""


def test_a_second_ctrl_c_ends_at_once_where_nobody_reads_what_is_said():
    """The first one has ended `| tee log` too; or the log's disk is full."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", TOLD_TWICE_UNHEARD], stderr=full)
    assert done.returncode == INTERRUPTED
