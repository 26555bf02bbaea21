"""What `finetune train` makes of its step: the whole trainer beside the bare step, of one model on one GPU.

    python -m benchmarks.trainer                          # SD 2.1's shape, batch 64, on a GPU
    python -m benchmarks.trainer --shape ldm8 --batch 256
    python -m benchmarks.trainer                          # on a CPU: a tiny shape

bare     `optimizer_step` of what `finetune.build` makes, on one batch again and again
trainer  the command: shards on local disk, learning rate, an average of the weights at each step, lines of metrics,
         W&B offline (`--no-wandb` without)

Weights are random; the text encoder is one small layer and trained as well. Each runs in a process of its own;
`of_bare` is the trainer's rate over the bare step's. The trainer's is that of its lines in metrics.jsonl but the
first, which has the warming up in it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import context, record
from benchmarks.ranks import waiter
from benchmarks.scaling import write_shards
from benchmarks.works import SHAPES
from finetune import build, distributed
from finetune.config import Config, compose
from finetune.step import optimizer_step
from finetune.terminal import quiet_libraries
from finetune.train import main as train

VARIANTS = ("bare", "trainer")
_WARM_UP = 10  # steps, that compile and choose kernels


def overrides(arguments: argparse.Namespace, folder: Path, steps: int) -> list[str]:
    """What `finetune train` is told."""
    unet = SHAPES[arguments.shape]["unet"]
    return [
        "model=sd15",
        "model.pretrained=null",
        *[f"++model.unet.{name}={json.dumps(value)}" for name, value in unet.items()],
        f"model.text_encoder.hidden_size={unet['cross_attention_dim']}",
        "model.text_encoder.layers=1",
        f"model.text_encoder.max_length={SHAPES[arguments.shape]['tokens']}",
        f"data.shards={folder / 'shards'}",
        f"run.dir={folder / 'run'}",
        f"train.steps={steps}",
        f"train.global_batch={arguments.batch}",
        f"tracker.every={arguments.every}",
        "sample.every=0",
        "validation.every=0",
        "checkpoint.every=1_000_000",
        *([] if arguments.wandb else ["tracker=none"]),
    ]


def bare(arguments: argparse.Namespace, folder: Path) -> float:
    """Images a second."""
    config, _ = compose("train", overrides(arguments, folder, 1), Config)
    quiet_libraries()
    world = distributed.start(config.train.device, uses_deepspeed=False)
    parts = build.build(config, world, folder / "bare")
    loader = parts.data.loader(seed=0, micro_batch=parts.micro_batch, pin=world.device.type == "cuda")
    batches = iter(loader)
    batch = next(batches)
    batches.close()
    loader.close()
    wait, again = waiter(world.device), itertools.repeat(batch)
    started, steps = math.inf, -_WARM_UP
    while steps < 0 or time.perf_counter() - started < arguments.seconds:
        if steps == 0:
            wait()
            started = time.perf_counter()
        optimizer_step(
            parts.strategy,
            parts.model.conditioner,
            again,
            micro_batches=parts.accumulation,
            global_batch=arguments.batch,
            lr=1e-5,
            dropout=0.0,
            seed=0,
            averages=[],
            images_seen=arguments.batch,
        )
        steps += 1
        if steps % arguments.every == 0:
            wait()  # as often as the trainer does
    wait()
    rate = steps * arguments.batch / (time.perf_counter() - started)
    distributed.stop()
    return rate


def whole(arguments: argparse.Namespace, folder: Path) -> float:
    """Images a second."""
    # The first line has the warm-up, so it takes another one at least.
    steps = max(3, round(arguments.bare * arguments.seconds / arguments.batch / arguments.every) + 1)
    with contextlib.redirect_stdout(io.StringIO()):
        code = train(overrides(arguments, folder, steps * arguments.every))
    if code:
        sys.exit(code)
    rates = [
        json.loads(line)["images_per_s"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    return len(rates[1:]) / sum(1 / rate for rate in rates[1:])


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="sd21_512" if on_gpu else "tiny", metavar="SHAPE")
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--seconds", type=float, default=60.0 if on_gpu else 2.0, help="measured time of each")
    parser.add_argument("--every", type=int, default=20 if on_gpu else 10, help="steps between lines of metrics")
    parser.add_argument("--mib", type=float, default=2048.0 if on_gpu else 1.0, help="of shards")
    parser.add_argument("--no-wandb", dest="wandb", action="store_false", help="metrics.jsonl alone")
    parser.add_argument("--out", type=Path, help="a JSON line is appended here as well")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps((bare if arguments.one == "bare" else whole)(arguments, arguments.folder)), flush=True)
        return
    row: dict[str, Any] = {"work": f"{arguments.shape}_full", "variant": "trainer", "batch": arguments.batch}
    row |= {"wandb": arguments.wandb, "every": arguments.every}
    with tempfile.TemporaryDirectory(prefix="trainer-") as folder:
        started = time.perf_counter()
        write_shards(Path(folder) / "shards", arguments.shape, arguments.mib)
        rates: list[float] = []
        for variant in VARIANTS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.trainer",
                *sys.argv[1:],
                "--one",
                variant,
                "--folder",
                folder,
            ]
            done = subprocess.run(
                [*command, "--bare", str(rates[0] if rates else 0)], capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"error: {variant} failed: {(done.stderr.strip() or 'nothing said')[-2000:]}")
            rates.append(float(done.stdout.splitlines()[-1]))
            # Said at once, since the run may be cut off before its row is whole.
            said = f"{variant}: {rates[-1]:.2f} images/s, {time.perf_counter() - started:.0f} s after the start"
            print(said, file=sys.stderr, flush=True)
    row |= {"images_per_s": round(rates[1], 2), "bare_images_per_s": round(rates[0], 2)}
    record(arguments.out, row | {"of_bare": round(rates[1] / rates[0], 4)} | context())


if __name__ == "__main__":
    main()
