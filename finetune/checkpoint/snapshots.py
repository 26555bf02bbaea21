"""Snapshots of averages by power functions, from which ones of other lengths are made (`finetune.posthoc`).

A snapshot shares the files of the checkpoint that it is of, by links: it costs no writing, and stays when the
checkpoint is pruned.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from finetune.checkpoint.record import TEMPORARY, FileSum, publish, remove, write_record
from finetune.posthoc import SNAPSHOTS, complete_snapshots

_KEPT = ("step", "images_seen", "latents")  # of a checkpoint's record


def keep_snapshot(
    checkpoint: Path, run: Path, name: str, record: Mapping[str, Any], sums: Mapping[str, FileSum]
) -> None:
    """Make `RUN/snapshots/NAME` of a checkpoint's folder that is about to be published.

    It comes before the checkpoint: a kill between the two leaves a snapshot that the run, which goes on from the
    checkpoint before, makes again with the same bytes. The other way round one would be missing.
    """
    final = run / SNAPSHOTS / name
    temporary = final.with_name(f"{TEMPORARY}{name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _fill(temporary, checkpoint, record, sums)
        publish(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def kept_averages(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's averages those that a snapshot keeps, as its record has them, by their folders."""
    return {folder: it for folder, it in record["averages"].items() if "sigma_rel" in it}


def _fill(temporary: Path, checkpoint: Path, record: Mapping[str, Any], sums: Mapping[str, FileSum]) -> None:
    averages: dict[str, Any] = {}
    kept_sums: dict[str, FileSum] = {}
    for folder, it in kept_averages(record).items():
        short = f"power-{it['sigma_rel']:g}"
        averages[short] = it
        for path in (path for path in sorted((checkpoint / folder).rglob("*")) if path.is_file()):
            inside = f"{short}/{path.relative_to(checkpoint / folder)}"
            _link(path, temporary / inside)
            kept_sums[inside] = sums[str(path.relative_to(checkpoint))]
    write_record(temporary, {**{key: record[key] for key in _KEPT}, "averages": averages}, kept_sums)


def prune_snapshots(run: Path, keep: int | None, began_at: int, made: Collection[int]) -> None:
    """Remove all but the last `keep` snapshots (None for all), and those of another past of the run.

    Args:
        began_at: the step that the run went on from: what is later and not in `made` was made before it went back.
        made: steps of those that were made since.
    """
    complete = complete_snapshots(run)
    own = [at for at in complete if at <= began_at or at in made]
    kept = own if keep is None else own[-keep:]
    remove(path for at, path in complete.items() if at not in kept)


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:  # not on every file system
        shutil.copyfile(path, target)
