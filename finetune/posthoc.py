"""Averages of any length, made afterwards of a run's snapshots.

    RUN/snapshots/step-00001000/
        power-0.05/  power-0.1/     averages by power functions of time, as in a checkpoint's ema-power-0.05/
        trainer.json                clock, what each average is, latent space, sha256 of each file

Snapshots are float32. The shares that they are summed with have both signs and may be above 1, which multiplies
what was rounded; and a fine-tuning moves many weights by less than float16's spacing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from finetune import UserError, first_line
from finetune.ema import LARGEST_SIGMA_REL, gamma_of
from finetune.runs import Checkpoint, Weights, complete_in, find_checkpoint

SNAPSHOTS = "snapshots"
LARGEST_RESIDUAL = 0.1
_POSTHOC = "sigma_rel="  # before the length, in `Weights`
_LENGTHS = np.arange(0.01, LARGEST_SIGMA_REL, 0.005)  # that a refusal looks at, to name what can be had
_NOTHING = 1e-10  # a smaller share is lost in float32
_MADE = ".made-"  # what folders of averages in the making are called
_JUST_NOW_SECONDS = 60.0


@dataclass(frozen=True)
class Profile:
    """How much an average counts the weights of each moment: (gamma + 1) t^gamma / T^(gamma + 1) up to images T."""

    images: float
    gamma: float


@dataclass(frozen=True)
class Fit:
    """A sum of profiles near a wanted one.

    Attributes:
        shares: of each profile, 1 together.
        residual: norm of the difference over the norm of the wanted profile.
    """

    shares: tuple[float, ...]
    residual: float


@dataclass(frozen=True)
class Snapshot:
    """One average of one snapshot."""

    folder: Path
    step: int
    images_seen: int
    sigma_rel: float
    since_images: int

    @property
    def profile(self) -> Profile:
        return Profile(self.images_seen, gamma_of(self.sigma_rel))


@dataclass(frozen=True)
class Made:
    """An average that was made: the snapshot whose clock it has, its weights' folder, how near it came."""

    snapshot: Path
    step: int
    weights: Path
    fit: Fit


