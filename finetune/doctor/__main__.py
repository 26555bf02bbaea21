"""`python -m finetune.doctor`, for torchrun, accelerate launch and srun."""

import sys

from finetune import run_cli
from finetune.doctor.command import main

if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
