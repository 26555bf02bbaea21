"""`tests/strategies/driver.py` with U-Nets made fast as on GPUs, by what a CPU has.

torchrun --nproc_per_node N tests/models/fast/driver.py JOBS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from finetune.models import fast
from tests.strategies.driver import drive

if __name__ == "__main__":
    original = torch.compile
    torch.compile = lambda f, **settings: original(f, backend="aot_eager", fullgraph=True, **settings)
    fast.available, fast.missing = lambda device: True, lambda: None
    fast.blocks.kernels = None
    code = drive(json.loads(Path(sys.argv[1]).read_text()))
    if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        sys.exit("nothing was compiled")
    sys.exit(code)
