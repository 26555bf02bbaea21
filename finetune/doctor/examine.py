"""All checks in their order: what needs a failed one is skipped, everything else goes on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from finetune import UserError, build, by_all, distributed
from finetune.config import Config
from finetune.doctor import files, hosts, launch, memory, network, pieces, saving, steps
from finetune.doctor.board import Board
from finetune.doctor.context import Context, skipped
from finetune.doctor.table import FAIL, SKIPPED, Row, exit_code, show

_TALK_S = 1.0  # a launcher ends all ranks with the first one that fails: rank 0 speaks before
_NEED_DATA = ("model", "strategy", "weights", "samples", "learning rate", "steps", "resume", "memory", "reading")

Tidy = list[Callable[[], None]]


def run(config: Config, composed: DictConfig, rank: int, size: int) -> int:
    """All checks of one configuration; prints the table on rank 0 and returns the exit code.

    Raises:
        UserError: values out of range, or a run folder that is in use.
    """
    build.check(config)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    started = time.perf_counter()
    rows = [*launch.launch_rows(config), *launch.process_rows(size)]
    tidy: Tidy = []

    def broken(row: Row) -> None:
        show([*rows, row, Row("the rest", SKIPPED, "the doctor could not go on")], time.perf_counter() - started)
        _clean(tidy)

    try:
        with Board(rank, size, hosts.host_name(), broken) as board:
            try:
                context = Context(config, composed, board, rank, size, Path(config.run.dir))
                examine(context, rows, tidy)
                rows += _of_others(context, rows)
            finally:
                _clean(tidy)
    finally:
        distributed.stop()
    if rank == 0:
        show(rows, time.perf_counter() - started)
    elif exit_code(rows):
        time.sleep(_TALK_S)
    return exit_code(rows)


def examine(context: Context, rows: list[Row], tidy: Tidy) -> None:
    """Every check in turn, each adding to `rows` at once, so that they are there when a later one hangs."""
    rows += launch.rank_rows(context)
    if context.world is None:
        rows += skipped(["the rest"], "the ranks could not be joined")
        return
    rows += hosts.host_rows(context)
    scratch = context.run / files.SCRATCH
    _prepare(context, tidy)
    rows += files.folder_rows(context, scratch)
    shared = context.scratch is not None
    if not shared:
        _borrow(context, tidy)
    rows += network.network_rows(context)
    rows += pieces.tracking_rows(context)
    shared_batch = pieces.batch_rows(context)
    rows += shared_batch
    if shared_batch:
        rows += skipped(("data", *_NEED_DATA), "the ranks cannot share the batch")
        return
    opened = pieces.data_rows(context)
    rows += opened
    if any(row.result == FAIL for row in opened):
        rows += skipped(_NEED_DATA, "the data can't be opened")
        return
    if set(context.apart) - {"run.dir", "run.name"}:  # their collectives may not match
        rows += skipped(_NEED_DATA, "the ranks have different settings")
        return
    if context.scratch is None:
        rows += skipped(_NEED_DATA, "the ranks share no folder at all")
        return
    rows += pieces.build_rows(context)
    if context.parts is None:
        rows += skipped(_NEED_DATA[1:], "there is no model")
        return
    expected = memory.expected_of(context)
    rows += saving.run_rows(context)
    rows += steps.step_rows(context)
    if context.parts is None:
        rows += skipped(["resume", "reading"], "the steps failed")
        if context.is_full:  # else the device may be in any state
            rows += memory.memory_rows(context, expected)
        else:
            rows += skipped(["memory"], "the steps failed")
        return
    if shared:
        rows += saving.resume_rows(context)
    else:
        rows += skipped(["resume"], "the ranks do not share run.dir")
    rows += memory.memory_rows(context, expected)
    rows += pieces.reading_rows(context)


def _of_others(context: Context, rows: list[Row]) -> list[Row]:
    """Rows that failed on other ranks alone, whose own config or files say other things: they count as well."""
    failed = [row for row in rows if row.result == FAIL]
    outcomes = context.exchange("hosts", "comparing the rows", lambda: failed)
    mine = {row.name for row in failed}
    missed: dict[str, Row] = {}
    for rank, outcome in enumerate(outcomes):
        for row in outcome.value or ():
            if row.name not in mine:
                missed.setdefault(row.name, replace(row, seen=f"seen by {context.named([rank])}: {row.seen}"))
    return list(missed.values())


def _prepare(context: Context, tidy: Tidy) -> None:
    """Rank 0 makes the folder that the doctor works in.

    Raises:
        UserError, on every rank: the run's folder is in use, or can't be made.
    """

    def make() -> None:
        if context.rank == 0:
            tidy.append(files.Scratch(context.run).remove)

    outcome = context.exchange("folder", "preparing run.dir", make)[0]
    if outcome.error is not None:
        raise by_all(UserError(outcome.error))


def _borrow(context: Context, tidy: Tidy) -> None:
    """A temporary folder in place of one that the ranks do not share, if they share that or need not."""

    def make() -> str:
        if context.rank != 0:
            return ""
        made = tempfile.TemporaryDirectory(prefix="finetune-doctor-")
        tidy.append(made.cleanup)
        return made.name

    folder = context.exchange("folder", "making a temporary folder", make)[0].value
    if folder and all(
        each.value for each in context.exchange("folder", "seeing it", lambda: Path(folder).is_dir())
    ):
        context.scratch = Path(folder)
    elif context.config.model.pretrained is not None:  # then a run writes nothing there but checkpoints
        own = tempfile.TemporaryDirectory(prefix="finetune-doctor-")
        tidy.append(own.cleanup)
        context.scratch = Path(own.name)


def _clean(tidy: Tidy) -> None:
    """Undo what was made, the last first."""
    while tidy:
        tidy.pop()()
