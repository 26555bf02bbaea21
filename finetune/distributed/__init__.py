"""Where a run runs: its processes, and how weights, gradients and moments are spread over them.

world           the processes: who is who, agreement, what ranks tell each other
control         what all ranks must act on in the same step
signals         being asked to stop
watch           which rank is lost, so that the others end in bounded time
optimizers      which there are, what each remembers
strategy        what a strategy is: `Shard`s, steps, gathers
data_parallel   whole weights on each rank
zero            ZeRO's stages: DeepSpeed's pieces and steps
reduction       gradients, reduced while the backward pass goes on
renewal         of stages 1 and 2: updated weights, sent beside the next forward pass
graphs          a micro-batch's passes as one CUDA graph
copies          of data parallelism: weights that are cast once a step
gathering       of stage 3: weights, whole while they are computed with
files           of stage 3: what is offloaded, in files
"""

from finetune.distributed.control import Control, Facts
from finetune.distributed.data_parallel import DataParallel
from finetune.distributed.optimizers import KINDS, MOMENTS, NEED_WHOLE, ORDERED, OptimizerSettings, ParamGroup
from finetune.distributed.signals import StopRequest
from finetune.distributed.strategy import Shard, Source, StepStats, Strategy, Wanted
from finetune.distributed.watch import LONG, Bounds, Watch
from finetune.distributed.world import World, joined, require_agreement, start, stop
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
    "joined",
    "require_agreement",
    "start",
    "stop",
]
