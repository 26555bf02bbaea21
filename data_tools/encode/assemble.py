"""From parts to shards: who goes where is planned once, then the shards are copied together by all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.encode.parts import Part, bin_name, folder_of, read_runs
from data_tools.encode.work import Work
from data_tools.rejects import Rejects
from finetune import UserError
from finetune.data.shards import Bucket, ShardInfo
from finetune.data.shards.writer import write_shard

SHARD_BYTES = 1 << 30
_KEYS_AT_A_TIME = 1 << 26  # hashes that are compared at a time: 512 MiB, twice


@dataclass
class Plan:
    """The shards to be. `runs` are (unit, first row, end) in the shard's bucket of the unit's part."""

    shards: list[dict[str, Any]]  # bucket (its number), samples, runs
    samples: int
    seen: int
    excluded: int
    redone: int
    enlarged: int
    filtered: dict[str, int]
    rejects: int
    repeats: list[list[str]] = field(default_factory=list)  # rejects found by planning
    buckets: dict[str, int] = field(default_factory=dict)
    crop_loss: dict[str, float] = field(default_factory=dict)  # mean of all that were encoded
    latents: list[Any] = field(default_factory=list)  # `RunningMoments.summary`
    boxes: int = 0
    boxes_lost: int = 0


def shard_name(number: int) -> str:
    """The name of a shard."""
    return f"{number:05d}.tar"


def make_plan(
    work: Work, units: Sequence[str], max_samples: int, summarise: Callable[[list[dict[str, Any]]], list[Any]]
) -> None:
    """Decide which samples make up which shard, and publish it.

    Shards are numbered by bucket; each takes a bucket's samples in the order of the units, up to `max_samples` or
    `SHARD_BYTES`. A key that was in an earlier unit is set aside.

    Args:
        summarise: the units' statistics to those of the set; [] where there are no samples.
    """
    parts: list[Part] = []
    total = Plan([], 0, 0, 0, 0, 0, {}, 0)
    for unit in range(len(units)):
        parts.append(Part.load(work, unit))
        tally = parts[-1].tally
        total.seen += tally.seen
        total.excluded += tally.excluded
        total.redone += tally.redone
        total.enlarged += tally.enlarged
        total.boxes += tally.boxes
        total.boxes_lost += tally.boxes_lost
        total.rejects += len(tally.rejects)
        tally.rejects = []  # there may be as many as pictures; they are listed from their files
        for reason, count in tally.filtered.items():
            total.filtered[reason] = total.filtered.get(reason, 0) + count
        for bucket, loss in tally.crop_loss.items():
            total.crop_loss[bucket] = total.crop_loss.get(bucket, 0.0) + loss
    for bucket in total.crop_loss:
        total.crop_loss[bucket] /= sum(part.tally.buckets.get(bucket, 0) for part in parts)
    dropped = _repeats(parts, units, total)
    for number in sorted({int(bucket) for part in parts for bucket in part.tally.buckets}):
        start = len(total.shards)
        total.shards += _cut(parts, number, max_samples, dropped)
        total.buckets[str(number)] = sum(shard["samples"] for shard in total.shards[start:])
    total.samples = sum(total.buckets.values())
    gone: dict[int, dict[int, list[int]]] = {}
    for (unit, bucket_number), rows in dropped.items():
        gone.setdefault(unit, {})[bucket_number] = rows
    total.latents = summarise([_moments_without(part, gone.get(unit, {})) for unit, part in enumerate(parts)])
    total.filtered = dict(sorted(total.filtered.items()))
    work.publish("plan.json", asdict(total))


def _moments_without(part: Part, gone: dict[int, list[int]]) -> dict[str, Any]:
    """The statistics of a part's latents, but for some rows by bucket."""
    if not gone:
        return part.tally.moments
    from finetune.latents import RunningMoments

    moments = RunningMoments()
    for bucket in map(int, part.tally.buckets):
        for latents_B2Chw in part.latents(bucket, set(gone.get(bucket, ()))):
            moments.add(latents_B2Chw)
    return moments.state()


def _cut(
    parts: list[Part], bucket: int, max_samples: int, dropped: dict[tuple[int, int], list[int]]
) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = []
    room_samples = room_bytes = 0
    for unit, part in enumerate(parts):
        if str(bucket) not in part.tally.buckets:
            continue
        lengths = part.rows(bucket)[:, 1]
        gone = dropped.get((unit, bucket), [])
        for first, end in _between(len(lengths), gone):
            row = first
            while row < end:
                if room_samples <= 0 or room_bytes <= 0:
                    shards.append({"bucket": bucket, "samples": 0, "runs": []})
                    room_samples, room_bytes = max_samples, SHARD_BYTES
                ends = np.cumsum(lengths[row : min(end, row + room_samples)])
                count = min(int(np.searchsorted(ends, room_bytes)) + 1, len(ends))
                shards[-1]["runs"].append([unit, row, row + count])
                shards[-1]["samples"] += count
                room_samples -= count
                room_bytes -= int(ends[count - 1])
                row += count
    return shards


