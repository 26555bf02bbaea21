"""Several processes that make many runs, and runs that are made once for all tests of a module."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment

STEPS, LONG = 12, 20


def spawn(processes: int, script: Path, *arguments: str, timeout: float = 280, **variables: str) -> str:
    """Run a script in several gloo processes: what it printed. None of them outlives this call."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    started = subprocess.Popen(
        [*torchrun, str(script), *arguments],
        env=environment() | {"PYTHONPATH": str(ROOT)} | variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = started.communicate(timeout=timeout)
    except BaseException:
        started.terminate()  # it ends its workers
        started.communicate()
        raise
    assert started.returncode == 0, out[-1000:] + err[-4000:]
    return out


@dataclass(frozen=True)
class Run:
    """A run of `steps` steps; one that starts from another's checkpoint of half its steps goes on from there."""

    adapter: str
    strategy: str
    processes: int = 2
    more: tuple[str, ...] = ()
    start: Run | None = None
    steps: int = STEPS

    def overrides(self) -> list[str]:
        half = self.steps // 2
        length = [f"train.steps={self.steps}", f"checkpoint.every={half}", f"ema.snapshot_every={half}"]
        return [*length, *self.more, f"strategy={self.strategy}"]


class Lab:
    """Makes runs, each once, those of equal process counts in one launch."""

    def __init__(self, folder: Path, settings: dict[str, list[str]]) -> None:
        self.folder, self.settings = folder, settings
        self.made: dict[Run, Path] = {}

    def make(self, *runs: Run) -> None:
        """Make what isn't there yet, starting points first."""
        wanted = [one for run in runs for one in (run.start, run) if one is not None]
        missing = [run for run in dict.fromkeys(wanted) if run not in self.made]
        while missing:
            ready = [run for run in missing if run.start is None or run.start in self.made]
            processes = ready[0].processes
            batch = []
            for run in missing:  # in their order: a start in the same launch comes before what goes on from it
                if run.processes == processes and (run.start is None or run.start in self.made):
                    self.made[run] = self.folder / f"run-{len(self.made)}"
                    batch.append(run)
            jobs = [
                {
                    "run": str(self.made[run]),
                    "start": run.start and str(self.made[run.start]),
                    "overrides": [*self.settings[run.adapter], *run.overrides()],
                }
                for run in batch
            ]
            file = self.folder / "jobs.json"
            file.write_text(json.dumps(jobs))
            script = Path(__file__).with_name("driver.py")
            try:
                print(spawn(processes, script, str(file), timeout=300 + 120 * processes * len(jobs)))
            except BaseException:
                self.made = {run: path for run, path in self.made.items() if run not in batch}
                raise
            missing = [run for run in missing if run not in self.made]

    def __call__(self, run: Run) -> Path:
        self.make(run)
        return self.made[run]


@pytest.fixture(scope="module")
def lab(pipeline: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """EMA, sampling, validation, accumulation, checkpointed activations and clipping that clips, in float32.

    `full` trains a model from scratch with its text encoder, `lora` adapters of U-Net and text encoder.
    """
    common = [
        "experiment=smoke",
        f"data.shards={latents}",
        "tracker=none",
        "train.micro_batch=2",
        "model.gradient_checkpointing=true",
        "sample.steps=2",
        "sample.prompts=[a red cat, a blue bus]",
        "ema.halflife_images=40",
        "ema.rampup_ratio=1",
        "ema.halflives_images.short=8",
        "ema.sigma_rels=[0.1]",
    ]
    shape = ["optim.max_grad_norm=0.5", "model.unet.block_out_channels=[16,32]", "model.unet.attention_head_dim=2"]
    tuned = [f"model.pretrained={pipeline}", "model.unet={}", "model.train_text_encoder=true"]
    adapted = ["adapter=lora", "adapter.rank=4", "optim.lr=3e-3", "optim.max_grad_norm=0.05"]
    settings = {"full": [*common, *shape], "lora": [*common, *tuned, *adapted]}
    settings |= {name: [*common, *tuned, *adapted, f"adapter={name}"] for name in ("dora", "lora_conv")}
    settings["dora"] += ["adapter.targets=[to_q,to_v,conv1,conv_shortcut,proj_in]"]
    return Lab(tmp_path_factory.mktemp("lab"), settings)
