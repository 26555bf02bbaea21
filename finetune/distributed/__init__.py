"""Where a run runs: its processes, and how weights, gradients and moments are spread over them.

world           the processes: who is who, agreement, what ranks tell each other
strategy        what a strategy is (`Shard`s, steps, gathers), and data parallelism
zero            DeepSpeed's ZeRO stages
"""

from finetune.distributed.strategy import (
    MOMENTS,
    AdamW,
    DataParallel,
    ParamGroup,
    Shard,
    StepStats,
    Strategy,
)
from finetune.distributed.world import World, require_agreement, start, stop
from finetune.distributed.zero import ZeRO

__all__ = [
    "MOMENTS",
    "AdamW",
    "DataParallel",
    "ParamGroup",
    "Shard",
    "StepStats",
    "Strategy",
    "World",
    "ZeRO",
    "require_agreement",
    "start",
    "stop",
]
