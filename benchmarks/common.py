"""What every result says of itself: hardware, versions, date, commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "deepspeed", "peft")


def context() -> dict[str, Any]:
    """Hardware, versions, date and commit of this run."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = f"{len(gpus)} x {gpus[0]}" if gpus else f"{torch.get_num_threads()} threads of {_cpu()}"
    return {
        "hardware": hardware,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def record(path: Path | None, row: dict[str, Any]) -> None:
    """Print a result as one JSON line and append it to `path`."""
    line = json.dumps(row)
    print(line, flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line + "\n")


def rounded(value: Any) -> Any:
    """Floats to four digits, in lists too."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def save_plot(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    os.replace(temporary, path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True)
    except OSError:  # a machine without git, where results would be lost after they were measured
        return None
    return found.stdout.strip() or None
