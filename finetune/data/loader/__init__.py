"""Order and shards made into batches, read ahead by threads, from any position.

A rank takes its contiguous share of each global batch and cuts it into micro-batches. What a sample is given (its
clock, its caption) depends on its place in the global batch alone, so any number of ranks and any accumulation
train on the same thing.

samples         which are trained on, which are held out
reading         one batch
readers         `Data`, and the threads that read it ahead
"""

from finetune.data.loader.readers import Data, Loader
from finetune.data.loader.reading import Wanted, read_batch, shrink
from finetune.data.loader.samples import Samples, hold_out, largest_bucket

__all__ = [
    "Data",
    "Loader",
    "Samples",
    "Wanted",
    "hold_out",
    "largest_bucket",
    "read_batch",
    "shrink",
]
