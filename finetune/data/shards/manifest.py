"""What a folder of shards holds: `manifest.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from finetune.data.shards.files import MANIFEST, MEMBER, WORK, ShardError, write_atomic
from finetune.data.shards.labels import CLASSES
from finetune.data.shards.store import Root, Store, is_remote, resolve

FORMAT_VERSION = 1
NO_ENCODER = "none"  # the source of latents that are the pixels themselves

SHA256 = re.compile(r"[0-9a-f]{64}")
Kind = Literal["images", "latents"]
Bucket = tuple[int, int]
"""Height and width, in pixels."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard: `bucket` is every sample's (height, width) in pixels, None for pictures of mixed sizes."""

    name: str
    bucket: Bucket | None
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class EncoderInfo:
    """The autoencoder that made the latents.

    `source` is a path relative to the manifest's folder (it starts with a dot), a hub id, or "none"; `sha256` is of
    the encoder's weights; model latents are (z - shift) * scale; `pixel_range` is what the encoder was fed;
    `channels` is C (a member has 2C); `downsample` is pixels per latent cell.
    """

    source: str
    sha256: str
    scale: float
    shift: float
    dtype: str
    pixel_range: tuple[float, float]
    channels: int
    downsample: int

    def locate(self, root: str | os.PathLike[str]) -> str:
        """The folder of the autoencoder, for a manifest in `root`; a hub id is returned as it is.

        Raises:
            ShardError: it lies beside shards that are not on this machine.
        """
        if self.source == NO_ENCODER:
            return NO_ENCODER
        if is_remote(root):
            if self.source.startswith("."):
                raise ShardError(
                    f"the latents in {root} were made by {self.source} beside them, which is not here; give a copy "
                    "of that autoencoder, or its hub id (model.vae=... in training, --vae in data-tools)"
                )
            return self.source
        path = Path(root) / self.source
        return os.path.normpath(path) if self.source.startswith(".") or path.is_dir() else self.source


