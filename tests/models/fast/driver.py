"""`tests/strategies/driver.py` with U-Nets made fast as on GPUs, by torch's own operations.

torchrun --nproc_per_node N tests/models/fast/driver.py JOBS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from finetune.models import fast
from tests.strategies.driver import drive

if __name__ == "__main__":
    made, original = [], fast.make_fast
    fast.available, fast.missing = lambda device: True, lambda: None
    fast.make_fast = lambda unet: made.append(0) or original(unet)
    fast.blocks.kernels = None
    code = drive(json.loads(Path(sys.argv[1]).read_text()))
    if not made:
        sys.exit("nothing was made fast")
    sys.exit(code)
