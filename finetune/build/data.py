"""Config to data: which sets of shards, how they are mixed, and what of them is not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from finetune import UserError
from finetune.batch import Batch, Sample
from finetune.conditioning import Conditioner
from finetune.conditioning.text import Text
from finetune.config import Config, data_sources
from finetune.data.loader import Data, Samples, Wanted, hold_out, read_batch
from finetune.data.order import Order, Source
from finetune.data.shards import EMPTY_TEXT, MASK, TEXT, Cache, ShardSet, is_remote, most_open, parse_npy
from finetune.latents import LatentSpace
from finetune.models.text import text_encoder_sha256
from finetune.rng import fold


def open_data(config: Config, held_out_batch: int) -> Data:
    """Open the shards, fix the order of their samples, and read held-out ones in batches of `held_out_batch`.

    Raises:
        UserError: no latent shards there, sets that don't go together, or too few samples.
    """
    named = sources_of(config)
    cache = None
    if remote := sum(is_remote(each.root) for each in named.values()):
        gib = config.data.cache_gib
        cache = Cache(config.data.cache_dir, None if gib is None else int(gib * 2**30), sets=remote)
    most = most_open(len(named))
    opened = {name: _open_latents(each.root, cache, most) for name, each in named.items()}
    first, *others = opened
    for name in others:
        _check_same_encoder(first, opened[first], name, opened[name])
    sizes = [shards.bucket_sizes for shards in opened.values()]
    buckets = sorted(set().union(*sizes))
    held = hold_out([each.get(bucket, 0) for each in sizes for bucket in buckets], config.validation.samples)
    sources: list[Samples] = []
    for shards in opened.values():
        mine, held = held[: len(buckets)], held[len(buckets) :]
        sources.append(Samples(shards, buckets, mine, first_id=sum(len(each.shards) for each in sources)))
    order = Order(
        [Source(each.sizes, given.weight) for each, given in zip(sources, named.values(), strict=True)],
        seed=fold(config.seed, "order"),
        global_batch=config.train.global_batch,
        shuffle=config.data.shuffle,
        lanes=config.data.lanes,
        window=config.data.shuffle_window,
    )
    encoder = opened[first].manifest.encoder
    assert encoder is not None
    wanted = Wanted(
        loss_masks=config.data.loss_masks, loss_weights=tuple(each.loss_weight for each in named.values())
    )
    data = Data(sources, buckets, order, [], LatentSpace(encoder.scale, encoder.shift), wanted)
    if config.data.loss_masks and not any(MASK in source.shards.manifest.members for source in sources):
        raise _lacking(", ".join(str(source.shards.root) for source in sources), MASK, "data.loss_masks=true")
    return replace(data, held_out=_held_out(data, held_out_batch))


def _held_out(data: Data, size: int) -> list[Batch]:
    """The samples held out, in batches of `size`; their ids are their clock."""
    held = [[each.held_out_ids(index) for index in range(len(data.buckets))] for each in data.sources]
    # Not by whole shards: each may lie in another, and all would be fetched before the first step.
    sources = [each.excerpt(np.concatenate(ids)) for each, ids in zip(data.sources, held, strict=True)]
    return [
        read_batch(
            sources,
            np.full(len(piece), number),
            piece,
            bucket,
            piece.astype(np.int64),
            seed=0,
            wanted=replace(data.wanted, text_states=False, loss_masks=False, loss_weights=()),
        )
        for number, by_bucket in enumerate(held)
        for bucket, ids in zip(data.buckets, by_bucket, strict=True)
        for piece in np.split(ids, range(size, len(ids), size))
        if len(piece)
    ]


def with_condition(data: Data, conditioner: Conditioner, config: Config, held_out_batch: int) -> Data:
    """The same data, whose batches bring what the conditioner reads.

    Raises:
        UserError: the shards do not have it.
    """
    if not conditioner.reads:
        return data
    _require_members(data, conditioner.members, f"task={config.task.name}")
    wanted = replace(data.wanted, read=conditioner.read, members=conditioner.members)
    made = replace(data, wanted=wanted)
    for source in data.sources:  # the first sample of each says whether the rest is worth opening
        record = source.shards.read(0)
        members = {name: record[name] for name in conditioner.members if name in record}
        bucket = source.shards.bucket_of(0) or data.buckets[0]
        try:
            conditioner.read(Sample(source.shards.read_json(0), bucket, members))
        except UserError as error:
            raise UserError(f"{source.shards.root}: {error}") from None
    return replace(made, held_out=_held_out(made, held_out_batch))


def _require_members(data: Data, members: Sequence[str], who: str) -> None:
    for source in data.sources:
        for name in members:
            if name not in source.shards.manifest.members:
                raise _lacking(str(source.shards.root), f"{name} of each sample", who)


def _lacking(where: str, what: str, who: str) -> UserError:
    return UserError(
        f"{who} needs {what} and {where} has none: make the shards again with it (`data-tools ingest --help`, "
        "`data-tools encode --help`)"
    )


def classes(data: Data) -> list[str]:
    """Names of the labels in the shards; empty where these name none.

    Raises:
        UserError: sources name them differently.
    """
    found: list[list[str]] = [source.shards.classes() for source in data.sources]
    for source, names in zip(data.sources, found, strict=True):
        if names != found[0]:
            raise UserError(
                f"{data.sources[0].shards.root} and {source.shards.root} name their classes differently: the "
                "labels of one would mean other things in the other"
            )
    return found[0]


@dataclass(frozen=True)
class _Given:
    """A source as configured: where, how often, and how much a sample's loss counts."""

    root: str
    weight: float = 1.0
    loss_weight: float = 1.0