@dataclass(frozen=True)
class TextInfo:
    """The text encoder whose states are kept beside the latents, as `text.npy` members and `empty.text.npy`.

    `source` as in `EncoderInfo`; `sha256` is of the encoder's weights; states are float16 [captions, `length`,
    `width`], computed in `dtype`.
    """

    source: str
    sha256: str
    length: int
    width: int
    dtype: str


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of model latents, (mean + std*eps - shift) * scale, over all elements."""

    mean: float
    std: float
    channel_mean: list[float]
    channel_std: list[float]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    `members` names the columns of the index; `classes` is the sha256 of classes.json, None where there is none.
    """

    kind: Kind
    members: list[str]
    shards: list[ShardInfo]
    encoder: EncoderInfo | None = None
    latents: LatentStats | None = None
    text: TextInfo | None = None
    version: int = FORMAT_VERSION
    classes: str | None = None

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.bytes for shard in self.shards)

    @classmethod
    def load(cls, root: Root) -> Manifest:
        """Read ROOT/manifest.json; `root` is a folder, a URL, a `pipe:`, or a `Store`.

        Raises:
            ShardError: folder or manifest missing, not JSON, without a field it needs, or of another version.
            StoreAwayError: the store does not answer.
        """
        home = resolve(root)
        path = home.url(MANIFEST) if isinstance(home, Store) else home / MANIFEST
        text = _read_remote(home) if isinstance(home, Store) else _read_local(home)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{path} is not JSON ({error}); make the shards again") from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}; "
                "use the release that wrote it, or make the shards again"
            )
        try:
            return _manifest_from_json(data)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise ShardError(f"{path} is not a valid manifest: {what}; make the shards again") from None

    def to_json(self) -> str:
        """The content of manifest.json; equal for equal manifests."""
        data = dataclasses.asdict(dataclasses.replace(self, shards=[]))
        for optional in ("text", "classes"):
            if data[optional] is None:
                del data[optional]
        order = ("version", "kind", "members", "classes", "encoder", "latents", "text")
        lines = [f"  {json.dumps(key)}: {json.dumps(data[key])}," for key in order if key in data]
        lines += [f'  "samples": {self.samples},', f'  "bytes": {self.bytes},']
        # A line a shard: 10,000 stay legible.
        rows = ",\n".join("    " + json.dumps(vars(shard)) for shard in self.shards)
        lines += [f'  "shards": [\n{rows}\n  ]']
        return "{\n" + "\n".join(lines) + "\n}\n"

    @cached_property
    def sha256(self) -> str:
        """Of `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, root: str | os.PathLike[str]) -> None:
        """Write ROOT/manifest.json at once or not at all."""
        write_atomic(Path(root) / MANIFEST, self.to_json().encode())

    def require_encoder(self, sha256: str, source: str) -> None:
        """Refuse an autoencoder other than the one that made these latents.

        Raises:
            ShardError: these are no latents, or `sha256` (of the weights at `source`) is not the manifest's.
        """
        if self.encoder is None:
            raise ShardError("these shards hold pictures, not latents; run `data-tools encode` on them first")
        if self.encoder.sha256 != sha256:
            raise ShardError(
                f"wrong VAE: the latents were made by {self.encoder.source} ({self.encoder.sha256[:12]}), "
                f"not by {source} ({sha256[:12]}); give that VAE or encode the pictures again"
            )


def _read_local(root: Path) -> str:
    try:
        return (root / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        if not root.exists():
            raise ShardError(f"no folder of shards at {root}; check the path") from None
        if (root / WORK).is_dir():
            raise ShardError(
                f"{root} is a set of latents that was never finished; run the same `data-tools encode` again"
            ) from None
        raise ShardError(
            f"{root} has no {MANIFEST}: not a set of shards, or one that was never finished; "
            "make it with `data-tools ingest` or `data-tools encode`"
        ) from None
    except NotADirectoryError:
        raise ShardError(f"{root} is a file; give the folder that holds {MANIFEST}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"cannot read {root / MANIFEST}: {error}") from None


def _read_remote(store: Store) -> str:
    try:
        return store.read(MANIFEST).decode("utf-8")
    except FileNotFoundError:
        raise ShardError(
            f"{store.name} has no {MANIFEST}: not a set of shards, or not a whole copy of one; check the address"
        ) from None
    except UnicodeDecodeError as error:
        raise ShardError(f"cannot read {store.url(MANIFEST)}: {error}") from None


def _manifest_from_json(data: dict[str, Any]) -> Manifest:
    if data["kind"] not in ("images", "latents"):
        raise ValueError(f"kind {data['kind']!r} is neither images nor latents")
    members = [str(name) for name in data["members"]]
    if bad := [name for name in members if not MEMBER.fullmatch(name)]:
        raise ValueError(f"{bad[0]!r} is no name of a member")
    if len(set(members)) != len(members):
        raise ValueError(f"members {members} repeat")
    shards = []
    for row in data["shards"]:
        bucket = None if row["bucket"] is None else (int(row["bucket"][0]), int(row["bucket"][1]))
        shard = ShardInfo(str(row["name"]), bucket, int(row["samples"]), int(row["bytes"]), str(row["sha256"]))
        if "/" in shard.name or not shard.name.isprintable() or not shard.name.endswith(".tar"):
            raise ValueError(f"shard name {shard.name!r} is not that of a tar in this folder")
        possible = 0 <= shard.samples < 1 << 40 and 0 <= shard.bytes < 1 << 60
        if not possible or (bucket is not None and not all(1 <= side < 1 << 31 for side in bucket)):
            raise ValueError(f"shard {shard.name!r} has impossible numbers")
        shards.append(shard)
    if sum(shard.samples for shard in shards) >= 1 << 60:
        raise ValueError("it has impossible numbers of samples")
    encoder = latents = text = None
    if data["encoder"] is not None:
        low, high = data["encoder"]["pixel_range"]
        encoder = EncoderInfo(**{**data["encoder"], "pixel_range": (float(low), float(high))})
        _require_types(encoder, "encoder")
        if encoder.scale == 0 or not all(map(math.isfinite, (encoder.scale, encoder.shift))):
            raise ValueError(f"latent scale {encoder.scale} and shift {encoder.shift} cannot be inverted")
    if data["latents"] is not None:
        latents = LatentStats(**data["latents"])
        _require_types(latents, "latents")
        if len(latents.channel_mean) != len(latents.channel_std):
            raise ValueError("latents.channel_mean and latents.channel_std have different lengths")
    if data.get("text") is not None:
        text = TextInfo(**data["text"])
        _require_types(text, "text")
    if data["kind"] == "latents" and (encoder is None or any(shard.bucket is None for shard in shards)):
        raise ValueError("latents need an encoder and a bucket for every shard")
    classes = data.get("classes")
    if classes is not None and not (isinstance(classes, str) and SHA256.fullmatch(classes)):
        raise ValueError(f"classes is {classes!r}, not the sha256 of {CLASSES}")
    return Manifest(data["kind"], members, shards, encoder, latents, text, data["version"], classes)


def _require_types(part: EncoderInfo | LatentStats | TextInfo, name: str) -> None:
    """Refuse fields of other types than their annotations say, and counts below one."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        match field.type:
            case "str":
                good = isinstance(value, str)
            case "int":
                good = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31
            case "float":
                good = _is_number(value)
            case "list[float]":
                good = isinstance(value, list) and all(map(_is_number, value))
            case _:  # checked where it is built
                good = True
        if not good:
            raise ValueError(f"{name}.{field.name} is {value!r}, not {field.type}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
