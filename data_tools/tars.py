"""Read tars that others made: WebDataset samples, one after another, whatever the file is.

Nothing is ever written or unpacked: names in a tar are keys, never paths. Memory is bounded by the limits on a
member and on a sample, which are checked before a byte is read. A disk that does not answer says nothing of the
tar: it ends the reading. What is wrong with a tar is a value in the stream (`Unreadable`), never an exception:

- A header that doesn't add up to its checksum, a member that goes beyond the end of the file, a missing end mark:
  the tar is left there, and with it the sample that was being read, which may lack members.
- A sample is given out only after the header that follows it was sound, so a wrong size is noticed in time.
- A link, a device, a sparse file, a member that is too large or occurs twice: that sample is left out, the rest
  goes on.
- A compressed tar (gzip) is unpacked twice: once for its checksum, which stands at its end, then for its samples.

A tar has no checksum for the bytes of its members, nor for the long names that stand in blocks of their own: damage
there is found by whoever decodes the picture or parses the record.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from data_tools.texts import printable
from finetune import is_of_machine
from finetune.data.shards.files import naming, split_name

MAX_MEMBER_BYTES = 512 << 20
MAX_SAMPLE_BYTES = 1 << 30
_MAX_MEMBERS = 1000  # of a sample; each costs memory even when it is empty
_MAX_EXTENSION = 1 << 20  # bytes of a pax header or a long name; real ones take hundreds
_MAX_NAME = 4096  # PATH_MAX
_MAX_TRAILER = 16 << 20  # of zeros after the end mark that are looked through for more data
# A gzip file may unpack to this many times its size (and always to 1 GiB): pictures hardly shrink, bombs do.
_MAX_RATIO, _FREE_BYTES = 100, 1 << 30

_GZIP = b"\x1f\x8b"
_OTHER_COMPRESSION = {b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True)
class TarSample:
    """A sample: its key as it stands in the tar, and its members' bytes by lower-case name (`jpg`, `mask.png`)."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Unreadable:
    """What can't be read: where it is, and why. `key` is the sample's, as it stands in the tar, if it is one."""

    where: str
    reason: str
    key: str | None = None


def iter_tar(
    path: Path,
    wanted: Callable[[str], bool] | None = None,
    *,
    max_member: int = MAX_MEMBER_BYTES,
    max_sample: int = MAX_SAMPLE_BYTES,
) -> Iterator[TarSample | Unreadable]:
    """The samples of a tar, plain or gzipped, in its order; never raises for what is in the file.

    Files belong to one sample as in WebDataset: they stand one after another, and share their path up to the first
    dot of the last part. Names without a dot, with a leading dot, and beginning with `__` are no members.

    Args:
        wanted: says of a member's name whether its bytes are read; other members are left out (but must be sound).
        max_member, max_sample: bytes; what is larger is `Unreadable`.

    Raises:
        OSError: the disk does not answer, or refuses.
    """
    try:
        if not path.is_file():
            yield Unreadable(path.name, "no such file" if not path.exists() else "not a regular file")
            return
        with path.open("rb") as raw:
            magic = raw.read(6)
            raw.seek(0)
            for mark, kind in _OTHER_COMPRESSION.items():
                if magic.startswith(mark):
                    yield Unreadable(path.name, f"compressed with {kind}; unpack it first")
                    return
            if not magic.startswith(_GZIP):
                tar = _Tar(path.name, raw, path.stat().st_size, max_member, max_sample)
                yield from tar.samples(wanted)
                return
            try:
                size = _unpacked_size(raw, path.stat().st_size)
            except (_DamageError, EOFError, zlib.error, OSError) as error:
                if is_of_machine(error):
                    raise
                yield Unreadable(path.name, f"not a whole gzip file ({error}); nothing of it was used")
                return
            raw.seek(0)
            with gzip.open(raw) as unpacked:
                tar = _Tar(path.name, cast(IO[bytes], unpacked), size, max_member, max_sample)
                yield from tar.samples(wanted)
    except OSError as error:
        if is_of_machine(error):
            with naming(path):
                raise
        yield Unreadable(path.name, f"cannot be read ({error.strerror or error})")