def sources_of(config: Config) -> dict[str, _Given]:
    """The sources by name.

    Raises:
        UserError: there is none, or one is not as it should be.
    """
    if config.data.shards is not None and config.data.sources:
        raise UserError("data.shards and data.sources are both given: put the first among data.sources")
    found = data_sources(asdict(config.data))
    if not found:
        raise UserError("no data: give data.shards=FOLDER, or several as data.sources.NAME.shards=FOLDER")
    sources = {}
    for name, given in found.items():
        key = f"data.sources.{name}"
        if not isinstance(given, dict) or not isinstance(given.get("shards"), str) or not given["shards"].strip():
            raise UserError(f"no value for {key}.shards: give {key}.shards=FOLDER")
        if unknown := given.keys() - {"shards", "weight", "loss_weight"}:
            raise UserError(f"unknown key {key}.{min(unknown)}: a source has shards, weight and loss_weight")
        weights = [given.get(each, 1.0) for each in ("weight", "loss_weight")]
        for each, weight in zip(("weight", "loss_weight"), weights, strict=True):
            if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
                raise UserError(
                    f"{key}.{each}={weight} must be a number greater than 0; leave out what is not wanted"
                )
        sources[name] = _Given(given["shards"], *map(float, weights))
    return sources


def _open_latents(root: str, cache: Cache | None, max_open: int) -> ShardSet:
    shards = ShardSet.open(root, cache=cache, max_open=max_open)
    if shards.manifest.kind != "latents":
        raise UserError(
            f"{root} holds pictures, not latents: run "
            f"`data-tools encode {root} --vae MODEL --out LATENTS` and train on LATENTS"
        )
    return shards


def _check_same_encoder(first: str, one: ShardSet, name: str, other: ShardSet) -> None:
    """Refuse sets whose latents mean different things."""
    for field in ("sha256", "scale", "shift", "channels", "downsample"):
        said, differs = (getattr(shards.manifest.encoder, field) for shards in (one, other))
        if said != differs:
            short = [str(value)[:12] for value in (said, differs)]
            raise UserError(
                f"sources {first} and {name} are not of one autoencoder: {field} is {short[0]} and {short[1]}; "
                "encode both with the same VAE"
            )


def captions(data: Data) -> Iterator[str]:
    """All captions, source by source in the order of the manifests."""
    for source in data.sources:
        for sample_id in range(len(source.shards)):
            yield from Sample(source.shards.read_json(sample_id), (0, 0)).captions


