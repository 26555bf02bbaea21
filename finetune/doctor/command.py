"""The `finetune doctor` command; what is heavy to import stays out of the way to `--help`."""

from __future__ import annotations

import os

from finetune import UserError
from finetune.config import Config, compose
from finetune.terminal import quiet_libraries, require_settings, speak_in_turn

USAGE = """\
usage: finetune doctor [KEY=VALUE ...]

Look, in about a minute, at whether `finetune train` with the same settings will run here: agreement of all ranks,
equal weights, distinct data, the learning rate, save and resume in run.dir, bandwidth, memory, versions.
Start it as the run will be started. It makes two real steps, and leaves nothing behind.

examples:
  finetune doctor experiment=smoke data.shards=LATENTS run.dir=runs/smoke
  torchrun --nproc-per-node 8 -m finetune.doctor experiment=sd15_full strategy=zero2 data.shards=LATENTS run.dir=RUN
  accelerate launch --config_file launchers/accelerate/one_machine.yaml -m finetune.doctor strategy=zero2 ...
  python -m launchers.slurm nodes=4 gpus=8 --doctor -- experiment=sd15_full data.shards=LATENTS run.dir=RUN

It prints a row for each check: ok, warn, FAIL or skipped, what was seen, and what to do. Exit codes: 0 when nothing
failed, 1 when something did, 2 for a mistake in the settings. `finetune train --help` lists the settings.

options:
  -h, --help    this text
"""


def main(argv: list[str]) -> int:
    """Examine this launch; returns the exit code.

    Raises:
        UserError: a mistake in the settings, or a run folder that is in use.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return 0
    return speak_in_turn(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    require_settings(argv, "finetune doctor")
    config, composed = compose("train", argv, Config)
    quiet_libraries()
    from finetune.doctor import examine

    return examine.run(config, composed, rank, size)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"{name}={text} in the environment is no number: start with torchrun or accelerate launch")
    return int(text)
