"""Many runs of `finetune train` within one set of processes: importing costs more than a tiny run.

    torchrun --nproc_per_node N tests/strategies/driver.py JOBS.json

JOBS.json lists for each run in turn its folder (`run`), its overrides, and the run that it goes on from (`start`,
or null) after half of that one's steps. The process group stays from run to run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from finetune.distributed import world
from finetune.train import main


def take_half(whole: Path, half: Path) -> None:
    """Make `half` what the run `whole` was at its first checkpoint."""
    first = min((whole / "checkpoints").glob("step-*"))
    for folder in ("checkpoints", "snapshots"):
        shutil.copytree(whole / folder / first.name, half / folder / first.name)
    step = int(first.name.removeprefix("step-"))
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    if (whole / "tokenizer").is_dir():
        shutil.copytree(whole / "tokenizer", half / "tokenizer")


def drive(jobs: list[dict[str, Any]]) -> int:
    is_main = os.environ["RANK"] == "0"
    stop, world.stop = world.stop, lambda: None
    try:
        for job in jobs:
            started = time.perf_counter()
            if job["start"] is not None and is_main:  # the others wait for its word on the run's folder
                take_half(Path(job["start"]), Path(job["run"]))
            if code := main([*job["overrides"], f"run.dir={job['run']}"]):
                return code
            if is_main:
                print(f"{time.perf_counter() - started:.1f} s: {job['run']} {job['overrides'][-1]}", flush=True)
    finally:
        stop()
    return 0


if __name__ == "__main__":
    sys.exit(drive(json.loads(Path(sys.argv[1]).read_text())))
