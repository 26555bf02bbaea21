"""`python -m launchers.slurm`."""

import sys

from finetune import run_cli
from launchers.slurm.command import main

if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