class _DamageError(Exception):
    """The tar can't be followed beyond this point."""


@dataclass
class _Pending:
    """The sample being read. `problem` is the first reason to leave it out."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    bytes: int = 0
    problem: str | None = None


@dataclass
class _Tar:
    name: str
    file: IO[bytes]
    size: int  # of the unpacked tar, bytes
    max_member: int
    max_sample: int
    position: int = 0

    def samples(self, wanted: Callable[[str], bool] | None) -> Iterator[TarSample | Unreadable]:
        last: _Pending | None = None
        found = False
        try:
            while (header := self._next()) is not None:
                info, problem = header
                found = True
                key, member = member_of(info.name)
                if info.isdir() or not member:
                    self._skip(info)
                    continue
                if last is None or last.key != key:
                    if last is not None:
                        yield self._finished(last)
                    last = _Pending(key)
                self._read(last, member, info, problem or _KINDS.get(info.type), wanted)
        except (_DamageError, tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
            if is_of_machine(error):
                raise
            what = str(error) or type(error).__name__
            used = "; what came before was used" if found else ""
            yield Unreadable(self.name, f"not a whole tar ({what}){used}")
            return  # the pending sample may lack members
        if last is not None:
            yield self._finished(last)

    def _finished(self, sample: _Pending) -> TarSample | Unreadable:
        if sample.problem is not None:
            return Unreadable(f"{self.name}: {printable(sample.key)}", sample.problem, sample.key)
        return TarSample(sample.key, sample.members)

    def _read(
        self,
        sample: _Pending,
        member: str,
        info: tarfile.TarInfo,
        problem: str | None,
        wanted: Callable[[str], bool] | None,
    ) -> None:
        shown = printable(member)
        if problem is not None:
            problem = f"{shown} is {problem}"
        elif member in sample.names:
            problem = f"{shown} occurs twice"
        elif len(sample.names) >= _MAX_MEMBERS:
            problem = f"more than {_MAX_MEMBERS} members"
        elif wanted is not None and not wanted(member):
            sample.names.add(member)
            self._skip(info)
            return
        elif info.size > self.max_member:
            problem = f"{shown} has {info.size} bytes, the limit is {self.max_member}"
        elif sample.bytes + info.size > self.max_sample:
            problem = f"it has more than {self.max_sample} bytes, the limit of a sample"
        if problem is not None:
            sample.problem = sample.problem or problem
            sample.members.clear()
        if sample.problem is not None:
            self._skip(info)
            return
        sample.names.add(member)
        sample.bytes += info.size
        self._check_end(info.size)
        sample.members[member] = self._take(info.size)
        self._seek(self.position + -info.size % tarfile.BLOCKSIZE)

    # --- the walk from header to header; TarInfo parses each block, and we hold the sizes against the file's

    def _next(self) -> tuple[tarfile.TarInfo, str | None] | None:
        """The next file's header and what makes it unusable, or None at the end mark."""
        name: str | None = None
        pax: dict[str, bytes] = {}
        extended = False
        while True:
            if self.position >= self.size:
                raise _DamageError("it ends without an end mark" if self.position else "an empty file")
            block = self._take(tarfile.BLOCKSIZE)
            if not any(block):
                if extended:
                    raise _DamageError(f"it ends within a header at byte {self.position}")
                self._check_trailer()
                return None
            info = _parse(block, self.position - len(block))
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax.update(self._pax(info))
            elif info.type == tarfile.XGLTYPE:
                if bad := sorted(key for key in self._pax(info) if key in ("path", "size") or "sparse" in key):
                    raise _DamageError(f"a global header that sets {', '.join(bad)}")
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                raw = self._extension(info)
                if b"\0" in (raw := raw.removesuffix(b"\0")):
                    raise _DamageError(f"a broken name at byte {self.position}")
                name = _text(raw)
            elif info.type == tarfile.GNUTYPE_LONGLINK:
                self._extension(info)
            else:
                return self._complete(info, block, name, pax)
            extended = True

    def _complete(
        self, info: tarfile.TarInfo, block: bytes, name: str | None, pax: dict[str, bytes]
    ) -> tuple[tarfile.TarInfo, str | None]:
        for field_name in ("path", "GNU.sparse.name"):  # of a sparse file, `path` is a made-up one
            if field_name in pax:
                name = _text(pax[field_name])
        if name is not None:
            info.name = name
            if name.endswith("/") and info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                info.type = tarfile.DIRTYPE
        if "size" in pax:
            info.size = _number(pax["size"])
        if info.size < 0:
            raise _DamageError(f"a member of {info.size} bytes")
        if len(info.name) > _MAX_NAME:
            raise _DamageError(f"a name of {len(info.name)} characters")
        if info.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]  # "isextended": further blocks of the map of holes follow
            while more:
                more = self._take(tarfile.BLOCKSIZE)[504]
        problem = None
        if any(key.startswith("GNU.sparse.") for key in pax):
            problem = "a sparse file"
        elif info.type not in tarfile.SUPPORTED_TYPES:
            problem = f"of an unknown kind ({info.type!r})"
        return info, problem

    def _pax(self, info: tarfile.TarInfo) -> dict[str, bytes]:
        """The records "LENGTH KEY=VALUE\\n" of a pax header (POSIX.1-2001, pax Extended Header)."""
        data, records = self._extension(info), {}
        while data.strip(b"\0"):
            length_text, space, _ = data[:24].partition(b" ")
            length = _number(length_text) if space else 0
            record = data[len(length_text) + 1 : length]
            key, equals, value = record[:-1].partition(b"=")
            if not equals or length > len(data) or not record.endswith(b"\n"):
                raise _DamageError("a pax header that is none")
            records[_text(key)] = value
            data = data[length:]
        return records

    def _extension(self, info: tarfile.TarInfo) -> bytes:
        if not 0 <= info.size <= _MAX_EXTENSION:
            raise _DamageError(f"a header of {info.size} bytes")
        self._check_end(info.size)
        data = self._take(info.size)
        self._seek(self.position + -info.size % tarfile.BLOCKSIZE)
        return data

    def _skip(self, info: tarfile.TarInfo) -> None:
        """Go past a member. Links, folders and devices have no data, whatever size they state."""
        if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES:
            self._check_end(info.size)
            self._seek(self.position + info.size + -info.size % tarfile.BLOCKSIZE)

    def _check_end(self, size: int) -> None:
        if self.position + size > self.size:
            raise _DamageError(f"a member ends at byte {self.position + size} of {self.size}")

    def _check_trailer(self) -> None:
        """After one block of zeros: another, or the end; then no more data, as after a hole in the middle."""
        for _ in range(_MAX_TRAILER >> 20):
            chunk = self.file.read(1 << 20)
            if chunk.count(0) != len(chunk):
                raise _DamageError(f"data after an end mark at byte {self.position - tarfile.BLOCKSIZE}")
            if len(chunk) < 1 << 20:
                break

    def _take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise _DamageError(f"it ends at byte {self.position + len(data)}")
        self.position += count
        return data

    def _seek(self, position: int) -> None:
        if position != self.position:
            self.file.seek(position)
            self.position = position


def _parse(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        raise _DamageError(f"{error or 'a broken header'} at byte {position}") from None


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise _DamageError("a pax header with a broken number")
    return int(digits)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")  # unlike surrogates, it can be encoded again


def member_of(name: str) -> tuple[str, str]:
    """(key, member) of a name in a tar; ("", "") for what is no member of a sample."""
    key, member = split_name(name)
    named = key and not key.endswith("/") and member
    return (key, member.lower()) if named and not key.startswith("__") else ("", "")


def _unpacked_size(raw: IO[bytes], packed: int) -> int:
    """Bytes of a gzip file's content, whose checksum is found right.

    Raises:
        _DamageError: it unpacks to absurdly much.
    """
    limit = max(_FREE_BYTES, _MAX_RATIO * packed)
    size = 0
    with gzip.open(raw) as unpacked:
        while chunk := unpacked.read(1 << 20):
            size += len(chunk)
            if size > limit:
                raise _DamageError(f"it unpacks to more than {limit} bytes from {packed}")
    return size
