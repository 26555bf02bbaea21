"""Runs of several processes in tests: start one, wait for a line of metrics, signal its ranks, compare ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.conftest import ROOT, environment, metrics

OURS = ["-m", "launchers.torchrun", "--grace", "8"]
PLAIN = ["-m", "torch.distributed.run"]
TRAIN = ["-m", "finetune.train"]
AUTOENCODER = ["-m", "finetune", "autoencoder"]
COMMANDS = ("finetune.train", "finetune autoencoder", "worker.py")  # what a rank is known by


class Run:
    """A run under way, with its output in a file. Leaves nothing behind at the end of its `with` block."""

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str],
        *,
        processes: int = 2,
        launcher: Sequence[str] = OURS,
        train: Sequence[str] = TRAIN,
        prefix: Sequence[str] = (),
        variables: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}-{time.monotonic_ns()}.log")
        command = [sys.executable, *launcher, f"--nproc-per-node={processes}", *train]
        command = command if processes > 1 or "--nnodes" in launcher else None
        command = command or [sys.executable, *train]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, *command, *overrides, f"run.dir={folder}"],
                env={**environment(), **(variables or {})},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.known: dict[int, psutil.Process] = {}

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.workers().values(), *self.known.values()]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def lines(self) -> int:
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def until(self, true: Callable[[], bool], what: str, seconds: float = 150) -> None:
        """Wait; the run must not end before it is true."""
        deadline = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None or true(), f"ended before {what}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.output[-4000:]}"
            time.sleep(0.05)

    def until_line(self, count: int) -> Run:
        self.until(lambda: self.lines() >= count, f"{count} lines of metrics")
        return self

    def workers(self) -> dict[int, psutil.Process]:
        """The processes by rank."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(words in " ".join(child.cmdline()) for words in COMMANDS):
                        found[int(child.environ()["RANK"])] = child
        self.known.update(found)
        return found

    def catches(self, number: int) -> bool:
        """Whether the process that was started has a handler for a signal."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
        return bool(int(mask, 16) >> (number - 1) & 1)

    def kill(self, number: int, *ranks: int) -> None:
        """Send a signal to ranks; without any to the process that was started."""
        if not ranks:
            self.process.send_signal(number)
        for rank in ranks:
            os.kill(self.workers()[rank].pid, number)

    def end(self, seconds: float = 150) -> int:
        """Wait for the end; the exit code as a shell would tell it."""
        self.workers()
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it goes on after {seconds:g} s:\n{self.output[-4000:]}") from None
        return code if code >= 0 else 128 - code


def same_end(one: Path, other: Path) -> None:
    """The last checkpoints and all lines of metrics are the same, bit by bit."""
    ends = [sorted((run / "checkpoints").iterdir())[-1] for run in (one, other)]
    records = [json.loads((end / "trainer.json").read_text()) for end in ends]
    assert records[0]["files"] == records[1]["files"], "weights, average or moments differ"
    assert records[0]["step"] == records[1]["step"]
    assert metrics(one) == metrics(other)


def steps_of(run: Path) -> list[int]:
    """The steps that checkpoints were saved at."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
