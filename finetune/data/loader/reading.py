"""One batch, read."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from finetune import UserError, rng
from finetune.batch import Batch, Sample, picture, stack
from finetune.data.loader.samples import Samples
from finetune.data.shards import MASK, TEXT, Bucket, ShardSet

_KEPT_BUFFERS = 16
_DRAWS = 4096  # drawn at a time: one call for each batch would cost more than reading it


@dataclass(frozen=True)
class Wanted:
    """What is read of each sample beside its moments and captions.

    Attributes:
        read: a sample's condition as arrays (see `Conditioner.read`), called by the readers; members: what it needs
            beside the record.
        text_states: the drawn captions' states.
        loss_masks: `mask.png`, where the loss counts; a sample without one counts as a whole.
        loss_weights: how much a sample counts, by source.
    """

    read: Callable[[Sample], dict[str, np.ndarray]] | None = None
    members: tuple[str, ...] = ()
    text_states: bool = False
    loss_masks: bool = False
    loss_weights: tuple[float, ...] = ()


def read_batch(
    sources: Sequence[Samples],
    chosen: np.ndarray,
    sample_ids: np.ndarray,
    bucket: Bucket,
    clock: np.ndarray,
    seed: int,
    *,
    wanted: Wanted = Wanted(),
    pin: bool = False,
) -> Batch:
    """Read samples into one batch (see `Batch`).

    Args:
        chosen: [B] each sample's source; sample_ids: [B]; clock: [B].
        seed: of the captions drawn, and of what the condition draws.
        wanted: what is read beside moments and captions.
        pin: in page-locked memory.

    Raises:
        ShardError: naming what can't be read.
        UserError: a sample, which it names, does not have what the condition needs.
    """
    manifest = sources[0].shards.manifest
    encoder = manifest.encoder
    assert encoder is not None
    here = _Chosen(sources, chosen, sample_ids)
    count = len(sample_ids)
    shape = (count, 2 * encoder.channels, bucket[0] // encoder.downsample, bucket[1] // encoder.downsample)
    moments = _BUFFERS.take(shape, pin)
    records = here.read(moments.numpy())
    samples = [Sample(record, bucket, clock=int(clock[place]), seed=seed) for place, record in enumerate(records)]
    captions = [sample.captions for sample in samples]
    draws = _caption_draws(seed, clock)
    drawn = [int(draw * len(several)) for draw, several in zip(draws, captions, strict=True)]

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if pin else tensor

    states = None
    if wanted.text_states:
        assert manifest.text is not None
        size = (count, manifest.text.length, manifest.text.width)
        states = torch.empty(size, dtype=torch.float16, pin_memory=pin)
        for place, out in enumerate(states.numpy()):
            here.read_states(place, drawn[place], len(captions[place]), out)
    condition = {}
    if wanted.read is not None:
        condition = stack([here.condition(place, sample, wanted) for place, sample in enumerate(samples)])
    loss_weight = None
    if any(weight != 1 for weight in wanted.loss_weights):
        loss_weight = pinned(torch.tensor(wanted.loss_weights, dtype=torch.float32)[torch.from_numpy(chosen)])
    loss_mask = None
    if wanted.loss_masks:
        masks = np.stack([here.loss_mask(place, shape[2:]) for place in range(count)])
        loss_mask = pinned(torch.from_numpy(masks[:, None]))
    return Batch(
        moments,
        [str(several[index]) for several, index in zip(captions, drawn, strict=True)],
        pinned(torch.from_numpy(clock)),
        torch.from_numpy(sample_ids),
        bucket,
        states,
        {name: pinned(tensor) for name, tensor in condition.items()},
        loss_weight,
        loss_mask,
    )


class _Chosen:
    """The samples of a batch, by their places in it (see `read_batch`)."""

    def __init__(self, sources: Sequence[Samples], chosen: np.ndarray, sample_ids: np.ndarray) -> None:
        self._sources, self._chosen, self._ids = sources, chosen, sample_ids

    def read(self, out: np.ndarray) -> list[dict[str, Any]]:
        """Moments into the rows of `out`; returns the records."""
        records: list[dict[str, Any]] = [{}] * len(self._ids)
        for number in np.unique(self._chosen).tolist():
            source, places = self._sources[number], np.flatnonzero(self._chosen == number)
            read = source.shards.read_samples(self._ids[places] - source.first_id, out, places)
            for place, record in zip(places.tolist(), read, strict=True):
                records[place] = record
        return records

    def read_states(self, place: int, caption: int, captions: int, out: np.ndarray) -> None:
        """The text encoder's states of one of a sample's captions, into `out` [length, width]."""
        shards, sample_id = self._at(place)
        shards.read_row(sample_id, TEXT, caption, captions, out)

    def condition(self, place: int, sample: Sample, wanted: Wanted) -> dict[str, np.ndarray]:
        """What the model is conditioned on, beside captions."""
        assert wanted.read is not None
        shards, sample_id = self._at(place)
        full = replace(sample, members={name: shards.read_member(sample_id, name) for name in wanted.members})
        with self._naming(place):
            return wanted.read(full)

    def loss_mask(self, place: int, cells: tuple[int, ...]) -> np.ndarray:
        """Where the loss counts, by latent cell: float32 [h, w]."""
        shards, sample_id = self._at(place)
        if not shards.has_member(sample_id, MASK):
            return np.ones(cells, np.float32)
        data = shards.read_member(sample_id, MASK)
        with self._naming(place):
            return shrink(picture(data, "L", MASK), cells)

    def _at(self, place: int) -> tuple[ShardSet, int]:
        source = self._sources[self._chosen[place]]
        return source.shards, int(self._ids[place] - source.first_id)

    @contextmanager
    def _naming(self, place: int) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            shards, sample_id = self._at(place)
            raise UserError(f"{shards.root}: sample {shards.key(sample_id)}: {error}") from None


def shrink(mask_HW: np.ndarray, cells: tuple[int, ...]) -> np.ndarray:
    """A loss mask (uint8) as the share of each latent cell that counts: float32 [h, w] in [0, 1].

    Raises:
        UserError: its size is no multiple of the latents'.
    """
    height, width = mask_HW.shape
    if height % cells[0] or width % cells[1]:
        raise UserError(
            f"{MASK} of {height}x{width} px does not fit latents of {cells[0]}x{cells[1]}: encode again"
        )
    blocks = mask_HW.reshape(cells[0], height // cells[0], cells[1], width // cells[1])
    return blocks.mean(axis=(1, 3), dtype=np.float32) / np.float32(255)


def _caption_draws(seed: int, clock: np.ndarray) -> list[float]:
    """Uniform in [0, 1) for each clock (int64 [B])."""
    blocks = np.unique(clock // _DRAWS).tolist()
    draws = np.concatenate([_draw_block(seed, block) for block in blocks])
    return draws[np.searchsorted(blocks, clock // _DRAWS) * _DRAWS + clock % _DRAWS].tolist()


@lru_cache(16)
def _draw_block(seed: int, block: int) -> np.ndarray:
    ids = torch.arange(block * _DRAWS, (block + 1) * _DRAWS)
    return rng.uniform(seed, "caption", ids).numpy()


class _Buffers:
    """Memory of moments, used again once its last view is gone: fresh pages cost more than the copy into them."""

    def __init__(self) -> None:
        self._arrays: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], pin: bool) -> torch.Tensor:
        """A float16 tensor of any content."""
        if pin:  # torch keeps page-locked memory in a pool of its own
            return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        count = math.prod(shape)
        size = 1 << (count - 1).bit_length()  # buckets of nearly one size share; pages not used cost nothing
        with self._lock:
            arrays = self._arrays.setdefault(size, [])
            # A tensor holds its array for as long as any view shares its storage; the rest is this list, this
            # name and the call's argument.
            array = next((each for each in arrays if sys.getrefcount(each) <= _UNUSED), None)
            if array is None:
                array = np.empty(size, np.float16)
                if len(arrays) < _KEPT_BUFFERS:
                    arrays.append(array)
            return torch.from_numpy(array)[:count].view(shape)


def _references() -> int:
    """What `sys.getrefcount` says in `_Buffers.take` of an array without tensors; releases of Python differ."""
    arrays = [np.empty(1)]
    return next(sys.getrefcount(each) for each in arrays)


_UNUSED = _references()
_BUFFERS = _Buffers()