def inner_product(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles (Karras et al. 2024, arXiv 2312.02696, appendix C.2)."""
    short, long = sorted((one, other), key=lambda profile: profile.images)
    scale = (short.gamma + 1) * (long.gamma + 1) / (short.gamma + long.gamma + 1)
    return scale * (short.images / long.images) ** long.gamma / long.images


def fit(kept: Sequence[Profile], wanted: Profile) -> Fit:
    """The sum of kept profiles that comes nearest to a wanted one, by least squares (as `inner_product`).

    Beyond the paper the shares add up to 1. Fine-tuned weights are a large constant and a small change: a sum to
    0.99 would take a hundredth of the constant away, often more than the change. As the constant then plays no
    part, the error is at most residual times |wanted|_2 times the norm of the weights' way from any fixed point.
    """
    unit = wanted.images  # images as shares of the run: numbers near 1
    kept = [Profile(profile.images / unit, profile.gamma) for profile in kept]
    wanted = Profile(1.0, wanted.gamma)
    count = len(kept)
    products = np.array([[inner_product(one, other) for other in kept] for one in kept])
    aims = np.array([inner_product(profile, wanted) for profile in kept])
    # The minimum under the constraint, with its multiplier as the last unknown.
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = products, 0.0
    shares = np.linalg.lstsq(system, np.append(aims, 1.0), rcond=1e-14)[0][:count]
    norm = inner_product(wanted, wanted)
    squared = norm - 2 * aims @ shares + shares @ products @ shares
    return Fit(tuple(map(float, shares)), math.sqrt(max(float(squared), 0.0) / norm))


def complete_snapshots(run: str | Path) -> dict[int, Path]:
    """A run's snapshots by rising step, see `complete_in`."""
    return complete_in(Path(run) / SNAPSHOTS)


def read_snapshots(run: str | Path, step: int | None = None) -> list[Snapshot]:
    """The averages from which one at a step can be made, of it and of all before.

    Args:
        step: of a snapshot; the last one by default.

    Raises:
        UserError: there is no snapshot, none of this step, or one that can't be read.
    """
    complete = complete_snapshots(run)
    if not complete:
        raise UserError(
            f"{run} has no snapshots to make an average of: train with ema=power ema.snapshot_every=STEPS, or take "
            "one of its averages with --weights"
        )
    last = max(complete) if step is None else step
    if last not in complete:
        raise UserError(f"{run} has no snapshot of step {step}; there are {', '.join(map(str, complete))}")
    found = [one for at, path in complete.items() if at <= last for one in _read(path)]
    # An average that was switched on later took the weights before for constant: to sum it up with others would mix
    # two pasts. Those of the longest past at the wanted step are taken.
    since = min((one.since_images for one in found if one.step == last), default=0)
    return [one for one in found if one.since_images == since]


def lengths(kept: Sequence[Snapshot]) -> list[tuple[float, float]]:
    """(sigma_rel, residual) of averages at the last snapshot, for lengths all over what there may be."""
    profiles = [one.profile for one in kept]
    images = max(profile.images for profile in profiles)
    return [(float(length), fit(profiles, Profile(images, gamma_of(length))).residual) for length in _LENGTHS]


@contextlib.contextmanager
def chosen_checkpoint(run: Path, step: int | None = None, weights: Weights = "ema") -> Iterator[Checkpoint]:
    """As `find_checkpoint`, for averages that are made of snapshots too: their files are gone after the context."""
    if not weights.startswith(_POSTHOC):
        yield find_checkpoint(run, step, weights)
        return
    with made_afterwards(run, float(weights.removeprefix(_POSTHOC)), step) as made:
        notice = f"{weights} is made of snapshots up to step {made.step}, off by {made.fit.residual:.1%}"
        yield Checkpoint(made.snapshot, made.step, made.weights, (notice,))


@contextlib.contextmanager
def made_afterwards(run: str | Path, sigma_rel: float, step: int | None = None) -> Iterator[Made]:
    """The average of a length at a snapshot, in a temporary folder that holds as long as the context.

    Memory holds five times the largest tensor; the folder takes as much of the disk as the weights.

    Raises:
        UserError: there are no snapshots, or none that make this length well.
    """
    kept = read_snapshots(run, step)
    last = kept[-1]
    found = fit([one.profile for one in kept], Profile(last.images_seen, gamma_of(sigma_rel)))
    if found.residual > LARGEST_RESIDUAL:
        good = [length for length, residual in lengths(kept) if residual <= LARGEST_RESIDUAL]
        can = f"take {good[0]:.3g} to {good[-1]:.3g}" if good else "--weights has those that were kept"
        number = len({one.step for one in kept})
        raise UserError(
            f"{run}: the snapshots up to step {last.step} ({number}) make no average of sigma_rel {sigma_rel:g}: "
            f"the nearest is off by {found.residual:.0%}, more than {LARGEST_RESIDUAL:.0%}; {can}"
        )
    root = Path(run) / SNAPSHOTS
    place = root if os.access(root, os.W_OK) else None
    if place is not None:
        _remove_stale(place)
    with (
        tempfile.TemporaryDirectory(prefix=_MADE, dir=place, ignore_cleanup_errors=True) as folder,
        _locked(Path(folder)),
    ):
        parts = [(one.folder, share) for one, share in zip(kept, found.shares, strict=True)]
        counted = [part for part in parts[:-1] if abs(part[1]) > _NOTHING]
        combine([*counted, parts[-1]], Path(folder))
        yield Made(last.folder.parent, last.step, Path(folder), found)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, until the process ends at the latest; whether it could be had."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # another process's, or a disk without locks
            held = False
        yield held
    finally:
        os.close(descriptor)


def _remove_stale(place: Path) -> None:
    """Remove the folders of processes that were killed. One that was made just now may not be locked yet."""
    for folder in place.glob(f"{_MADE}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _JUST_NOW_SECONDS:
                with _locked(folder) as held:
                    if held:
                        shutil.rmtree(folder, ignore_errors=True)


def combine(parts: Sequence[tuple[Path, float]], out: Path) -> None:
    """Write the sum of folders of weights, each times its share, in the form of the last one.

    Raises:
        UserError: a file is missing or broken, or is of another model.
    """
    form = parts[-1][0]
    for path in sorted(path for path in form.rglob("*") if path.is_file()):
        name = path.relative_to(form)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _combine_files([(folder / name, share) for folder, share in parts], out / name)
        else:
            shutil.copyfile(path, out / name)


def _combine_files(parts: Sequence[tuple[Path, float]], out: Path) -> None:
    form = parts[-1][0]
    path = form
    try:
        with contextlib.ExitStack() as stack, out.open("wb") as target:
            header, entries = _header(form)
            target.write(header)
            files = []
            for path, share in parts:
                files.append((path, share, stack.enter_context(safe_open(path, framework="pt"))))
            # Buffers for the largest tensor, used again: ones of each size would leave holes of hundreds of MiB.
            largest = max((math.prod(entry["shape"]) for _, entry in entries), default=0)
            sums, addend = (torch.empty(largest, dtype=torch.float64) for _ in range(2))
            rounded = torch.empty(largest)
            for key, entry in entries:
                count = math.prod(entry["shape"])
                total = sums[:count].zero_()
                for path, share, file in files:  # noqa: B007 # an error names the file
                    tensor = file.get_tensor(key)
                    if list(tensor.shape) != entry["shape"]:
                        raise ValueError(f"{key} is {list(tensor.shape)}, in the last one {entry['shape']}")
                    total.add_(addend[:count].copy_(tensor.view(-1)), alpha=share)
                target.write(rounded[:count].copy_(total).numpy().data)
    except (SafetensorError, RuntimeError, KeyError, ValueError, FileNotFoundError) as error:
        raise UserError(
            f"{path} cannot be added to the other snapshots ({first_line(error)}); remove its snapshot's folder"
        ) from error


def _header(path: Path) -> tuple[bytes, list[tuple[str, dict[str, Any]]]]:
    """A safetensors file up to its data, and its tensors in their order: all float32, without gaps."""
    with path.open("rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
    entries = [item for item in json.loads(text).items() if item[0] != "__metadata__"]
    if any(entry["dtype"] != "F32" for _, entry in entries):
        raise ValueError("it is not float32")
    return length + text, sorted(entries, key=lambda item: item[1]["data_offsets"])


def _read(path: Path) -> list[Snapshot]:
    try:
        record = json.loads((path / "trainer.json").read_text())
        return [
            Snapshot(
                path / name, int(record["step"]), int(record["images_seen"]), it["sigma_rel"], it["since_images"]
            )
            for name, it in sorted(record["averages"].items())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'trainer.json'} cannot be read: {first_line(error)}; remove that folder"
        ) from error