def _between(count: int, gone: list[int]) -> Iterator[tuple[int, int]]:
    """The stretches of 0..count-1 without `gone`, which is sorted."""
    first = 0
    for row in [*gone, count]:
        if row > first:
            yield first, row
        first = row + 1


def _repeats(parts: list[Part], units: Sequence[str], plan: Plan) -> dict[tuple[int, int], list[int]]:
    """Rows by (unit, bucket) whose key was in an earlier unit: hashes first, and only suspects by their name.

    Keys within a unit differ: who writes a part sees to that.
    """
    total = sum(sum(part.tally.buckets.values()) for part in parts)
    passes = -(-total // _KEYS_AT_A_TIME)
    suspects: list[np.ndarray] = []
    for number in range(passes):  # each looks at the hashes with one remainder, so memory is bounded
        some = [keys[keys % np.uint64(passes) == number] for keys in (part.keys() for part in parts)]
        values = np.concatenate(some)
        del some
        values.sort()
        suspects.append(np.unique(values[1:][values[1:] == values[:-1]]))
    dropped: dict[tuple[int, int], list[int]] = {}
    if not any(map(len, suspects)):
        return dropped
    sought = np.concatenate(suspects)
    first: dict[str, int] = {}
    for unit, part in enumerate(parts):
        for position in np.flatnonzero(np.isin(part.keys(), sought)).tolist():
            bucket, row = part.place(position)
            key = part.key(bucket, row)
            if key in first:
                dropped.setdefault((unit, bucket), []).append(row)
                where = units[first[key]]
                plan.repeats.append([key, f"the key in {units[unit]} is also in {where}; keys must differ"])
            first.setdefault(key, unit)
    return dropped


def write_one(work: Work, plan: Plan, table: Sequence[Bucket], number: int) -> None:
    """Copy one shard together, publish it, and delete what of the parts no other shard needs."""
    shard = plan.shards[number]
    bucket = shard["bucket"]

    def runs() -> Iterator[tuple[bytes, np.ndarray]]:
        for unit, first, end in shard["runs"]:
            part = Part.load(work, unit)
            yield from read_runs(part.folder, part.rows(bucket)[first:end], bucket)

    info = write_shard(work.out, shard_name(number), table[bucket], runs())
    work.publish(f"shards/{number:05d}.json", asdict(info))
    done = work.marks("shards")
    waiting = {
        run[0] for other in _neighbours(plan, number) if other not in done for run in plan.shards[other]["runs"]
    }
    for unit in {run[0] for run in shard["runs"]} - waiting:
        (folder_of(work, unit) / bin_name(bucket)).unlink(missing_ok=True)


def _neighbours(plan: Plan, number: int) -> Iterator[int]:
    """The shards of the same bucket that share a unit with this one. Units ascend along a bucket's shards."""
    shard = plan.shards[number]
    for step, edge in ((-1, 0), (1, -1)):
        other = number + step
        unit = shard["runs"][edge][0]
        while 0 <= other < len(plan.shards) and plan.shards[other]["bucket"] == shard["bucket"]:
            if all(run[0] != unit for run in plan.shards[other]["runs"]):
                break
            yield other
            other += step


def load_plan(work: Work) -> Plan:
    """The published plan."""
    return Plan(**work.read("plan.json"))


def load_shards(work: Work, plan: Plan) -> list[ShardInfo]:
    """What was published of all shards, in their order."""
    rows = [work.read(f"shards/{number:05d}.json") for number in range(len(plan.shards))]
    return [ShardInfo(**{**row, "bucket": tuple(row["bucket"])}) for row in rows]


def write_rejects(work: Work, plan: Plan, units: int) -> None:
    """rejects.jsonl, one object a line (file, reason), in the order of the units; none if nothing was set aside."""
    with Rejects(work.out) as rejects:
        for where, reason in _rejects(work, plan, units):
            rejects.add(where, reason)
        rejects.save()
    if not rejects:
        rejects.path.unlink(missing_ok=True)


def require_samples(work: Work, plan: Plan, units: int, source: Path) -> None:
    """Refuse to finish an empty set.

    Raises:
        UserError: there are no samples; says what became of the pictures.
    """
    if plan.samples:
        return
    with contextlib.suppress(StopIteration):
        where, reason = next(_rejects(work, plan, units))
        raise UserError(f"none of {plan.seen} pictures in {source} can be used; the first, {where}: {reason}")
    if plan.filtered:
        reason, count = max(plan.filtered.items(), key=lambda item: item[1])
        raise UserError(f"none of {plan.seen} pictures in {source} passes the filters ({count}: {reason})")
    if plan.excluded:
        raise UserError(f"all of {plan.seen} pictures in {source} are excluded")
    raise UserError(f"no pictures in {source}; nothing was written")


def _rejects(work: Work, plan: Plan, units: int) -> Iterator[list[str]]:
    for unit in range(units):
        yield from Part.load(work, unit).tally.rejects
    yield from plan.repeats
