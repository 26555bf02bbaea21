"""launchers.torchrun with real processes: exit codes, signals, who failed first, and nobody left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launchers.torchrun.failures import verdict
from tests.conftest import ROOT, environment

WORKER = """
import os, signal, sys, time
rank, mode, folder = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
if mode == "well":
    time.sleep(rank)
elif mode == "mistake":
    time.sleep(0.5 * rank)
    open(f"{folder}/starts-{rank}", "a").write("x")
    sys.exit(2)
elif mode == "crash":  # the first loses its peer
    open(f"{folder}/starts-{rank}", "a").write("x")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    sys.exit(69)
elif mode == "deaf":  # rank 0 hears no SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == 1:
        sys.exit(3)
    time.sleep(1000)
elif mode == "far":  # the first node's ranks wait for one of the second's
    if rank == 2:
        os.abort()
    time.sleep(1000 if rank == 1 else 1)
    sys.exit(69)
elif mode == "stopped":  # save after being asked, one long after the other
    heard = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
    open(f"{folder}/ready-{rank}", "w").close()
    while len(heard) < 2:
        time.sleep(0.02)
    time.sleep(0.3 + 3 * rank)
    open(f"{folder}/heard-{rank}", "w").write(" ".join(heard))
    sys.exit(75)
elif mode == "long":
    open(f"{folder}/ready-{rank}", "w").close()
    time.sleep(1000)
"""


@pytest.fixture
def start(tmp_path):
    """`start("crash", "--max-restarts", "1")` starts two workers of a mode; all ends with the test."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    started: list[subprocess.Popen[str]] = []

    def begin(mode: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "launchers.torchrun", "--nproc-per-node", "2", "--grace", "3", *options]
        settings = {"env": environment(), "cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*command, str(script), mode, str(tmp_path)], **settings))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def end_of(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    stderr = process.communicate(timeout=60)[1]
    return process.returncode, stderr.splitlines()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([69, 2], 2),  # one rank's disk is full, the other lost it
        ([75, 2], 2),
        ([137, 75], 75),
        ([69, 137, 1], 137),
        ([0, 69], 69),
        ([130, 69], 130),
    ],
)
def test_the_most_telling_exit_code(codes, expected):
    assert verdict(codes) == expected


def test_exit_codes_restarts_and_the_rank_that_failed_first(start, tmp_path):
    """Several launches at once, to save time."""
    host = socket.gethostname()
    well, mistake, deaf = start("well"), start("mistake", "--max-restarts", "3"), start("deaf")
    assert end_of(well) == (0, [])
    assert end_of(mistake) == (2, [f"launchers.torchrun: rank 0 on {host} failed first: exit code 2"])
    assert (tmp_path / "starts-0").read_text() == "x"  # a mistake is not tried again
    assert end_of(deaf) == (3, [f"launchers.torchrun: rank 1 on {host} failed first: exit code 3"])
    (tmp_path / "starts-0").unlink()
    code, lines = end_of(start("crash", "--max-restarts", "1"))
    assert code == 128 + signal.SIGKILL
    assert (tmp_path / "starts-0").read_text() == "xx"
    assert len(lines) == 2
    assert all(f"rank 1 on {host} failed first: killed by SIGKILL" in line for line in lines)


def test_an_end_that_torch_sees_first_keeps_its_exit_code(tmp_path):
    """Between our look at the workers and torch's own: it took what had stopped for done."""
    (tmp_path / "launch.py").write_text(
        "import sys, time\n"
        "from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent\n"
        "look = LocalElasticAgent._monitor_workers\n"
        "LocalElasticAgent._monitor_workers = lambda *args: (time.sleep(3), look(*args))[1]\n"
        "from launchers.torchrun.command import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "worker.py").write_text("import sys, time; time.sleep(2); sys.exit(75)")
    command = [sys.executable, str(tmp_path / "launch.py"), "--nproc-per-node", "2", str(tmp_path / "worker.py")]
    assert subprocess.run(command, env=environment(), cwd=ROOT, timeout=60, check=False).returncode == 75


SAVES = """
import signal, sys, time
heard = []
signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
open(f"{sys.argv[1]}/ready", "w").close()
while not heard:
    time.sleep(0.02)
time.sleep(1)
open(f"{sys.argv[1]}/saved", "w").close()
sys.exit(130)
"""
CALLS = {
    "sweep": "from finetune import sweep; sweep._call(command)",
    "node": "from launchers.slurm import node; node.command = lambda *_: command; sys.exit(node.main([]))",
}


@pytest.mark.parametrize("caller", CALLS)
def test_who_started_a_run_lets_it_save_after_ctrl_c(tmp_path, caller):
    """A terminal sends it to all of them; `subprocess.call` kills a quarter of a second later."""
    (tmp_path / "run.py").write_text(SAVES)
    call = (
        f"import sys; command = [sys.executable, {str(tmp_path / 'run.py')!r}, {str(tmp_path)!r}]; {CALLS[caller]}"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", call], env=environment(), cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL
    )
    wait_for(tmp_path / "ready")
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(timeout=60) in (130, -signal.SIGINT)
    assert (tmp_path / "saved").exists()


def test_signals_reach_each_worker_and_saving_is_waited_for(start, tmp_path):
    early = start("long")
    running = start("stopped")
    time.sleep(0.5)  # longer than an interpreter's start, shorter than torch's import
    early.send_signal(signal.SIGTERM)
    code, lines = end_of(early)
    assert (code, len(lines)) == (75, 1)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    running.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    assert end_of(running) == (75, [])
    # The second worker saved for longer than the grace that a failure would have left it.
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1 SIGTERM"] * 2


def test_a_killed_launcher_leaves_no_worker(start, tmp_path):
    process = start("long")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left


def test_a_failure_on_one_node_ends_the_others(start):
    """The node that only lost its peer, and waits, names the rank of the other node and takes over its code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = [
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{port}",
        "--rdzv-id",
        "a",
    ]
    nodes = [start("far", *rendezvous) for _ in range(2)]
    expected = f"launchers.torchrun: rank 2 on {socket.gethostname()} failed first: killed by SIGABRT"
    for node in nodes:
        assert end_of(node) == (128 + signal.SIGABRT, [expected])


def test_help_says_what_is_added_and_mistakes_are_one_line():
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launchers.torchrun", *words]
        return subprocess.run(command, env=os.environ, cwd=ROOT, capture_output=True, text=True, timeout=60)

    shown = run("--help").stdout
    assert "--grace" in shown and "--rdzv-endpoint" in shown and "exit code " in shown
    wrong = run("--nproc-per-node", "many", "worker.py")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: Unsupported nproc_per_node value: many\n"


def test_what_the_launcher_says_where_nobody_reads_costs_nothing() -> None:
    """It is said in the thread of signals, which must go on: Ctrl-C ends `| tee log` as well."""
    full = "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)"
    code = f"import os; from launchers.torchrun import failures; {full}; failures.say('a line')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