def with_text_states(data: Data, text: Text, notices: list[str]) -> Data:
    """The same data, whose batches bring the states of their captions where all sources have those of `text`."""
    infos = [source.shards.manifest.text for source in data.sources]
    if not any(infos):
        return data
    if not text.cacheable:
        notices.append(
            "cached states of captions are not used: they are of one text encoder, this model has two; captions "
            "are encoded at each visit"
        )
        return data
    sha256 = text_encoder_sha256(text.encoder)  # type: ignore[arg-type]
    for source, info in zip(data.sources, infos, strict=True):
        if info is None or info.sha256 != sha256 or info.length != text.tokenizer.model_max_length:
            what = "has none" if info is None else f"has those of {info.source}"
            notices.append(
                f"cached states of captions are not used: {source.shards.root} {what}, "
                "not of this model's text encoder; captions are encoded at each visit"
            )
            return data
    shards = data.sources[0].shards
    empty_LD = parse_npy(shards.read_file(EMPTY_TEXT))
    info = infos[0]
    assert info is not None
    if empty_LD is None or empty_LD.dtype != np.float16 or empty_LD.shape != (info.length, info.width):
        raise UserError(
            f"{shards.root}/{EMPTY_TEXT} is no float16 array {[info.length, info.width]}; encode again, "
            "or give data.text_states=false"
        )
    known = {"": empty_LD}
    for sample_id in range(0 if shards.remote else min(16, len(shards))):  # the first caption, without a fetch
        caption = Sample(shards.read_json(sample_id), (0, 0)).captions[0]
        states_KLD = parse_npy(shards.read(sample_id).get(TEXT, b"")) if caption else None
        if states_KLD is not None and states_KLD.shape[1:] == empty_LD.shape:
            known[caption] = states_KLD[0]
            break
    if not all(_says(text, caption, states_LD) for caption, states_LD in known.items()):
        notices.append(
            f"cached states of captions are not used: {shards.root} has those of other tokens than this model's "
            "tokenizer makes; captions are encoded at each visit"
        )
        return data
    text.empty_states_LD = torch.from_numpy(empty_LD)
    return replace(data, wanted=replace(data.wanted, text_states=True))


def _says(text: Text, caption: str, states_LD: np.ndarray) -> bool:
    """Whether the encoder makes these float16 states of a caption, as near as devices agree."""
    with torch.no_grad():
        own_LD = text.encode(text.tokenize([caption]))[0].float()
    return float((torch.from_numpy(states_LD).float() - own_LD).norm()) <= 0.02 * float(own_LD.norm())


def left_out(data: Data, wanted: int, *, is_validated: bool) -> list[str]:
    """What is not trained on, or not in every epoch; whether fewer than `wanted` are held out, or for nothing."""
    notices = []
    held_out = sum(len(batch.captions) for batch in data.held_out)
    if held_out and not is_validated:  # what is trained on must not change with it
        notices.append(
            f"{held_out} samples are held out though validation.every=0: to train on them too, begin with "
            "validation.samples=0"
        )
    elif 0 < held_out < wanted:
        notices.append(f"{held_out} samples are held out, not {wanted}: a tenth of each bucket at most")
    order = data.order
    small, named = order.never_drawn(data.buckets)
    if small:
        notices.append(
            f"{sum(small.values())} samples are never trained on: {len(small)} buckets are smaller than a global "
            f"batch of {order.global_batch}: {named}; merge them with `data-tools encode --min-bucket`"
        )
    if rest := int(order.left_out.sum()) - sum(small.values()):
        notices.append(
            f"each epoch leaves out {rest} of {int(order.sizes.sum())} samples, others each time: "
            f"the rest of a bucket that fills no global batch of {order.global_batch}"
        )
    return notices


def fetched_again(data: Data, ranks: int) -> list[str]:
    """Whether the cache of remote shards is too small for those that are read by turns."""
    cache = next((source.shards.cache for source in data.sources if source.shards.cache is not None), None)
    if cache is None:
        return []
    nodes = max(1, ranks // cache.sharers)
    needed = count = 0.0
    for source, shards_K in zip(data.sources, data.order.shards_at_once(nodes).tolist(), strict=True):
        if source.shards.remote:
            infos = source.shards.manifest.shards
            for bucket, shards in zip(data.buckets, shards_K, strict=True):
                numbers = source.shards.bucket_shards(bucket).tolist()
                count += shards
                needed += shards * sum(infos[number].bytes for number in numbers) / max(1, len(numbers))
    if needed <= cache.max_bytes:
        return []
    return [
        f"each node reads about {count:.0f} remote shards by turns ({needed / 2**30:.1f} GiB) and the cache holds "
        f"{cache.max_bytes / 2**30:.1f} GiB: most will be fetched many times an epoch; raise data.cache_gib, or "
        f"lower data.lanes={data.order.lanes} to the most nodes that you will use, and data.shuffle_window"
    ]
