"""Two hosts, as network namespaces with their own names, addresses and a cable that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune import PEER_LOST
from tests.survival.runs import OURS, Run, same_end

PREFIX = "ldm-test-"


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


class Hosts:
    """`host-a` at 10.77.0.1 and `host-b` at 10.77.0.2."""

    def __init__(self) -> None:
        self.names = [f"{PREFIX}{os.getpid()}-{letter}" for letter in "ab"]
        self.ends = [f"lt{os.getpid() % 10**9}{letter}" for letter in "ab"]

    def __enter__(self) -> Hosts:
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            self.ends[0],
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            self.ends[1],
            "netns",
            self.names[1],
        )
        for index, (name, end) in enumerate(zip(self.names, self.ends)):
            ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            remove(name)

    def start(self, folder: Path, overrides: list[str]) -> list[Run]:
        """A process on each, by launchers.torchrun."""
        meeting = [
            "--nnodes",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "10.77.0.1:29400",
            "--rdzv-id",
            "job",
        ]
        return [
            Run(
                folder,
                overrides,
                processes=1,
                launcher=[*OURS, *meeting],
                prefix=[
                    *["ip", "netns", "exec"],
                    name,
                    *["unshare", "--uts", "sh", "-c"],
                    f'hostname host-{letter}; exec "$@"',
                    "sh",
                ],
            )
            for name, letter in zip(self.names, "ab")
        ]

    def drop_silently(self) -> None:
        """Packets go to addresses that nobody has: no reset, no link that is down."""
        for index in (0, 1):
            other = f"10.77.0.{2 - index}"
            ip(
                "-n",
                self.names[index],
                "neigh",
                "replace",
                other,
                "lladdr",
                "02:00:00:00:00:99",
                "dev",
                self.ends[index],
                "nud",
                "permanent",
            )

    def unplug(self) -> None:
        ip("-n", self.names[0], "link", "set", self.ends[0], "down")

    def restore(self) -> None:
        for index in (0, 1):
            ip("-n", self.names[index], "link", "set", self.ends[index], "up")
            ip("-n", self.names[index], "neigh", "flush", "dev", self.ends[index], "nud", "permanent")


def remove(name: str) -> None:
    for pid in ip("netns", "pids", name, check=False).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "del", name, check=False)


def lacking() -> str:
    """Why this machine can't have the two hosts, or nothing."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need root and iproute2"
    if subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True).returncode:
        return "this machine (a container without CAP_SYS_ADMIN?) allows no network namespaces"
    return ""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Skipped where there can be none, except in CI."""
    if reason := lacking():
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    for stale in ip("netns", "list").split():  # of a test that was killed
        if stale.startswith(PREFIX) and not Path(f"/proc/{stale.split('-')[2]}").exists():
            remove(stale)
    made = Hosts()
    try:
        yield made.__enter__()
    finally:
        made.__exit__()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cut", [Hosts.drop_silently, pytest.param(Hosts.unplug, marks=pytest.mark.slow)])
def test_a_cut_link_ends_both_hosts_and_the_job_goes_on_when_it_is_restored(hosts, settings, calm, tmp_path, cut):
    """It ends with the bits of the undisturbed run, which was on one host."""
    folder = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        first, second = [stack.enter_context(run) for run in hosts.start(folder, settings)]
        first.until_line(13)
        cut(hosts)
        since = time.monotonic()
        assert [first.end(60), second.end(60)] == [PEER_LOST, PEER_LOST]
        assert time.monotonic() - since < 60
        (said,) = first.errors
        assert "rank 1 on host-b has given no sign of life for " in said
        (said,) = second.errors
        assert "the store of this run at 10.77.0.1 has not answered for " in said
        assert "Traceback" not in first.output + second.output
    hosts.restore()
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(run) for run in hosts.start(folder, settings)]
        assert [run.end() for run in runs] == [0, 0], "\n".join(run.output[-3000:] for run in runs)
    same_end(folder, calm)
