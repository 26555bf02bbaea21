"""Who failed, and the exit code of all from those of the workers."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from finetune import INTERRUPTED, PEER_LOST, STOPPED, say_at_once

MISTAKE = 2
FINAL = (MISTAKE, STOPPED, INTERRUPTED)
"""Exit codes after which a restart helps nobody."""


@dataclass(frozen=True)
class Failure:
    """Which rank failed, where and how. `code` is what a shell would say: 128+N for signal N."""

    rank: int
    host: str
    code: int

    def __str__(self) -> str:
        if self.rank < 0:
            return f"{self.host} does not answer any more"
        if self.code == PEER_LOST:
            return f"rank {self.rank} on {self.host} has lost another rank, see its own line: exit code {PEER_LOST}"
        where = f"rank {self.rank} on {self.host} failed first"
        if self.code == 128 + signal.SIGKILL:
            return f"{where}: killed by SIGKILL (without a hand in it: by the kernel, for want of memory)"
        if self.code > 128:
            with contextlib.suppress(ValueError):
                return f"{where}: killed by {signal.Signals(self.code - 128).name}"
        return f"{where}: exit code {self.code}"


def verdict(codes: Sequence[int]) -> int:
    """The exit code of all from those of the workers, in the order in which they ended.

    A mistake is a mistake whatever else happened, and a run that was asked to stop is to be started again; else the
    first failure is the cause, and ranks that lost their peers are its witnesses.
    """
    failed = [code for code in codes if code]
    for code in FINAL:
        if code in failed:
            return code
    return next((code for code in failed if code != PEER_LOST), PEER_LOST if failed else 0)


def code_of(returncode: int, asked: Collection[int]) -> int:
    """A worker's exit code from Popen's `returncode`; `asked`: signals that were passed on to it."""
    if returncode >= 0:
        return returncode
    return asked_code(-returncode) if -returncode in asked else 128 - returncode


def asked_code(number: int) -> int:
    """The exit code of what a signal has ended that asks to stop."""
    return STOPPED if number in (signal.SIGUSR1, signal.SIGTERM) else 128 + number


def say(line: str) -> None:
    """Print a line of the launcher's, whether or not anybody reads it."""
    say_at_once(f"launchers.torchrun: {line}\n")
