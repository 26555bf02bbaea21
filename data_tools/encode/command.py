"""The arguments of `encode`, and its course."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from data_tools.arguments import (
    add_device_argument,
    add_shard_arguments,
    add_workers_argument,
    default_workers,
    natural,
    probability,
    side,
)
from data_tools.encode import assemble
from data_tools.encode.buckets import aspect_step, candidates, choose_buckets, merge_small
from data_tools.encode.degrade import DEGRADATIONS
from data_tools.encode.encoder import Batch, Encoded, Encoder, Running, TextCache, make_fast, stack
from data_tools.encode.excluded import Excluded
from data_tools.encode.parts import PartWriter, Tally
from data_tools.encode.prepare import Filtered, Prepared, Recipe, measure, prepare
from data_tools.encode.work import Claimed, Work, join
from data_tools.filters import Filters, add_filter_arguments
from data_tools.images import parse_colour
from data_tools.labels import LEAST_OF_A_BOX
from data_tools.output import JOB, REJECTS, SOURCE, refuse_sources
from data_tools.pictures import Picture, PictureSource
from data_tools.tars import Unreadable
from data_tools.workers import CrashError, Workers
from finetune import UserError, first_line
from finetune.data.shards import (
    EMPTY_TEXT,
    HOLE,
    LATENT,
    LOWRES,
    MAP,
    MASK,
    MASKED,
    TEXT,
    Bucket,
    EncoderInfo,
    LatentStats,
    Manifest,
    ShardError,
    json_bytes,
    latent_bytes,
    set_folder,
    write_atomic,
    write_classes,
)
from finetune.data.shards.files import npy_bytes
from finetune.data.shards.images import PictureError
from finetune.terminal import nonempty, positive

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
RULES = ("sd", "sdxl", "data")
_SIZES, _TABLE, _PARTS, _PLAN, _SHARDS, _FINISH = range(6)  # phases
_BATCHES_AHEAD = 3  # of the encoder, and of the writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools encode`."""
    parser.add_argument("shards", type=set_folder, metavar="SHARDS", help="image shards, or WebDataset tars")
    parser.add_argument(
        "--vae",
        type=nonempty,
        required=True,
        metavar="MODEL",
        help="folder or hub id of a VAE or pipeline; none: latents are the pixels themselves, for models of pixels",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="LATENTS", help="folder for the latent shards")
    parser.add_argument(
        "--text-encoder",
        type=nonempty,
        metavar="MODEL",
        help="keep the captions' states by this text encoder too (folder or hub id of a Stable Diffusion pipeline)",
    )
    parser.add_argument(
        "--caption",
        metavar="TEXT",
        type=_caption,
        default="{}",
        help='rewrite captions, {} is what each was: "{}, fluent emoji style" (a trigger word, a style)',
    )
    sizes = parser.add_argument_group("sizes and crops")
    sizes.add_argument(
        "--size", type=side, metavar="N", help="side of the square in pixels (default: the pictures' own size)"
    )
    sizes.add_argument(
        "--aspect-buckets",
        nargs="?",
        choices=RULES,
        const="sd",
        metavar="RULE",
        help="keep aspects, in buckets of about N x N pixels: sd (sides up to 2:1, the default), sdxl (SDXL's "
        "table, up to 4:1), or data (those that crop the pictures least; reads all sizes first)",
    )
    sizes.add_argument(
        "--bucket-step", type=positive, default=64, metavar="N", help="sides are multiples of it (default: 64)"
    )
    sizes.add_argument(
        "--max-buckets", type=positive, default=12, metavar="N", help="of --aspect-buckets data (default: 12)"
    )
    sizes.add_argument(
        "--min-bucket",
        type=natural,
        default=0,
        metavar="N",
        help="pictures of buckets with fewer than N go to the nearest other bucket (reads all sizes first)",
    )
    sizes.add_argument(
        "--crop", choices=("center", "random"), default="center", help="where to crop (default: center)"
    )
    sizes.add_argument(
        "--flip",
        type=probability,
        default=0.0,
        metavar="P",
        help="mirror a picture with probability P (default: 0)",
    )
    sizes.add_argument("--seed", type=int, default=0, metavar="N", help="of random crops and flips (default: 0)")
    more = parser.add_argument_group("for more than text", "What is made of each picture for other tasks.")
    more.add_argument(
        "--min-box",
        type=probability,
        default=LEAST_OF_A_BOX,
        metavar="SHARE",
        help=f"leave out boxes of which less is inside the crop (default: {LEAST_OF_A_BOX})",
    )
    more.add_argument(
        "--holes",
        type=natural,
        default=0,
        metavar="K",
        help="for inpainting: draw K holes for each picture, and encode it with each of them too (default: 0)",
    )
    more.add_argument(
        "--full-holes",
        type=probability,
        default=0.0,
        metavar="P",
        help="let a hole be the whole picture with probability P (default: 0; Stable Diffusion: 0.25)",
    )
    more.add_argument(
        "--lowres",
        type=positive,
        metavar="F",
        help="for super-resolution: keep each crop at 1/F of its size too",
    )
    more.add_argument(
        "--degradation",
        choices=DEGRADATIONS,
        default="bicubic",
        help="how it is made small: bicubic, or blind: random blurs, resizing, noise and JPEG, as BSRGAN's "
        "(default: bicubic)",
    )
    parser.add_argument("--exclude", type=Path, metavar="FILE", help="keys to leave out: one a line, or JSON lines")
    parser.add_argument(
        "--keep-duplicates", action="store_true", help="don't leave out what SHARDS/duplicates.jsonl lists"
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="pictures at a time (default: 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the VAE (default: float32)")
    parser.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on GPUs from Ampere on: kernels of our own for the VAE (default: yes)",
    )
    add_device_argument(parser)
    add_workers_argument(parser)
    add_shard_arguments(parser, "LATENTS")
    add_filter_arguments(parser)


