"""The on-disk format of a data set: tar shards, a manifest, and an index of member offsets.

    ROOT/00000.tar          samples, one after another: KEY.json, KEY.latent.npy, ... (POSIX ustar)
    ROOT/00000.index.npy    int64 [samples, members, 2]: where each member's bytes lie in the tar
    ROOT/manifest.json      what the shards are; written last, so a folder without it is unfinished

The tars are plain: `webdataset` and `datasets` read them unaided. The index gives any sample in one `pread`.
A latent sample is `KEY.latent.npy` (float16 [2C, h, w]: posterior mean, then standard deviation, unscaled)
and `KEY.json`; an image sample is `KEY.jpg|png|webp` with `KEY.json` or `KEY.txt`. Any other member is
optional; `labels` says which there are, and where classes and boxes stand.

Sample ids 0..N-1 number the samples in the order of the manifest's shards. A shard holds one aspect bucket.
A set may lie elsewhere (`s3://`, `gs://`, `https://`, `pipe:`): its shards are then copied, as they are needed,
into a bounded folder that the processes of a machine share.

This package knows no torch, nor pictures but for `images`, and needs a POSIX system (`pread`).

    files       names, .npy bytes, files that are whole or absent
    store       URLs and pipes: files from elsewhere, tried again when they break
    streams     their bytes as they come, by each kind of library
    failures    what a failed try means
    forks       what is made anew in a forked child
    cache       copies of remote shards on this machine, bounded, fetched ahead of need
    labels      classes, boxes, maps, masks: their names and forms
    images      a picture's bytes -> upright 8-bit RGB, cut to a bucket
    manifest    what a folder of shards holds
    writer      samples -> shards
    tars        those of a set that are open
    reader      sample ids -> samples, at random
    verify      is a set what its manifest says?
"""

from finetune.data.shards.cache import Cache
from finetune.data.shards.files import (
    EMPTY_TEXT,
    IMAGE_MEMBERS,
    LATENT,
    MANIFEST,
    TEXT,
    ShardError,
    index_name,
    json_bytes,
    latent_bytes,
    parse_npy,
    write_atomic,
)
from finetune.data.shards.labels import (
    CLASSES,
    HOLE,
    LOWRES,
    MAP,
    MASK,
    MASKED,
    UNLABELLED,
    parse_boxes,
    parse_classes,
    write_classes,
)
from finetune.data.shards.manifest import (
    FORMAT_VERSION,
    NO_ENCODER,
    Bucket,
    EncoderInfo,
    Kind,
    LatentStats,
    Manifest,
    ShardInfo,
    TextInfo,
)
from finetune.data.shards.reader import ShardSet
from finetune.data.shards.store import Retry, Store, is_remote, set_folder, shown
from finetune.data.shards.tars import most_open
from finetune.data.shards.verify import Problem, verify
from finetune.data.shards.writer import ShardWriter

__all__ = [
    "CLASSES",
    "EMPTY_TEXT",
    "FORMAT_VERSION",
    "HOLE",
    "IMAGE_MEMBERS",
    "LATENT",
    "LOWRES",
    "MANIFEST",
    "MAP",
    "MASK",
    "MASKED",
    "NO_ENCODER",
    "TEXT",
    "UNLABELLED",
    "Bucket",
    "Cache",
    "EncoderInfo",
    "Kind",
    "LatentStats",
    "Manifest",
    "Problem",
    "Retry",
    "ShardError",
    "ShardInfo",
    "ShardSet",
    "ShardWriter",
    "Store",
    "TextInfo",
    "index_name",
    "is_remote",
    "json_bytes",
    "latent_bytes",
    "most_open",
    "parse_boxes",
    "parse_classes",
    "parse_npy",
    "set_folder",
    "shown",
    "verify",
    "write_atomic",
    "write_classes",
]
