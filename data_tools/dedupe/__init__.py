"""Find exact and near duplicates in sets of image shards, and list them for `encode` to leave out.

SHARDS are folders that `data-tools ingest` made, or folders of WebDataset tars. Pictures are compared across all
of them. Each set gets SHARDS/duplicates.jsonl, one object a line for each picture to leave out: its "key", the key
of the picture that is kept in its place ("duplicate_of", with "set" if that is in another of the sets), the
"distance" of the two, and whether they are the same to the pixel ("exact"). `encode` honours the list; nothing is
deleted, and a new run replaces the list. Its first line says of which pictures it is ("pictures", "sets"): `encode`
refuses the list once SHARDS, or a set whose pictures stand for some of them, holds others.

Of duplicates the picture with the most pixels is kept; of those the first, in the order of the sets and shards.
A picture is left out only if it is near one that is kept, so a chain of slightly different pictures doesn't vanish.

Exact duplicates have the same pixels, upright and over white. Near ones have 256-bit perceptual hashes (phash, of
the grey picture) that differ in at most --distance bits, and in none of 8 x 8 cells of the picture do their
colours differ by more than --colour levels of 255: a red heart is not a blue heart. Measured with --colour 8 on
1,200 different emoji of 64 pixels (the hardest kind: flat, alike, on white) and 200 synthetic pictures of 256
pixels with the spectrum of photographs, and on altered copies of both:

  --distance                             4         8        10        12        16
  emoji taken for copies, of 719,400     0         0         0         0         0  pairs
    by the hash without the colours      2         9        14        23        40
  copies found, per cent of emoji / photograph-like:
    JPEG, quality 90                87/100    98/100    99/100   100/100   100/100
    JPEG, quality 50                36/ 99    72/100    82/100    89/100    95/100
    WebP, quality 50                23/100    57/100    67/100    77/100    88/100
    twice the size                  96/100    99/100   100/100   100/100   100/100
    half the size                   79/100    98/100    99/100    99/100   100/100
    half the size, JPEG 70           1/100     6/100     7/100    10/100    14/100
    5 % brighter                    41/ 57    61/ 57    64/ 57    65/ 57    65/ 57
    10 % more saturated             95/100    99/100    99/100    99/100    99/100
    one pixel cropped on each side   0/ 20     0/ 71     0/ 92     0/ 97     0/100
    grey (not a duplicate)           2/  0     2/  0     2/  0     2/  0     2/  0

So mirrored pictures, crops of more than half a per cent a side, and pictures with other colours stay. Look at
--report before you widen the distance.

Each picture is decoded once: what is known of it (about 300 bytes) is kept in SHARDS/.dedupe, so an interrupted run
goes on where it was, and another --distance takes no decoding. That folder may be deleted. Sorting needs about 50
bytes of memory a picture, and 2 GB beside, and as much disk as .dedupe for the time of the run.

examples:
  data-tools dedupe shards/photos
  data-tools dedupe shards/photos shards/scraped --distance 6 --dry-run --report pairs.png
"""

from data_tools.dedupe.command import add_arguments, run

__all__ = ["add_arguments", "run"]
