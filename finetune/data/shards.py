"""The on-disk format of a data set: tar shards, a manifest, and an index of member offsets.

    ROOT/00000.tar          samples, one after another: KEY.json, KEY.latent.npy, ... (POSIX ustar)
    ROOT/00000.index.npy    int64 [samples, members, 2]: where each member's bytes lie in the tar
    ROOT/manifest.json      what the shards are; written last, so a folder without it is unfinished

The tars are plain: `webdataset` and `datasets` read them unaided. The index gives any sample in one `pread`.
A latent sample is `KEY.latent.npy` (float16 [2C, h, w]: posterior mean, then standard deviation, unscaled)
and `KEY.json`; an image sample is `KEY.jpg|png|webp` with `KEY.json` or `KEY.txt`. Any other member is
optional.

Sample ids 0..N-1 number the samples in the order of the manifest's shards. A shard holds one aspect bucket.
This module knows neither torch nor pictures, and needs a POSIX system (`pread`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, cast

import numpy as np

from finetune import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATENT = "latent.npy"
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")

Kind = Literal["images", "latents"]
Bucket = tuple[int, int]
"""Height and width, in pixels."""

_BLOCK = tarfile.BLOCKSIZE
_NAME_BYTES = 100  # the ustar name field: a longer name would need extra header blocks before the data
# webdataset cuts a key at its first dot, skips names like `__this__`, and lower-cases the names of members.
_KEY = re.compile(r"(?!__)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_MEMBER = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_TEMPORARY = re.compile(r"\..*\.tmp")


class ShardError(UserError):
    """A set of shards that is absent, damaged, or not what its reader needs; names the file."""


# --- what the manifest says -----------------------------------------------------------------------


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

    `source` is a path relative to the manifest's folder (it starts with a dot) or a hub id; `sha256` is of
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
        """The folder of the autoencoder, for a manifest in `root`; a hub id is returned as it is."""
        path = Path(root) / self.source
        return os.path.normpath(path) if self.source.startswith(".") or path.is_dir() else self.source


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of model latents, (mean + std*eps - shift) * scale, over all elements."""

    mean: float
    std: float
    channel_mean: list[float]
    channel_std: list[float]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. `members` names the columns of the index."""

    kind: Kind
    members: list[str]
    shards: list[ShardInfo]
    encoder: EncoderInfo | None = None
    latents: LatentStats | None = None
    version: int = FORMAT_VERSION

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.bytes for shard in self.shards)

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> Manifest:
        """Read ROOT/manifest.json.

        Raises:
            ShardError: folder or manifest missing, not JSON, without a field it needs, or of another version.
        """
        path = Path(root) / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            if not Path(root).exists():
                raise ShardError(f"no folder of shards at {root}; check the path") from None
            raise ShardError(
                f"{root} has no {MANIFEST}: not a set of shards, or one that was never finished; "
                "make it with `data-tools ingest` or `data-tools encode`"
            ) from None
        except NotADirectoryError:
            raise ShardError(f"{root} is a file; give the folder that holds {MANIFEST}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ShardError(f"cannot read {path}: {error}") from None
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ShardError(f"{path} is not JSON ({error}); make the shards again") from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}; "
                "use the release that wrote it, or make the shards again"
            )
        try:
            return _manifest_from_json(data)
        except (KeyError, TypeError, ValueError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise ShardError(f"{path} is not a valid manifest: {what}; make the shards again") from None

    def save(self, root: str | os.PathLike[str]) -> None:
        """Write ROOT/manifest.json at once or not at all; the same manifest gives the same bytes."""
        data = dataclasses.asdict(self)
        shards = data.pop("shards")
        order = ("version", "kind", "members", "encoder", "latents")
        lines = [f"  {json.dumps(key)}: {json.dumps(data[key])}," for key in order]
        lines += [f'  "samples": {self.samples},', f'  "bytes": {self.bytes},']
        rows = ",\n".join("    " + json.dumps(shard) for shard in shards)  # a line a shard: 10,000 stay legible
        lines += [f'  "shards": [\n{rows}\n  ]']
        write_atomic(Path(root) / MANIFEST, ("{\n" + "\n".join(lines) + "\n}\n").encode())

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


def _manifest_from_json(data: dict[str, Any]) -> Manifest:
    if data["kind"] not in ("images", "latents"):
        raise ValueError(f"kind {data['kind']!r} is neither images nor latents")
    members = [str(name) for name in data["members"]]
    if len(set(members)) != len(members):
        raise ValueError(f"members {members} repeat")
    shards = []
    for row in data["shards"]:
        bucket = None if row["bucket"] is None else (int(row["bucket"][0]), int(row["bucket"][1]))
        shard = ShardInfo(str(row["name"]), bucket, int(row["samples"]), int(row["bytes"]), str(row["sha256"]))
        if Path(shard.name).name != shard.name or not shard.name.endswith(".tar"):
            raise ValueError(f"shard name {shard.name!r} is not that of a tar in this folder")
        if shard.samples < 0 or shard.bytes < 0 or (bucket is not None and min(bucket) < 1):
            raise ValueError(f"shard {shard.name} has impossible numbers")
        shards.append(shard)
    encoder = latents = None
    if data["encoder"] is not None:
        low, high = data["encoder"]["pixel_range"]
        encoder = EncoderInfo(**{**data["encoder"], "pixel_range": (float(low), float(high))})
        if encoder.scale == 0 or not all(map(math.isfinite, (encoder.scale, encoder.shift))):
            raise ValueError(f"latent scale {encoder.scale} and shift {encoder.shift} cannot be inverted")
    if data["latents"] is not None:
        latents = LatentStats(**data["latents"])
    if data["kind"] == "latents" and (encoder is None or any(shard.bucket is None for shard in shards)):
        raise ValueError("latents need an encoder and a bucket for every shard")
    return Manifest(data["kind"], members, shards, encoder, latents, data["version"])


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in its folder, then rename it: whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    with _naming(path), temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an `OSError` (a full disk, say) carry the name of the file, which `write` and `fsync` leave out."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def index_name(shard_name: str) -> str:
    """`00000.tar` -> `00000.index.npy`."""
    return shard_name.removesuffix(".tar") + ".index.npy"


# --- writing --------------------------------------------------------------------------------------


class _OpenShard:
    """A tar under a temporary name, its checksum, and the offsets of what was written so far."""

    def __init__(self, root: Path, name: str, bucket: Bucket | None) -> None:
        self.path = root / name
        self.temporary = root / f".{name}.tmp"
        self.bucket = bucket
        self.keys: set[str] = set()
        self.rows: list[dict[str, tuple[int, int]]] = []
        self.bytes = 0
        self.sha256 = hashlib.sha256()
        self.file: IO[bytes] = self.temporary.open("wb", buffering=1 << 20)

    def put(self, data: bytes) -> None:
        with _naming(self.path):
            self.file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        row = {}
        for member, data in members.items():
            info = tarfile.TarInfo(f"{key}.{member}")  # mtime, uid, gid 0 and mode 0644: same bytes anywhere
            info.size = len(data)
            self.put(info.tobuf(tarfile.USTAR_FORMAT))
            row[member] = (self.bytes, len(data))
            self.put(data)
            self.put(bytes(-len(data) % _BLOCK))
        self.keys.add(key)
        self.rows.append(row)

    def finish(self) -> ShardInfo:
        self.put(bytes(2 * _BLOCK))
        self.put(bytes(-self.bytes % tarfile.RECORDSIZE))
        with _naming(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        os.replace(self.temporary, self.path)
        return ShardInfo(self.path.name, self.bucket, len(self.rows), self.bytes, self.sha256.hexdigest())

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses again
            self.file.close()
        self.temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into shards, one open shard a bucket. The same calls give the same bytes.

        with ShardWriter(root, "images") as writer:
            writer.write("cat", {"png": png, "json": json_bytes}, bucket=(64, 64))
            writer.finish()

    Nothing but `finish` (or `close` and `Manifest.save`) makes the set loadable; after an exception, or a
    kill, there is no manifest. Keys are ASCII words without dots, at most 100 bytes with the member's name:
    so each header is one block that stands right before its data.

    Raises:
        ShardError: `root` already holds shards; a key or member name is bad, or repeats within a shard.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        kind: Kind,
        *,
        members: Sequence[str] = (),
        max_samples: int = 10_000,
        max_bytes: int = 1 << 30,
    ) -> None:
        self.root = Path(root)
        self.kind: Kind = kind
        self.members = list(members)
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.root.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in self.root.iterdir())
        if old := [name for name in names if name == MANIFEST or name.endswith(".tar")]:
            raise ShardError(f"{self.root} already holds shards ({old[0]}); choose another folder")
        self._open: dict[Bucket | None, _OpenShard] = {}
        self._done: list[tuple[ShardInfo, int]] = []  # with the number of columns of the index as written
        self._names = 0
        self._closed = False

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, key: str, members: Mapping[str, bytes], bucket: Bucket | None = None) -> None:
        """Add one sample. `bucket` is its (height, width) in pixels."""
        assert not self._closed, "write after close"
        if not _KEY.fullmatch(key):
            raise ShardError(f"sample key {key!r} must be of letters, digits, _, - and /; rename it")
        if not members:
            raise ShardError(f"sample {key!r} has no members")
        for member in members:
            if not _MEMBER.fullmatch(member):
                raise ShardError(f"member {member!r} of {key!r} must be lower-case words joined by dots")
            if len(key) + 1 + len(member) > _NAME_BYTES:
                raise ShardError(f"{key}.{member} is longer than {_NAME_BYTES} bytes; use a shorter key")
            if member not in self.members:
                self.members.append(member)
        shard = self._open.get(bucket)
        if shard is None:
            shard = self._open[bucket] = _OpenShard(self.root, f"{self._names:05d}.tar", bucket)
            self._names += 1
        if key in shard.keys:
            raise ShardError(f"sample key {key!r} occurs twice; keys must differ")
        shard.add(key, members)
        if len(shard.rows) >= self.max_samples or shard.bytes >= self.max_bytes:
            self._finish_shard(bucket)

    def close(self) -> list[ShardInfo]:
        """Finish the open shards; the shards in the order of their names. Writes no manifest."""
        if not self._closed:
            for bucket in list(self._open):
                self._finish_shard(bucket)
            self._closed = True
            for info, columns in self._done:
                if columns < len(self.members):  # an optional member first came up in a later shard
                    path = self.root / index_name(info.name)
                    pad = np.full((info.samples, len(self.members) - columns, 2), -1, np.int64)
                    write_atomic(path, _npy(np.concatenate([np.load(path), pad], axis=1)))
        return sorted((info for info, _ in self._done), key=lambda info: (len(info.name), info.name))

    def finish(self, encoder: EncoderInfo | None = None, latents: LatentStats | None = None) -> Manifest:
        """Close, write the manifest, and return it."""
        manifest = Manifest(self.kind, self.members, self.close(), encoder, latents)
        manifest.save(self.root)
        return manifest

    def abort(self) -> None:
        """Drop the open shards. Those already finished stay, without a manifest."""
        self._closed = True
        for shard in self._open.values():
            shard.discard()
        self._open.clear()

    def _finish_shard(self, bucket: Bucket | None) -> None:
        shard = self._open[bucket]
        index = np.full((len(shard.rows), len(self.members), 2), -1, np.int64)
        for row, places in enumerate(shard.rows):
            for member, place in places.items():
                index[row, self.members.index(member)] = place
        info = shard.finish()
        del self._open[bucket]
        write_atomic(self.root / index_name(info.name), _npy(index))
        self._done.append((info, len(self.members)))


def _npy(array: np.ndarray) -> bytes:
    return _npy_header(array.shape, array.dtype) + np.ascontiguousarray(array).tobytes()


def latent_bytes(moments: np.ndarray) -> bytes:
    """Moments [2C, h, w] as the bytes of a `latent.npy` member, float16."""
    return _npy(moments.astype("<f2"))


def json_bytes(record: Mapping[str, Any]) -> bytes:
    """A sample's record as the bytes of a `json` member."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> bytes:
    """The header numpy writes (format 1.0, padded to 64 bytes) before a C-ordered array."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    length = math.ceil((10 + len(text) + 1) / 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


# --- reading --------------------------------------------------------------------------------------


class _Tar:
    """An open tar and its index. Closed when its last reader lets go, so eviction can't pull it away."""

    def __init__(self, path: Path, samples: int, members: int) -> None:
        self.fd = -1
        self.name = path.name
        index_path = path.with_name(index_name(path.name))
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # A plain view of the map: np.memmap's own indexing is several times slower.
            index = np.asarray(np.load(index_path, mmap_mode="r", allow_pickle=False))
        except FileNotFoundError as error:
            raise ShardError(f"{error.filename} is missing; restore it or make the shards again") from None
        except (OSError, ValueError) as error:
            raise ShardError(f"cannot open {path} and its index: {error}; run `data-tools verify`") from None
        if index.dtype != np.int64 or index.shape != (samples, members, 2):
            raise ShardError(
                f"{index_path} is {index.dtype} {list(index.shape)}, the manifest needs int64 "
                f"{[samples, members, 2]}; run `data-tools verify`"
            )
        self.index = index

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ShardSet:
    """Random access to the samples of a folder of shards.

    Safe in threads and over `fork`; a pickled copy opens its own files. At most `max_open` shards are
    open at a time.
    """

    def __init__(self, root: str | os.PathLike[str], manifest: Manifest, *, max_open: int = 256) -> None:
        self.root = Path(root)
        self.manifest = manifest
        self.max_open = max_open
        self._starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)], dtype=np.int64)
        self._columns = {member: column for column, member in enumerate(manifest.members)}
        self._reset()

    @classmethod
    def open(cls, root: str | os.PathLike[str], kind: Kind | None = None, *, max_open: int = 256) -> ShardSet:
        """Open the set in `root`; `kind` is what the caller needs.

        Raises:
            ShardError: no finished set there, or one of the other kind.
        """
        manifest = Manifest.load(root)
        if kind is not None and manifest.kind != kind:
            remedy = "run `data-tools encode` on it" if kind == "latents" else "give the set it was made from"
            raise ShardError(f"{root} holds {manifest.kind}, {kind} are needed; {remedy}")
        return cls(root, manifest, max_open=max_open)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._tars: OrderedDict[int, _Tar] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_tars")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def close(self) -> None:
        """Let go of all open files; reading opens them again."""
        with self._lock:
            self._tars.clear()

    # which sample is where

    def bucket_of(self, shard: int) -> Bucket | None:
        """(height, width) in pixels of the samples in a shard."""
        return self.manifest.shards[shard].bucket

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard, row in it) of a sample id.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        shard = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return shard, int(sample_id - self._starts[shard])

    @property
    def bucket_sizes(self) -> dict[Bucket, int]:
        """Samples in each bucket, in the order of (height, width)."""
        sizes: dict[Bucket, int] = {}
        for shard in self.manifest.shards:
            if shard.bucket is not None:
                sizes[shard.bucket] = sizes.get(shard.bucket, 0) + shard.samples
        return dict(sorted(sizes.items()))

    def bucket_ids(self, bucket: Bucket, positions: np.ndarray) -> np.ndarray:
        """Sample ids (int64) of positions 0..size-1 within a bucket; never lists the whole bucket."""
        shards = [i for i, shard in enumerate(self.manifest.shards) if shard.bucket == bucket]
        ends = np.cumsum([self.manifest.shards[i].samples for i in shards], dtype=np.int64)
        place = np.searchsorted(ends, positions, side="right")
        begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        return self._starts[np.asarray(shards, np.int64)][place] + (positions - begins[place])

    @property
    def buckets(self) -> dict[Bucket, np.ndarray]:
        """All sample ids (int64) of each bucket, in the order of `bucket_sizes`; 8 bytes a sample.

        Shards of mixed sizes have no bucket and are left out.
        """
        return {bucket: self.bucket_ids(bucket, np.arange(n)) for bucket, n in self.bucket_sizes.items()}

    # the samples

    def read(self, sample_id: int) -> dict[str, Any]:
        """All members of a sample as bytes, and its key (str) as `__key__`."""
        tar, row = self._tar_of(sample_id)
        sample: dict[str, Any] = {"__key__": self._key(tar, row, sample_id)}
        for column, member in enumerate(self.manifest.members):
            if tar.index[row, column, 0] >= 0:
                sample[member] = self._pread(tar, row, column, sample_id)
        return sample

    def key(self, sample_id: int) -> str:
        """The sample's key, from the tar header before its first member."""
        tar, row = self._tar_of(sample_id)
        return self._key(tar, row, sample_id)

    def has_member(self, sample_id: int, member: str) -> bool:
        """Whether a sample has an optional member."""
        tar, row = self._tar_of(sample_id)
        column = self._columns.get(member)
        return column is not None and int(tar.index[row, column, 0]) >= 0

    def read_member(self, sample_id: int, member: str) -> bytes:
        """One member's bytes.

        Raises:
            ShardError: the sample has no such member, or its bytes can't be read.
        """
        tar, row = self._tar_of(sample_id)
        column = self._columns.get(member)
        if column is None or tar.index[row, column, 0] < 0:
            present = [m for m, c in self._columns.items() if tar.index[row, c, 0] >= 0]
            self._fail(tar, sample_id, f"has no member {member!r}, only {', '.join(present)}")
        return self._pread(tar, row, column, sample_id)

    def read_json(self, sample_id: int) -> dict[str, Any]:
        """The sample's record.

        Raises:
            ShardError: it has none, or it is not a JSON object.
        """
        try:
            record = json.loads(self.read_member(sample_id, "json"))
        except ValueError as error:
            self._fail(self._tar_of(sample_id)[0], sample_id, f"has a json member that is not JSON ({error})")
        if not isinstance(record, dict):
            self._fail(self._tar_of(sample_id)[0], sample_id, "has a json member that is no object")
        return record

    def read_latents(self, sample_ids: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        """Read moments straight into `out` [B, 2C, h, w] float16, one `preadv` a sample.

        Raises:
            ShardError: a sample's array is not float16 of [2C, h, w], or its bytes can't be read.
        """
        if out.dtype != np.float16 or not out.flags.c_contiguous or len(out) != len(sample_ids):
            want = f"contiguous float16 of {len(sample_ids)} rows"
            raise ValueError(f"out must be {want}, not {out.dtype} {out.shape}")
        column = self._columns.get(LATENT)
        if column is None:
            raise ShardError(f"{self.root} has no {LATENT}; run `data-tools encode` on it first")
        if len(out) == 0:
            return
        want_header = _npy_header(out.shape[1:], "<f2")
        header = bytearray(len(want_header))
        row_bytes = out.nbytes // len(out)
        total = len(want_header) + row_bytes
        out_bytes = out.data.cast("B")
        # Shard by shard and row by row: each shard is looked up once, and its bytes are read in their order.
        ids = np.asarray(sample_ids, np.int64)
        order = np.argsort(ids, kind="stable")
        for end in (order[0], order[-1]):
            self.locate(int(ids[end]))  # raises if there is no such sample
        shards = np.searchsorted(self._starts, ids[order], side="right") - 1
        for places in np.split(order, np.flatnonzero(np.diff(shards)) + 1):
            tar, first_row = self._tar_of(int(ids[places[0]]))
            rows = ids[places] - ids[places[0]] + first_row
            spans = tar.index[rows, column].tolist()
            for place, row, (offset, size) in zip(places.tolist(), rows.tolist(), spans, strict=True):
                target = out_bytes[place * row_bytes : (place + 1) * row_bytes]
                try:
                    whole = size == total and os.preadv(tar.fd, (header, target), offset) == total
                except OSError:
                    whole = False
                if whole and header == want_header:
                    continue
                # An interrupted read, a header written by another program, or a wrong array: find out slowly.
                out[place] = self._parse_latent(tar, row, column, int(ids[place]), out.shape[1:])

    def _parse_latent(self, tar: _Tar, row: int, column: int, sample_id: int, shape: tuple[int, ...]) -> np.ndarray:
        if tar.index[row, column, 0] < 0:
            self._fail(tar, sample_id, f"has no {LATENT}")
        array = parse_npy(self._pread(tar, row, column, sample_id))
        if array is None:
            self._fail(tar, sample_id, f"has a {LATENT} that is not a numpy array")
        if array.dtype != np.float16 or array.shape != shape:
            self._fail(tar, sample_id, f"is {array.dtype} {list(array.shape)}, not float16 {list(shape)}")
        return array

    def _tar_of(self, sample_id: int) -> tuple[_Tar, int]:
        shard, row = self.locate(sample_id)
        with self._lock:
            tar = self._tars.get(shard)
            if tar is None:
                info = self.manifest.shards[shard]
                tar = _Tar(self.root / info.name, info.samples, len(self.manifest.members))
                self._tars[shard] = tar
                while len(self._tars) > self.max_open:
                    self._tars.popitem(last=False)
            else:
                self._tars.move_to_end(shard)
        return tar, row

    def _pread(self, tar: _Tar, row: int, column: int, sample_id: int) -> bytes:
        offset, size = tar.index[row, column].tolist()
        try:
            data = _pread_all(tar.fd, size, offset)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            self._fail(tar, sample_id, f"can't be read at byte {offset} ({error})")
        if len(data) != size:
            self._fail(tar, sample_id, f"ends early: {len(data)} of {size} bytes at byte {offset}")
        return data

    def _key(self, tar: _Tar, row: int, sample_id: int) -> str:
        column = next((c for c in range(len(self.manifest.members)) if tar.index[row, c, 0] >= _BLOCK), None)
        if column is None:
            self._fail(tar, sample_id, "has no members")
        header = _pread_all(tar.fd, _BLOCK, int(tar.index[row, column, 0]) - _BLOCK)
        name = header[:_NAME_BYTES].rstrip(b"\0").decode("ascii", "replace")
        suffix = "." + self.manifest.members[column]
        if not name.endswith(suffix):
            self._fail(tar, sample_id, f"is {name!r} where the index has {suffix}: it is another tar's index")
        return name.removesuffix(suffix)

    def _fail(self, tar: _Tar, sample_id: int, what: str) -> NoReturn:
        remedy = f"run `data-tools verify {self.root}`"
        raise ShardError(f"{self.root / tar.name}: sample {sample_id} {what}; {remedy}")


def _pread_all(fd: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file (network file systems may give parts)."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def parse_npy(data: bytes) -> np.ndarray | None:
    """The array in the bytes of a .npy file, or None if they are no such file (or hold objects)."""
    import io

    try:
        return cast(np.ndarray, np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError, OverflowError):
        return None


# --- verifying ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Something wrong: in which file, with which sample (None: with the file as a whole), what."""

    file: str
    sample: str | None
    what: str

    def __str__(self) -> str:
        where = self.file if self.sample is None else f"{self.file}: sample {self.sample}"
        return f"{where}: {self.what}"


def verify(
    root: str | os.PathLike[str],
    progress: Callable[[int], object] | None = None,
    check: Callable[[str, bytes], str | None] | None = None,
) -> list[Problem]:
    """Check a whole set: names, sizes, checksums, tars against indexes, records, latents, keys.

    Args:
        progress: called with the number of bytes just checked.
        check: called with each member's name and bytes; returns what is wrong with them, or None. The way to
            decode pictures, which this module doesn't know.
    """
    root = Path(root)
    try:
        manifest = Manifest.load(root)
    except ShardError as error:
        return [Problem(MANIFEST, None, str(error))]
    problems = [*_verify_folder(root, manifest)]
    key_hashes: list[np.ndarray] = []
    for shard in manifest.shards:
        if (root / shard.name).is_file():
            hashes, found = _verify_shard(root, manifest, shard, progress, check)
            problems += found
            key_hashes.append(hashes)
    problems += _verify_keys(root, manifest, key_hashes)
    return problems


def _verify_folder(root: Path, manifest: Manifest) -> Iterator[Problem]:
    names = [shard.name for shard in manifest.shards]
    if not names:
        yield Problem(MANIFEST, None, "lists no shards")
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(MANIFEST, None, f"lists {name} {count} times")
    known = {MANIFEST, *names, *(index_name(name) for name in names)}
    for name in sorted(known):
        if not (root / name).is_file():
            yield Problem(name, None, "missing")
    for path in sorted(root.iterdir()):
        if path.name not in known and (path.suffix == ".tar" or path.name.endswith(".index.npy")):
            yield Problem(path.name, None, "not in the manifest")
        elif _TEMPORARY.fullmatch(path.name):
            yield Problem(path.name, None, "left by a writer that was stopped; delete it")
    data = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    for field in ("samples", "bytes"):
        total = getattr(manifest, field)
        if field in data and data[field] != total:
            yield Problem(MANIFEST, None, f"{field} is {data[field]}, the shards sum to {total}")


def _verify_shard(
    root: Path,
    manifest: Manifest,
    shard: ShardInfo,
    progress: Callable[[int], object] | None,
    check: Callable[[str, bytes], str | None] | None,
) -> tuple[np.ndarray, list[Problem]]:
    path = root / shard.name
    problems: list[Problem] = []

    def report(what: str, sample: str | None = None, file: str = shard.name) -> None:
        problems.append(Problem(file, sample, what))

    size = path.stat().st_size
    if size != shard.bytes:
        report(f"{size} bytes, the manifest says {shard.bytes}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    if digest.hexdigest() != shard.sha256:
        report(f"sha256 is {digest.hexdigest()[:12]}..., the manifest says {shard.sha256[:12]}...")

    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, "r:", ignore_zeros=False) as tar:
            for info in tar:
                key, _, member = info.name.rpartition("/")[2].partition(".")
                key = info.name[: len(info.name) - len(member) - 1]
                if not info.isreg() or not _KEY.fullmatch(key) or not _MEMBER.fullmatch(member):
                    report(f"member {info.name!r} is no sample's regular file")
                    continue
                if info.offset_data + info.size > size:
                    report(f"{member} ends at byte {info.offset_data + info.size} of {size}", key)
                    break
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                if member in samples[-1][1]:
                    report(f"{member} occurs twice", key)
                samples[-1][1][member] = (info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        report(f"not a whole tar after {len(samples)} samples ({error})")
    if len(samples) != shard.samples:
        report(f"{len(samples)} samples, the manifest says {shard.samples}")

    _verify_index(root, manifest, shard, samples, problems)

    with path.open("rb") as file:
        for key, places in samples:
            for what in _verify_sample(file, manifest, shard, places, check):
                report(what, key)
    hashes = np.fromiter((_hash(key) for key, _ in samples), np.uint64, len(samples))
    return hashes, problems


def _verify_index(
    root: Path,
    manifest: Manifest,
    shard: ShardInfo,
    samples: list[tuple[str, dict[str, tuple[int, int]]]],
    problems: list[Problem],
) -> None:
    name = index_name(shard.name)
    if not (root / name).is_file():
        return
    try:
        index = np.load(root / name, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        problems.append(Problem(name, None, f"not a numpy array ({error})"))
        return
    if index.dtype != np.int64 or index.shape != (shard.samples, len(manifest.members), 2):
        want = [shard.samples, len(manifest.members), 2]
        problems.append(Problem(name, None, f"{index.dtype} {list(index.shape)}, needs int64 {want}"))
        return
    for (key, places), row in zip(samples, index.tolist(), strict=False):
        told = {m: tuple(place) for m, place in zip(manifest.members, row, strict=True) if place[0] >= 0}
        if told != places:
            wrong = sorted(m for m in told.keys() | places.keys() if told.get(m) != places.get(m))
            problems.append(Problem(name, key, f"offsets of {', '.join(wrong)} are not those of the tar"))


def _verify_sample(
    file: IO[bytes],
    manifest: Manifest,
    shard: ShardInfo,
    places: dict[str, tuple[int, int]],
    check: Callable[[str, bytes], str | None] | None,
) -> Iterator[str]:
    if manifest.kind == "latents":
        missing = [member for member in (LATENT, "json") if member not in places]
    else:
        missing = [] if any(member in places for member in IMAGE_MEMBERS) else ["picture"]
    if missing:
        yield f"no {' and no '.join(missing)}"
    for member, (offset, size) in places.items():
        file.seek(offset)
        data = file.read(size)
        if member == LATENT and manifest.encoder and shard.bucket:
            yield from _verify_latent(data, manifest.encoder, shard.bucket)
        elif member == "json":
            yield from _verify_record(data, manifest.kind)
        if check is not None and (what := check(member, data)):
            yield f"{member}: {what}"


def _verify_latent(data: bytes, encoder: EncoderInfo, bucket: Bucket) -> Iterator[str]:
    shape = (2 * encoder.channels, bucket[0] // encoder.downsample, bucket[1] // encoder.downsample)
    array = parse_npy(data)
    if array is None:
        yield f"{LATENT} is not a numpy array"
    elif array.dtype != np.float16 or array.shape != shape:
        yield f"{LATENT} is {array.dtype} {list(array.shape)}, its bucket needs float16 {list(shape)}"
    elif not np.isfinite(array).all():
        yield f"{LATENT} has values that are not finite"
    elif (array[encoder.channels :] < 0).any():
        yield f"{LATENT} has negative standard deviations"


def _verify_record(data: bytes, kind: Kind) -> Iterator[str]:
    try:
        record = json.loads(data)
    except ValueError as error:
        yield f"json is not JSON ({error})"
        return
    if not isinstance(record, dict):
        yield "json is no object"
        return
    captions = record.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        yield "json: captions is no list of strings"
    lengths = {"original_size": 2, "crop": 4} if kind == "latents" else {}
    for field, length in lengths.items():
        value = record.get(field)
        if not isinstance(value, list) or len(value) != length or not all(isinstance(n, int) for n in value):
            yield f"json: {field} is not {length} whole numbers"


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _verify_keys(root: Path, manifest: Manifest, key_hashes: list[np.ndarray]) -> Iterator[Problem]:
    """Keys that repeat over shards: 8 bytes a sample are kept, and only the suspects are looked at again."""
    if not key_hashes:
        return
    values, counts = np.unique(np.concatenate(key_hashes), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    first: dict[str, str] = {}
    for shard in manifest.shards:
        with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(root / shard.name, "r:") as tar:
            last = None
            for info in tar:
                key = info.name[: len(info.name) - len(info.name.rpartition("/")[2].partition(".")[2]) - 1]
                if key != last and _hash(key) in suspects:
                    if key in first:
                        yield Problem(shard.name, key, f"the key is also in {first[key]}")
                    first.setdefault(key, shard.name)
                last = key
