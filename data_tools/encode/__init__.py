"""Encode image shards to latent shards: the VAE's mean and deviation of each, computed once.

SHARDS is a folder that `data-tools ingest` made, or any folder of WebDataset tars (pictures with .txt or
.json). Each picture is resized to cover its bucket and cropped. The bucket is the square of --size, by default
the pictures' own size if they share one, or with --aspect-buckets the one of nearest aspect from a table of
shapes with about size x size pixels. A latent shard keeps the mean and standard deviation of the posterior,
float16, unscaled, and a record {"captions", "original_size": [h, w], "crop": [top, left, h, w], "flipped"} for
each sample. The crop is in pixels of the resized picture, mirrored if "flipped" is true. Boxes (see `ingest
coco`) become fractions of the crop, those of which too little is left are left out, and label maps and loss
masks are resized, mirrored and cropped as their picture is; other places in a record stay those of the picture
as it came in. Pictures that can't be decoded are listed in LATENTS/rejects.jsonl and the rest goes on.

--holes and --lowres derive what inpainting and super-resolution need. A hole is of strokes or boxes, as LaMa
has them, and covers 5 to 50 % of the picture: hole.npy has it at the latents' size, masked.npy the latents of
the picture with the hole filled with mid-grey. lowres.png is the crop made small.

It may be killed at any moment: the same command goes on, and comes to the same bytes. Any number of processes
on any number of machines that share the folder work together, each on shards of its own, under torchrun,
accelerate launch or srun, or just by the same command given again. --workers, --device, --fast and the number of
processes don't matter to the result (but for the last bits where machines compute differently); all other
settings must be the same. While it works the disk holds the latents once, and a shard more for each process.

examples:
  data-tools encode shards/photos --vae models/vae --out latents/photos
  data-tools encode shards/photos --vae stabilityai/sdxl-vae --size 1024 --aspect-buckets sdxl \\
      --dtype bfloat16 --out latents/photos
  data-tools encode shards/icons --vae none --size 64 --out pixels/icons
  data-tools encode shards/photos --vae models/vae --size 512 --holes 2 --full-holes 0.25 --out latents/holes
  data-tools encode shards/photos --vae models/vae --size 512 --lowres 4 --degradation blind --out latents/small
  torchrun --nproc-per-node 8 -m data_tools encode shards/photos --vae models/vae --size 512 --out latents/photos
  srun data-tools encode shards/photos --vae models/vae --size 512 --out latents/photos
"""

from data_tools.encode.command import run
from data_tools.encode.options import add_arguments

__all__ = ["add_arguments", "run"]
