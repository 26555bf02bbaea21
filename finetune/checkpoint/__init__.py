"""Everything that a run is, on disk: its folder, the lock on it, and atomic checkpoints written beside training.

    RUN/checkpoints/step-00001000/
        weights/    ema/        what was trained, float32, in the diffusers layout; further averages are ema-NAME/
        optimizer/              a file for each of its moments, by parameter name: exp_avg, exp_avg_sq
        trainer.json            clock, what the run depends on, latent space, sha256 of each file; written last

Files hold whole float32 tensors by name and know nothing of ranks or strategies, so a checkpoint of any strategy
and number of ranks is read under any other. DeepSpeed's universal checkpoint needs a conversion between the two,
torch's distributed checkpoint a reader of its own; these are plain safetensors that diffusers, transformers and
every other tool open, and one way to write and read them serves all strategies.

A save is a snapshot and a write. For the snapshot each tensor has one rank that owns it and copies it to host
memory, page-locked on a GPU; training goes on meanwhile, up to the next update of the weights. Then each rank's
thread writes what it owns to its place in the common files, and rank 0 checks that they hold what all ranks meant,
sums them up in trainer.json and renames the temporary folder. A folder that fails its checksums is passed over on
resume.

progress        where a run stands
layout          which file and key a parameter has
contents        all tensors of a checkpoint, in one order
plan            where in a file each tensor lies, and who writes it: pure functions
host            host memory for snapshots
writing         one rank's thread, and its part of the files
record          trainer.json, checksums, publishing, pruning
snapshots       of averages, kept for later
restore         reading back what each rank needs
folder          the run's folder: the lock, and whether all ranks see it
checkpoints     saves and restores a run: what happens when
"""

from finetune.checkpoint.checkpoints import Checkpoints
from finetune.checkpoint.folder import RunFolder, held_folder, require_shared
from finetune.checkpoint.layout import Layout
from finetune.checkpoint.progress import Progress
from finetune.checkpoint.record import (
    find_fault,
    followed,
    newest_whole,
    prune,
    publish,
    require_same,
    write_record,
)

__all__ = [
    "Checkpoints",
    "Layout",
    "Progress",
    "RunFolder",
    "find_fault",
    "followed",
    "held_folder",
    "newest_whole",
    "prune",
    "publish",
    "require_same",
    "require_shared",
    "write_record",
]