def _caption(text: str) -> str:
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no place for the caption; put {{}} where it goes")
    return text


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher started. One that was started alone is 0 of 1."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def find(cls) -> Place:
        """From what torchrun, accelerate and srun leave in the environment."""

        def number(*names: str, default: int) -> int:
            texts = (os.environ.get(name, "").partition("(")[0].partition(",")[0] for name in names)
            return next((int(text) for text in texts if text.isdigit()), default)

        return cls(
            number("RANK", "SLURM_PROCID", default=0),
            number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1),
            number("LOCAL_RANK", "SLURM_LOCALID", default=0),
            number("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", default=1),
        )


def choose_device(name: str) -> torch.device:
    """The torch device of --device; `auto` is this process's GPU among those of its machine. A GPU becomes current.

    Raises:
        UserError: no such device here.
    """
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", Place.find().local_rank % torch.cuda.device_count())
    else:
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"--device {name} can't be used here ({first_line(error)}); try --device auto"
            ) from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and Triton's kernels go to the current one, whatever tensors say
    return device


def run(args: argparse.Namespace) -> int:
    """Run `data-tools encode`."""
    place = Place.find()
    if args.overwrite and place.world > 1:
        raise UserError(f"--overwrite is for one process, not {place.world}; delete {args.out} and start again")
    refuse_sources(args.out, [args.shards])
    filters = Filters.from_args(args)
    background = parse_colour(args.background)
    source = PictureSource.open(args.shards)
    excluded = Excluded.load(source, args.exclude, args.keep_duplicates)
    if args.full_holes and not args.holes:
        raise UserError(f"--full-holes {args.full_holes:g} needs holes; give --holes")
    classes = source.shards.classes() if source.shards is not None else []

    import torch

    from finetune.models.autoencoder import encoder_info, load_autoencoder
    from finetune.models.single_file import open_file
    from finetune.models.sources import fetch_file

    device = choose_device(args.device)
    torch.backends.cudnn.benchmark = False  # it picks kernels by their speed, so bits may differ from run to run
    torch.backends.cudnn.deterministic = True
    vae = load_autoencoder(args.vae, dtype=getattr(torch, args.dtype), device=device)
    info = encoder_info(vae, args.vae, args.out)
    if place.rank == 0 and (file := fetch_file(args.vae)) is not None and not open_file(file).says_scale:
        print(
            f"{args.vae} does not say its latents' scale: {info.scale:g} is taken, as Stable Diffusion 1.x and 2.x "
            "have it; for another model give that model as --vae",
            file=sys.stderr,
        )
    if args.fast and (missing := make_fast(vae)) and place.rank == 0:
        print(f"--fast needs {missing}, which is not here: the VAE runs as diffusers wrote it", file=sys.stderr)
    fixed = bucket_table(source, args.size, args.aspect_buckets, args.bucket_step, info.downsample)
    if args.lowres and (wrong := [bucket for bucket in fixed if any(side % args.lowres for side in bucket)]):
        shape = f"{wrong[0][0]}x{wrong[0][1]}"
        raise UserError(f"--lowres {args.lowres} does not divide pictures of {shape}; take a factor that does")
    text = TextCache(args.text_encoder, device, args.out) if args.text_encoder else None
    job: dict[str, Any] = {
        "pictures": source.identity(),
        "vae": asdict(info),
        "dtype": args.dtype,
        "size": args.size,
        "aspect-buckets": args.aspect_buckets,
        "bucket-step": args.bucket_step,
        "max-buckets": args.max_buckets if args.aspect_buckets == "data" else None,
        "min-bucket": args.min_bucket,
        "crop": args.crop,
        "flip": args.flip,
        "seed": args.seed,
        "batch": args.batch,
        "background": list(background),
        "shard-samples": args.shard_samples,
        "filters": filters.describe(),
        "excluded": excluded.sha256,
        "text-encoder": asdict(text.info) if text else None,
    }
    # Only where they are given: sets that were made before these settings came are still the same sets.
    if args.min_box != LEAST_OF_A_BOX:
        job["min-box"] = args.min_box
    if args.holes:
        job |= {"holes": args.holes, "full-holes": args.full_holes}
    if args.lowres:
        job |= {"lowres": args.lowres, "degradation": args.degradation}
    if args.caption != "{}":
        job["caption"] = args.caption
    workers = default_workers(place.local_world) if args.workers is None else args.workers
    recipe = Recipe(
        (),
        background,
        filters,
        args.crop,
        args.flip,
        args.seed,
        min_box=args.min_box,
        holes=args.holes,
        full_holes=args.full_holes,
        step=info.downsample,
        lowres=args.lowres or 0,
        degradation=args.degradation,
        caption=args.caption,
    )
    with join(args.out, job, args.overwrite) as work:
        if work is None:
            if place.rank == 0:
                print(f"{args.out} is complete: it was made with these very settings")
            return 0
        encoder = Encoder(vae, args.vae, text)
        with Workers(workers) as pool:
            course = Course(
                work, source, excluded, recipe, args, pool, encoder, info, classes, quiet=place.rank != 0
            )
            try:
                course.run(fixed)
            except FileNotFoundError:
                # Another process has finished the set, and has tidied up what we were about to read.
                if not work.is_finished():
                    raise
    return 0


