"""`python -m launchers.torchrun`."""

import sys

from finetune import run_cli
from launchers.torchrun.command import main

if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
