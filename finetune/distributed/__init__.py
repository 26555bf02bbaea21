"""Where a run runs: its processes, and how weights, gradients and moments are spread over them.

world           the processes: who is who, agreement, what ranks tell each other
control         what all ranks must act on in the same step
signals         being asked to stop
watch           which rank is lost, so that the others end in bounded time
optimizers      which there are, what each remembers
strategy        what a strategy is (`Shard`s, steps, gathers), and data parallelism
graphs          a micro-batch's passes as one CUDA graph
copies          weights that are cast once a step
zero            ZeRO's stages: DeepSpeed's pieces and steps
reduction       their gradients, reduced while the backward pass goes on
gathering       stage 3's weights, whole while they are computed with
files           what is offloaded, in files
"""

from finetune.distributed.control import Control, Facts
from finetune.distributed.optimizers import KINDS, MOMENTS, NEED_WHOLE, ORDERED, OptimizerSettings, ParamGroup
from finetune.distributed.signals import StopRequest
from finetune.distributed.strategy import DataParallel, Shard, Source, StepStats, Strategy, Wanted
from finetune.distributed.watch import LONG, Bounds, Watch
from finetune.distributed.world import World, require_agreement, start, stop
from finetune.distributed.zero import ZeRO

__all__ = [
    "KINDS",
    "LONG",
    "MOMENTS",
    "NEED_WHOLE",
    "ORDERED",
    "Bounds",
    "Control",
    "DataParallel",
    "Facts",
    "OptimizerSettings",
    "ParamGroup",
    "Shard",
    "Source",
    "StepStats",
    "StopRequest",
    "Strategy",
    "Wanted",
    "Watch",
    "World",
    "ZeRO",
    "require_agreement",
    "start",
    "stop",
]