def bucket_table(
    source: PictureSource, size: int | None, rule: str | None, step: int, downsample: int
) -> list[Bucket]:
    """The (height, width) that pictures may get; of rule `data`, those to choose from.

    Raises:
        UserError: the size is missing, or doesn't suit the VAE.
    """
    if size is None and source.bucket is None:
        raise UserError(f"pictures in {source.root} are of several sizes; give --size")
    if size is None:
        assert source.bucket is not None
        if any(side % downsample for side in source.bucket):
            height, width = source.bucket
            raise UserError(
                f"pictures of {height}x{width} don't divide by {downsample}, the VAE's step; give --size"
            )
        if rule is not None:
            raise UserError("--aspect-buckets needs --size, whose square is the number of pixels")
        return [source.bucket]
    if size % downsample:
        near = max(round(size / downsample), 1) * downsample
        raise UserError(f"--size {size} does not divide by {downsample}, the VAE's step; take {near}")
    if rule is None:
        return [(size, size)]
    if step % downsample:
        raise UserError(f"--bucket-step {step} does not divide by {downsample}, the VAE's step")
    if not (table := candidates(rule, size, step)):
        raise UserError(f"--size {size} is too small for --bucket-step {step}; take a smaller step")
    return table


class _Unit:
    """A claimed unit on its way to its part."""

    def __init__(self, claimed: Claimed, part: PartWriter) -> None:
        from finetune.latents import RunningMoments

        self.claimed, self.part = claimed, part
        self.tally, self.moments = Tally(), RunningMoments()
        # Rejects of the writer: in a list of their own, so that their order is fixed.
        self.late: list[list[str]] = []

    def finish(self) -> None:
        """Leave it done, and let go of it."""
        with self.claimed:
            self.tally.rejects += self.late
            self.tally.moments = self.moments.state()
            self.part.finish(self.tally)

    def close(self) -> None:
        """Let go of it as it is; without `finish`, what it holds is nobody's."""
        self.part.close()
        self.claimed.scope.close()


