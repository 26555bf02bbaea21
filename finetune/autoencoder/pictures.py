"""Pictures for the first stage: image shards -> uint8 batches, with a part held out.

Decoded pictures stay in memory when they fit; otherwise each batch is decoded when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from finetune import UserError, rng
from finetune.data.order import Order
from finetune.data.shards import IMAGE_MEMBERS, ShardSet
from finetune.data.shards.images import PictureError, cut_out, decode_rgb


def decode(data: bytes, size: int | None) -> np.ndarray:
    """Picture file -> uint8 [H, W, 3], as `data-tools encode` sees it: upright, in sRGB, transparency over white.

    With `size` the shorter side is resized to it (Lanczos) and the centre is cropped to `size` x `size`.

    Raises:
        PictureError: the bytes are no picture.
    """
    if size is None:
        return np.asarray(decode_rgb(data))
    square = (size, size)
    image = decode_rgb(data, at_least=square)
    return np.asarray(cut_out(image, image.info["original_size"], square)[0])


class Pictures:
    """The pictures of a set of image shards, by bucket (height, width), in two parts: training and held out.

    Args:
        root: folder of image shards.
        size: pixels; makes one square bucket of all pictures. None keeps the shards' buckets.
        held_out: pictures to hold out, at most a tenth; which ones depends on `seed` alone.
        multiple: sides must be divisible by it (the autoencoder's downsampling factor).
        cache_bytes: keep all decoded pictures in memory when they need no more than this.

    Raises:
        UserError: no image shards, pictures of mixed sizes without `size`, sides not divisible by `multiple`.
    """

    def __init__(
        self,
        root: str,
        *,
        size: int | None,
        held_out: int,
        seed: int,
        multiple: int,
        cache_bytes: int,
        readers: int,
    ) -> None:
        self._shards = ShardSet.open(root, "images")
        self._size = size
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="decode")
        members = [member for member in self._shards.manifest.members if member in IMAGE_MEMBERS]
        if not members:
            raise UserError(f"{root}: no pictures in these shards, only {self._shards.manifest.members}")
        self._members = members
        total = len(self._shards)
        if not total:
            raise UserError(f"{root} is a set of no pictures; make it again with some")
        if size is not None:
            every = {(size, size): np.arange(total)}
        else:
            every = self._shards.buckets
            if any(shard.bucket is None for shard in self._shards.manifest.shards):
                raise UserError(f"{root}: the pictures differ in size; give data.size=..., in pixels")
        for height, width in every:
            if height % multiple or width % multiple:
                raise UserError(
                    f"pictures of {height}x{width} pixels do not divide by the model's factor {multiple}; "
                    f"give data.size={max(multiple, min(height, width) // multiple * multiple)}"
                )
        generator = np.random.Generator(np.random.Philox(rng.fold(seed, "held out pictures")))
        hidden = np.zeros(total, bool)
        hidden[generator.permutation(total)[: min(held_out, total // 10)]] = True
        self.buckets: list[tuple[int, int]] = []
        self.train_ids: list[np.ndarray] = []  # by bucket
        self.held_out_ids: list[np.ndarray] = []  # by bucket
        for bucket, ids in every.items():
            self.buckets.append(bucket)
            self.train_ids.append(ids[~hidden[ids]])
            self.held_out_ids.append(ids[hidden[ids]])
        decoded_bytes = sum(h * w * 3 * len(ids) for (h, w), ids in every.items())
        self.cached = decoded_bytes <= cache_bytes
        self._cache: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def shard_sizes(self) -> list[np.ndarray]:
        """Training pictures in each shard (int64), bucket by bucket, in the order of `train_ids`."""
        shards = len(self._shards.manifest.shards)
        starts = self._shards.starts
        return [
            np.bincount(np.searchsorted(starts, ids, side="right") - 1, minlength=shards) for ids in self.train_ids
        ]

    @property
    def sha256(self) -> str:
        """Of the shards' manifest."""
        return self._shards.manifest.sha256

    def never_trained(self, order: Order) -> str | None:
        """What to say of buckets that do not hold one global batch of `order`; None where all do."""
        small, named = order.never_drawn(self.buckets)
        if not small:
            return None
        return (
            f"{sum(small.values())} pictures are never trained on, in buckets smaller than a global batch of "
            f"{order.global_batch}: {named}; lower train.global_batch, or "
            "give data.size for one bucket of all"
        )

    def fill_cache(self, progress: Callable[[], object] = lambda: None) -> None:
        """Decode everything into memory if it fits (`cached`); `progress` is called once for each picture."""
        if not self.cached:
            return
        for bucket, (train, hidden) in enumerate(zip(self.train_ids, self.held_out_ids, strict=True)):
            ids = [int(i) for i in (*train, *hidden)]
            for sample_id, picture in zip(ids, self._pool.map(self._decode, ids), strict=True):
                self._cache[sample_id] = self._checked(picture, bucket, sample_id)
                progress()

    def read(self, bucket: int, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The pictures `ids` of one bucket: uint8 [B, H, W, 3].

        Raises:
            UserError: a picture is broken, or is not of its bucket's size.
        """
        wanted = [int(i) for i in ids]
        if self._cache:
            return np.stack([self._cache[i] for i in wanted])
        pictures = self._pool.map(self._decode, wanted)
        return np.stack([self._checked(p, bucket, i) for i, p in zip(wanted, pictures, strict=True)])

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._shards.close()

    def _decode(self, sample_id: int) -> np.ndarray:
        member = next(m for m in (*self._members, None) if m is None or self._shards.has_member(sample_id, m))
        if member is None:
            raise UserError(f"sample {self._shards.key(sample_id)} of {self._shards.root} has no picture")
        try:
            return decode(self._shards.read_member(sample_id, member), self._size)
        except PictureError as error:
            key = self._shards.key(sample_id)
            raise UserError(
                f"broken picture {key}.{member} in {self._shards.root} ({error}); "
                "`data-tools verify` lists every broken sample"
            ) from None

    def _checked(self, picture: np.ndarray, bucket: int, sample_id: int) -> np.ndarray:
        if picture.shape[:2] != self.buckets[bucket]:
            says, found = ("x".join(map(str, size)) for size in (self.buckets[bucket], picture.shape[:2]))
            raise UserError(
                f"picture {self._shards.key(sample_id)} is {found} pixels, its shard says {says}; "
                "make the shards anew"
            )
        return picture