def _close(units: set[_Unit]) -> None:
    for unit in units:
        unit.close()


_END: Any = object()  # what comes after the last batch


class Course:
    """The phases of an encoding, each shared with all other processes that work in the folder."""

    def __init__(
        self,
        work: Work,
        source: PictureSource,
        excluded: Excluded,
        recipe: Recipe,
        args: argparse.Namespace,
        pool: Workers,
        encoder: Encoder,
        info: EncoderInfo,
        classes: list[str],
        quiet: bool,
    ) -> None:
        self.work, self.source, self.excluded, self.recipe, self.args = work, source, excluded, recipe, args
        self.pool, self.encoder, self.info, self.quiet = pool, encoder, info, quiet
        self.classes = classes
        self.units = source.units()
        self.members = [LATENT, "json", *([TEXT] if encoder.text else [])]
        if source.shards is not None:
            self.members += [name for name in (MAP, MASK) if name in source.shards.manifest.members]
        self.members += [LOWRES] * bool(args.lowres) + [HOLE, MASKED] * bool(args.holes)
        self.table: list[Bucket] = []

    def run(self, fixed: list[Bucket]) -> None:
        """All phases, from wherever earlier processes have left them."""
        work, units = self.work, len(self.units)
        counted = self.args.aspect_buckets is not None and (
            self.args.aspect_buckets == "data" or self.args.min_bucket > 0
        )
        if counted:
            with self._bar("sizes") as (update, seen):
                work.share(_SIZES, units, work.marks("sizes"), lambda n: self._measure(n, update), seen)
        self._once(_TABLE, "table.json", lambda: work.publish("table.json", self._table(fixed, counted)))
        if work.is_finished():
            return
        self.table = [(height, width) for height, width in work.read("table.json")]
        with self._bar("pictures") as (update, seen):
            self._encode(work.claimed(_PARTS, units, work.marks("done"), seen), update)
        names = [unit.name for unit in self.units]
        self._once(
            _PLAN,
            "plan.json",
            lambda: assemble.make_plan(work, names, self.args.shard_samples, self._summarise),
        )
        if work.is_finished():
            return
        plan = assemble.load_plan(work)
        assemble.require_samples(work, plan, units, self.args.shards)
        with tqdm(total=len(plan.shards), desc="shards", unit="shard", disable=self.quiet or None) as bar:
            work.share(
                _SHARDS,
                len(plan.shards),
                work.marks("shards"),
                lambda n: assemble.write_one(work, plan, self.table, n),
                lambda done: _show(bar, len(done)),
            )
        work.share(_FINISH, 1, work.manifest, lambda _: self._finish(plan))

    def _once(self, phase: int, name: str, do: Callable[[], None]) -> None:
        self.work.share(phase, 1, self.work.mark(name), lambda _: do())

    @contextlib.contextmanager
    def _bar(self, what: str) -> Iterator[tuple[Callable[[int], None], Callable[[set[int]], None]]]:
        """A bar over all units: what this process does at once, what others do when a unit of theirs is done."""
        ours: set[int] = set()
        sizes = [unit.samples for unit in self.units]
        known = [size for size in sizes if size is not None]
        # Of foreign tars nobody knows how many pictures they hold before they are read: bytes stand for them.
        total = sum(known) if len(known) == len(sizes) else None
        here = 0
        with tqdm(total=total, desc=what, unit="picture", disable=self.quiet or None) as bar:

            def update(unit: int) -> None:
                nonlocal here
                ours.add(unit)
                here += 1
                bar.update()

            def seen(done: set[int]) -> None:
                others = sum(sizes[unit] or 0 for unit in done - ours)
                _show(bar, here + others)

            yield update, seen

    # phase 1: which aspects there are, and the table

    def _read(self, unit: int, excluded: Callable[[], None] = lambda: None) -> Iterator[Picture | Unreadable]:
        for item in self.source.read(unit):
            if isinstance(item, Picture) and item.key in self.excluded:
                excluded()
            else:
                yield item

    def _measure(self, unit: int, update: Callable[[int], None]) -> None:
        histogram: dict[int, int] = {}
        about = self.units[unit]
        if about.bucket and about.samples and not self.recipe.filters and not self.excluded:
            self.work.publish(f"sizes/{unit:05d}.json", [[aspect_step(*about.bucket), about.samples]])
            return
        steps = self.pool.map(
            functools.partial(measure, recipe=self.recipe), self._read(unit), catch=(CrashError,), name=_name
        )
        for _, step in steps:
            if isinstance(step, int):
                histogram[step] = histogram.get(step, 0) + 1
            update(unit)
        rows = [[step, histogram[step]] for step in sorted(histogram)]
        self.work.publish(f"sizes/{unit:05d}.json", rows)

    def _table(self, table: list[Bucket], counted: bool) -> list[Bucket]:
        if not counted:
            return sorted(table)
        histogram: dict[int, int] = {}
        for unit in range(len(self.units)):
            for step, count in self.work.read(f"sizes/{unit:05d}.json"):
                histogram[step] = histogram.get(step, 0) + count
        if self.args.aspect_buckets == "data":
            table = choose_buckets(table, histogram, self.args.max_buckets)
        return sorted(merge_small(table, histogram, self.args.min_bucket))

    # phase 2: the units' pictures to their parts

    def _encode(self, units: Iterator[Claimed | None], update: Callable[[int], None]) -> None:
        """Decode in worker processes, encode, and write, all at the same time, and from one unit into the next.

        Batches are formed within a unit, in its order: what is computed together never depends on who does it.
        """
        under_way: set[_Unit] = set()
        ended: list[_Unit] = []  # whose last batch may still be running
        with contextlib.ExitStack() as scope:
            scope.callback(_close, under_way)
            writer = scope.enter_context(ThreadPoolExecutor(1))
            reader = scope.enter_context(ThreadPoolExecutor(1))
            batches = self._batches(units, under_way, update)
            coming = deque(reader.submit(next, batches, _END) for _ in range(_BATCHES_AHEAD))
            scope.callback(lambda: [future.cancel() for future in coming])
            written: deque[Future[None]] = deque()
            running: tuple[_Unit, Running] | None = None

            def finish(unit: _Unit) -> None:
                unit.finish()
                under_way.discard(unit)

            while (came := coming.popleft().result()) != _END:
                coming.append(reader.submit(next, batches, _END))
                unit, batch = came
                following = None
                if batch is not None:
                    assert unit is not None
                    following = unit, self.encoder.start(batch)
                elif unit is not None:
                    ended.append(unit)
                    if running is not None:  # the GPU goes on with the next unit's first batch
                        continue
                if running is not None:  # one batch late, so that the GPU has the next one already
                    before = self.encoder.redone
                    results = self.encoder.finish(running[1])
                    running[0].tally.redone += self.encoder.redone - before
                    written.append(writer.submit(self._write, running[0], results))
                written += [writer.submit(finish, unit) for unit in ended]
                ended.clear()
                running = following
                while len(written) > (_BATCHES_AHEAD if running is not None else 0):
                    written.popleft().result()
            assert running is None and not ended

    def _batches(
        self, units: Iterator[Claimed | None], under_way: set[_Unit], update: Callable[[int], None]
    ) -> Iterator[tuple[_Unit | None, Batch | None]]:
        """Batches with their units; (unit, None) after its last one, (None, None) where there is none to be had.

        The last of all is (None, None): units are only done when what they left is written.
        """
        for claimed in units:
            if claimed is None:
                yield None, None
                continue
            unit = _Unit(claimed, PartWriter(self.work, claimed.number, self.table, self.members))
            under_way.add(unit)
            for batch in self._batches_of(unit, update):
                yield unit, batch
            yield unit, None

    def _batches_of(self, unit: _Unit, update: Callable[[int], None]) -> Iterator[Batch]:
        number, tally = unit.claimed.number, unit.tally
        recipe = dataclasses.replace(self.recipe, table=tuple(self.table))
        pin = self.encoder.on_gpu
        waiting: dict[Bucket, list[Prepared]] = {}

        def left_out() -> None:
            tally.excluded += 1
            tally.seen += 1
            update(number)

        work = self.pool.map(
            functools.partial(prepare, recipe=recipe),
            self._read(number, left_out),
            ahead=4 * self.pool.count + self.args.batch,
            catch=(PictureError, CrashError),
            name=_name,
        )
        for item, result in work:
            update(number)
            tally.seen += 1
            match result:
                case Prepared():
                    batch = waiting.setdefault(result.bucket, [])
                    batch.append(result)
                    if len(batch) == self.args.batch:
                        yield stack(result.bucket, waiting.pop(result.bucket), pin)
                case Filtered(reason):
                    tally.filtered[reason] = tally.filtered.get(reason, 0) + 1
                case Unreadable(where, reason):
                    tally.rejects.append([where, reason])
                case PictureError() | CrashError():
                    tally.rejects.append([_name(item), str(result)])
        for bucket in sorted(waiting):
            yield stack(bucket, waiting[bucket], pin)

    def _write(self, unit: _Unit, results: list[Encoded]) -> None:
        tally, kept = unit.tally, []
        for result in results:
            sample = result.sample
            if result.moments is None:
                unit.late.append([sample.key, "latents are not finite, even in float32"])
                continue
            members = {LATENT: latent_bytes(result.moments), "json": json_bytes(sample.record)}
            if result.states is not None:
                members[TEXT] = result.states
            members |= sample.extra
            if result.masked is not None:
                members[MASKED] = npy_bytes(result.masked)
            try:
                number = str(unit.part.write(sample.key, members, sample.bucket))
            except ShardError as error:
                unit.late.append([sample.key, str(error)])
                continue
            kept.append(result.moments)
            tally.enlarged += sample.enlarged
            tally.boxes += sample.boxes[0]
            tally.boxes_lost += sample.boxes[1]
            tally.crop_loss[number] = tally.crop_loss.get(number, 0.0) + sample.crop_loss
        if kept:
            unit.moments.add(np.stack(kept))

    # phase 3: the set

    def _summarise(self, states: list[dict[str, Any]]) -> list[Any]:
        from finetune.latents import LatentSpace, RunningMoments

        moments = RunningMoments()
        for state in states:
            moments.merge(state)
        if moments.count == 0:
            return []
        return list(moments.summary(LatentSpace(self.info.scale, self.info.shift)))

    def _finish(self, plan: assemble.Plan) -> None:
        work, out = self.work, self.work.out
        assemble.write_rejects(work, plan, len(self.units))
        if (self.args.shards / SOURCE).is_file():  # whose pictures they are, and under which licence
            write_atomic(out / SOURCE, (self.args.shards / SOURCE).read_bytes())
        if self.encoder.text is not None:
            write_atomic(out / EMPTY_TEXT, self.encoder.text.empty())
        write_atomic(out / JOB, (work.root / "job.json").read_bytes())
        shards = assemble.load_shards(work, plan)
        stats = LatentStats(*plan.latents)
        text = self.encoder.text.info if self.encoder.text is not None else None
        classes = write_classes(out, self.classes) if self.classes else None
        manifest = Manifest("latents", self.members, shards, self.info, stats, text, classes=classes)
        lines = list(_report(plan, self.table, stats, self.args))
        manifest.save(out)
        work.remove()
        print("\n".join(lines), flush=True)


def _report(
    plan: assemble.Plan, table: list[Bucket], stats: LatentStats, args: argparse.Namespace
) -> Iterator[str]:
    if len(plan.buckets) > 1:
        yield "height x width    samples   cropped away"
        for number, samples in sorted(plan.buckets.items(), key=lambda item: int(item[0])):
            height, width = table[int(number)]
            yield f"{height:>6} x {width:<6} {samples:>9,}   {plan.crop_loss.get(number, 0.0):>11.1%}"
    if plan.redone:
        yield f"{plan.redone} pictures overflowed in {args.dtype} and were redone in float32"
    if plan.enlarged:
        yield f"{plan.enlarged} pictures are smaller than their bucket and were enlarged"
    if plan.boxes_lost:
        less = f"less than {args.min_box:.0%} of each is in the crop"
        yield f"{plan.boxes_lost} of {plan.boxes + plan.boxes_lost} boxes were left out: {less}"
    for reason, count in plan.filtered.items():
        yield f"{count} pictures were left out by a filter: {reason}"
    if plan.excluded:
        yield f"{plan.excluded} pictures were left out as duplicates or by --exclude"
    aside = plan.rejects + len(plan.repeats)
    end = f"; {aside} set aside, listed in {args.out / REJECTS}" if aside else ""
    what = f"{plan.samples} latents, mean {stats.mean:+.3f}, std {stats.std:.3f}, in {len(plan.buckets)} buckets"
    yield f"{what}, in {args.out}{end}"


def _show(bar: Any, value: int) -> None:
    if value > bar.n:
        bar.update(value - bar.n)


def _name(item: Picture | Unreadable) -> str:
    return item.key if isinstance(item, Picture) else item.where
