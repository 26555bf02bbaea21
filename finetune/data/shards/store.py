"""Where remote shards come from: fsspec URLs and pipes, read as streams, tried again when they break.

    s3://bucket/latents, gs://..., az://...     any file system of fsspec
    https://host/latents?TOKEN                  a query goes with every file's address
    pipe:aws s3 cp s3://bucket/latents/{} -     a shell command that writes the file named {} to its output

Credentials, endpoints and proxies are those of the libraries: for S3 the AWS variables (`AWS_PROFILE`,
`AWS_ENDPOINT_URL` for other makers' servers), and for all of them fsspec's own settings
(`FSSPEC_S3='{"anon": true}'` for a public bucket, or ~/.config/fsspec/*.json).

A file that can't be had now (a server error, a broken or silent connection, wrong bytes) is asked for again, later
and later; one that will not be had (absent, forbidden) is an error at once. Where all tries fail the store is away,
which is no mistake of the user's: the same command may go on later.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import re
import select
import shlex
import signal
import subprocess
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from finetune import BUNDLED, first_line
from finetune.data.shards.files import MANIFEST, ShardError

T = TypeVar("T")

CHUNK_BYTES = 4 << 20  # read, hashed and written at once: large beside the cost of a hop between threads
BLOCK_BYTES = 8 << 20  # of ranged reads, where a store can't stream: one request each
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)")
FOLDED = re.compile(r"(?!file:|local:)[A-Za-z][A-Za-z0-9+.-]+:/")
LOCAL = ("file://", "local://")
LATER = (408, 416, 425, 429)  # the client errors of HTTP that a later request may not meet


@dataclass(frozen=True)
class Retry:
    """How long to go on asking.

    The defaults ride out about a minute (at most two) of a store that is down, restarting, or asks for less: short
    beside a run, long beside a load balancer's failover. Tries count from the last that brought more of a file: a
    proxy may cut every connection after some megabytes. An open set has fewer tries for its manifest, so that a
    mistyped host is told in seconds.
    """

    attempts: int = 9
    manifest_attempts: int = 5
    first_s: float = 0.5
    cap_s: float = 30.0
    stall_s: float = 60.0  # no byte for so long is a broken connection; a slow one may take as long as it likes

    def delay_s(self, failures: int, draw: float) -> float:
        """Seconds to wait after so many failures in a row; `draw` is uniform in [0, 1).

        Full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog 2015): a thousand ranks that
        failed together must not come back together.
        """
        return draw * min(self.cap_s, self.first_s * 2.0 ** min(failures - 1, 64))


RETRY = Retry()


class WriteError(Exception):
    """The local file could not be written (its cause is an `OSError`); asking again doesn't help."""


class StoreAwayError(OSError):
    """A store has not given a file after all tries: to be treated as a disk that does not answer."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(errno.EHOSTDOWN, why, url)

    def __str__(self) -> str:
        return f"cannot fetch {self.filename}: {self.strerror}"

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreAwayError, (self.filename, self.strerror)


class StoppedError(Exception):
    """The caller no longer wants the file."""


class _WrongBytesError(Exception):
    """What came is not what the manifest says."""


class _HopelessError(Exception):
    """A failure that asking again can't mend."""


class _Body(Protocol):
    """A file's bytes from `offset` on (0 where the store can't start elsewhere)."""

    offset: int

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end; raises whatever the store's library does, or `TimeoutError`."""

    def close(self) -> None: ...


# which kind of root

_forked: weakref.WeakSet[Any] = weakref.WeakSet()
# fsspec's file systems, one a store that was used. They are never let go: closed in a forked child, when the
# garbage is collected there, each would wait a second for the parent's thread.
_kept: list[Any] = []


def reset_after_fork(thing: Any) -> None:
    """Have `thing._reset()` called in forked children: locks, threads and connections don't survive a fork."""
    _forked.add(thing)


def _reset_all() -> None:
    for thing in list(_forked):
        thing._reset()


os.register_at_fork(after_in_child=_reset_all)


def resolve(root: Root) -> Path | Store:
    """A set's home: a local folder (also as `file://`; see `set_folder`) as its path, everything else as a `Store`.

    Raises:
        ShardError: a URL or pipe that can't be used, or a protocol whose library is missing.
    """
    if isinstance(root, Store):
        return root
    text = os.fspath(root)
    if isinstance(root, Path) and (is_remote(text) or FOLDED.match(text)):
        # pathlib makes s3:/bucket of s3://bucket. Commands that take a path read all over a set.
        raise ShardError(
            f"{text} is a URL, a folder of this machine is needed here; copy the set (training reads URLs)"
        )
    if is_remote(text):
        return Store(text)
    if text.startswith(LOCAL):
        return Path(text.partition("://")[2])
    return set_folder(text) if isinstance(root, str) else Path(root)  # a path may be that of a set to be written


def set_folder(name: str) -> Path:
    """A local folder as its path. A bare name such as `fluent-emoji` is a folder here, else a set in the box."""
    path = Path(name)
    is_bundled = re.fullmatch(r"[a-z0-9-]+", name) and not path.is_dir() and (BUNDLED / name / MANIFEST).is_file()
    return BUNDLED / name if is_bundled else path


def is_remote(root: str | os.PathLike[str]) -> bool:
    """Whether a root is no folder of this machine."""
    text = os.fspath(root)
    return text.startswith("pipe:") or (SCHEME.match(text) is not None and not text.startswith(LOCAL))


class Store:
    """A folder of shards that is not on this machine. Picklable; safe in threads and over `fork`.

    Args:
        root: a URL, or `pipe:COMMAND` with `{}` where the file's name goes.
        retry: how long to go on asking.

    Raises:
        ShardError: `root` can't be used, or the library of its protocol is missing.
    """

    def __init__(self, root: str, retry: Retry = RETRY) -> None:
        self.root, self.retry = root, retry
        self.protocol = "pipe" if root.startswith("pipe:") else root.partition(":")[0].lower()
        if self.protocol == "pipe":
            if "{}" not in root:
                raise ShardError(
                    f"{root!r} has no {{}} where the file's name goes; write e.g. 'pipe:cat /data/{{}}'"
                )
        elif "::" in root:
            raise ShardError(
                f"chained URL {self.name!r} is not supported; give the plain one, shards are cached anyway"
            )
        else:
            self._class()
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "retry": self.retry, "protocol": self.protocol}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._random = random.Random()
        reset_after_fork(self)

    # addresses

    @property
    def name(self) -> str:
        """The root as it may be shown and logged: without user, password and query."""
        return shown(self.root)

    def url(self, name: str) -> str:
        """A file's address as it may be shown."""
        return self.address(name) if self.protocol == "pipe" else shown(self.address(name))

    def address(self, name: str) -> str:
        """A file's address (or command), with all that it takes to be let in."""
        if self.protocol == "pipe":
            return self.root.replace("{}", shlex.quote(name))
        if self.protocol in ("http", "https"):
            parts = urlsplit(self.root)
            return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/" + name, fragment=""))
        return self.root.rstrip("/") + "/" + name

    # reading

    def read(self, name: str) -> bytes:
        """A small file's bytes.

        Raises:
            FileNotFoundError: it is not there.
            ShardError: it is forbidden.
            StoreAwayError: it can't be had after some tries.
        """

        def once() -> bytes:
            with closing(self._open(name, 0)) as body:
                return b"".join(iter(lambda: body.read(CHUNK_BYTES), b""))

        return self.again(name, once, attempts=self.retry.manifest_attempts)

    def read_checked(
        self,
        name: str,
        limit: int,
        check: Callable[[bytes], str | None],
        stop: threading.Event | None = None,
        on_retry: Callable[[], None] | None = None,
    ) -> bytes:
        """A file of at most `limit` bytes; `check` says what is wrong with them, or None.

        Raises:
            ShardError: it is absent or forbidden, or what comes is wrong after all tries.
            StoreAwayError: it did not come after all tries.
            StoppedError: `stop` was set.
        """

        def once() -> bytes:
            data = bytearray()
            with closing(self._open(name, 0)) as body:
                while len(data) <= limit and (chunk := body.read(CHUNK_BYTES)):
                    data += chunk
            wrong = f"more than {limit} bytes" if len(data) > limit else check(bytes(data))
            if wrong:
                raise _WrongBytesError(wrong)
            return bytes(data)

        with self._missing(name):
            return self.again(name, once, stop=stop, on_retry=on_retry)

    def read_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Bytes `begin` to `end` of a file; None where the store gives whole files only.

        Raises:
            ShardError: it is absent or forbidden, or stays shorter after all tries.
            StoreAwayError: it did not come after all tries.
        """
        if self.protocol == "pipe":
            return None

        def once() -> bytes | None:
            data = bytearray()
            with closing(self._open(name, begin, end)) as body:
                if body.offset != begin:
                    return None
                while missing := end - begin - len(data):
                    chunk = body.read(missing)
                    if not chunk:
                        raise _WrongBytesError(f"ends after {begin + len(data)} bytes, its index says {end}")
                    data += chunk
            return bytes(data)

        with self._missing(name):
            return self.again(name, once)

    def copy(
        self,
        name: str,
        file: IO[bytes],
        size: int,
        sha256: str,
        stop: threading.Event | None = None,
        on_retry: Callable[[], None] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Copy a file of `size` bytes and `sha256` into the unbuffered local `file`, from its beginning.

        A connection that breaks is taken up where it ended, if the store can; wrong bytes are fetched anew.

        Raises:
            ShardError: the file is absent or forbidden, or what comes is wrong after all tries.
            StoreAwayError: it did not come after all tries.
            WriteError: the local file can't be written.
            StoppedError: `stop` was set.
        """
        digest, got, most = hashlib.sha256(), 0, 0

        def once() -> None:
            nonlocal digest, got, most
            try:
                with closing(self._open(name, got)) as body:
                    if body.offset != got:
                        digest, got = hashlib.sha256(), 0
                    if got == 0:
                        file.seek(0)
                    while chunk := body.read(CHUNK_BYTES):
                        if stop is not None and stop.is_set():
                            raise StoppedError
                        if got + len(chunk) > size:
                            raise _WrongBytesError(f"more than the {size} bytes of the manifest")
                        _write(file, chunk)
                        digest.update(chunk)
                        got += len(chunk)
                        most = max(most, got)
                        if on_bytes is not None:
                            on_bytes(len(chunk))
                if got < size:  # by a regular end: it is another file, or half of one
                    raise _WrongBytesError(f"ends after {got} of {size} bytes")
                if digest.hexdigest() != sha256:
                    raise _WrongBytesError(f"sha256 is {digest.hexdigest()[:12]}, the manifest says {sha256[:12]}")
            except Exception as error:
                # A store that has checked the bytes itself complains when all have come; and no range begins there.
                unsatisfiable = _status(error) == 416 or getattr(error, "errno", None) == errno.EINVAL
                if isinstance(error, _WrongBytesError) or got >= size or unsatisfiable:
                    digest, got = hashlib.sha256(), 0
                raise

        with self._missing(name):
            self.again(name, once, stop=stop, on_retry=on_retry, received=lambda: most)

    def again(
        self,
        name: str,
        once: Callable[[], T],
        *,
        attempts: int | None = None,
        stop: threading.Event | None = None,
        on_retry: Callable[[], None] | None = None,
        received: Callable[[], int] = lambda: 0,
    ) -> T:
        """`once()`, tried again as `retry` says.

        Args:
            received: how far tries have come; one that came further is the first to be counted.

        Raises:
            FileNotFoundError: the file is not there.
            ShardError: it is forbidden, or wrong after all tries.
            StoreAwayError: no try did it.
            StoppedError: `stop` was set.
        """
        attempts = attempts or self.retry.attempts
        stop = stop or threading.Event()
        failures = reached = 0
        while failures < attempts:
            if stop.is_set():
                raise StoppedError
            try:
                return once()
            except (ShardError, WriteError, StoppedError):
                raise
            except Exception as error:
                last = error
                if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
                    raise FileNotFoundError(errno.ENOENT, "no such file", self.url(name)) from error
                if _is_hopeless(error):
                    raise ShardError(f"cannot fetch {self.url(name)}: {self._why(error)}") from error
            came_further = received() > reached and not isinstance(last, _WrongBytesError)
            failures = 1 if came_further else failures + 1
            reached = received()
            if failures < attempts:
                if on_retry is not None:
                    on_retry()
                if failures == 3:  # a hiccup is nobody's business; a store that is down is
                    warnings.warn(f"{self.url(name)}: {self._why(last)}; trying on", stacklevel=2)
                stop.wait(self.retry.delay_s(failures, self._random.random()))
        why = f"{self._why(last)}, the last of {attempts} tries"
        if not isinstance(last, _WrongBytesError):
            raise StoreAwayError(self.url(name), f"{why}; check the address and the network") from last
        remedy = "restore the file; if a new set took its place, start again with that"
        raise ShardError(f"cannot fetch {self.url(name)}: {why}; {remedy}") from last

    @contextmanager
    def _missing(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ShardError(f"{self.url(name)} is missing; restore it or make the shards again") from error

    def _why(self, error: Exception) -> str:
        if _status(error) in (401, 403) or isinstance(error, PermissionError) or _is_credential(error):
            what = f"not allowed ({_line(error)})"
            match self.protocol:
                case "s3" | "s3a":
                    how = (
                        "set AWS_PROFILE or AWS_ACCESS_KEY_ID, or FSSPEC_S3='{\"anon\": true}' for a public bucket"
                    )
                    return f"{what}; {how} (S3 says so of absent files too, where listing is not allowed)"
                case "gs" | "gcs":
                    return (
                        f"{what}; run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS"
                    )
                case _:
                    return f"{what}; give credentials that may read it"
        if isinstance(error, TimeoutError):  # asyncio's and fsspec's are kinds of it
            return f"no bytes for {self.retry.stall_s:g} s"
        return _line(error)

    # the libraries

    def _open(self, name: str, offset: int, end: int | None = None) -> _Body:
        address, stall_s = self.address(name), self.retry.stall_s
        if self.protocol == "pipe":
            return _Pipe(address.removeprefix("pipe:"), stall_s)
        filesystem = self._connect()
        if self.protocol in ("http", "https"):
            return _Stream(filesystem, _open_http(filesystem, address, offset, end), stall_s)
        path = filesystem._strip_protocol(address)
        if self.protocol in ("s3", "s3a"):
            return _Stream(filesystem, _open_s3(filesystem, path, offset, end), stall_s)
        if getattr(filesystem, "async_impl", False):
            return _Blocks(filesystem, path, offset, stall_s, end)
        return _File(filesystem, path, offset, stall_s)

    def _class(self) -> Any:
        import fsspec
        from fsspec.registry import known_implementations

        try:
            return fsspec.get_filesystem_class(self.protocol)
        except ValueError:
            raise ShardError(
                f"unknown protocol {self.protocol!r} in {self.name!r}; give a folder, a pipe:, or a URL that "
                "fsspec knows (s3, gs, az, https, hf, ...)"
            ) from None
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or known_implementations[self.protocol]["class"]
            package = missing.partition(".")[0]
            raise ShardError(f"{self.protocol}:// needs {package}; `pip install {package}`") from None

    def _connect(self) -> Any:
        """The file system, made by and for this process: fsspec's event loop does not survive a fork."""
        with self._lock:
            if self._filesystem is None:
                import fsspec

                # An instance of our own, for its settings are changed below. Our tries replace the library's, else
                # they would multiply; and its time limits must not end a slow download that still moves.
                settings = fsspec.config.conf.get(self.protocol, {})
                made: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
                if self.protocol in ("http", "https"):
                    import aiohttp

                    limit = aiohttp.ClientTimeout(total=None, sock_connect=self.retry.stall_s)
                    client = {"timeout": limit, "trust_env": True}
                    made["client_kwargs"] = client | dict(settings.get("client_kwargs", {}))
                elif self.protocol in ("s3", "s3a"):
                    limits = {"connect_timeout": self.retry.stall_s, "read_timeout": self.retry.stall_s}
                    client = limits | {"retries": {"total_max_attempts": 1}}
                    made["config_kwargs"] = client | dict(settings.get("config_kwargs", {}))
                self._filesystem = self._class()(**self._class()._get_kwargs_from_urls(self.root) | made)
                if hasattr(self._filesystem, "retries"):
                    self._filesystem.retries = 1
                _kept.append(self._filesystem)
            return self._filesystem


def shown(url: str) -> str:
    """A URL without user, password and query; a `pipe:` as it is."""
    if url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _write(file: IO[bytes], chunk: bytes) -> None:
    view = memoryview(chunk)
    try:
        while len(view):
            view = view[file.write(view) :]
    except OSError as error:
        raise WriteError(str(error)) from error


# what went wrong


def _is_garbled(error: Exception) -> bool:
    """Whether what came could not be parsed: aiohttp says 400 of that, and no server has."""
    return any(type(each).__module__ == "aiohttp.http_exceptions" for each in (error, error.__cause__))


def _status(error: Exception) -> int | None:
    """The HTTP status that an exception of aiohttp (`status`) or gcsfs (`code`) carries."""
    if _is_garbled(error):
        return None
    for field in ("status", "code"):
        value = getattr(error, field, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return None


def _is_credential(error: Exception) -> bool:
    """botocore's and google-auth's complaints about credentials; both libraries may be absent."""
    return re.search(r"Credential|TokenRetrieval|SSOToken|ProfileNotFound", type(error).__name__) is not None


def _is_hopeless(error: Exception) -> bool:
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status not in LATER
    kinds = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError, _HopelessError)
    return isinstance(error, kinds) or _is_credential(error)


def _line(error: Exception) -> str:
    if _is_garbled(error):
        return "an answer that is no HTTP"
    status, reason = _status(error), getattr(error, "message", None)
    if status is not None and isinstance(reason, str):  # aiohttp's own text repeats the URL, query and all
        return f"HTTP {status} {reason}".strip()
    return first_line(error)


# bodies


class _Stream:
    """The open response of an async file system; `opening` gives its offset, its `read` and its `close`."""

    def __init__(self, filesystem: Any, opening: Any, stall_s: float) -> None:
        from fsspec.asyn import sync

        self._run, self._loop, self._stall_s = sync, filesystem.loop, stall_s
        self._error: Exception | None = None

        async def begin() -> Any:
            return await asyncio.wait_for(opening, stall_s)

        self.offset, self._read, self._close = self._run(self._loop, begin)

    def read(self, size: int) -> bytes:
        if self._error is not None:
            raise self._error
        data: bytes = self._run(self._loop, self._collect, size)
        return data

    async def _collect(self, size: int) -> bytes:
        """Gathers small network reads, so that threads change once a chunk; the limit is on each of them."""
        parts, missing = [], size
        try:
            while missing and (part := await asyncio.wait_for(self._read(missing), self._stall_s)):
                parts.append(part)
                missing -= len(part)
        except Exception as error:
            if not parts:
                raise
            self._error = error  # first hand over what came: the next connection goes on behind it
        return b"".join(parts)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._close)


async def _open_http(filesystem: Any, url: str, offset: int, end: int | None) -> tuple[int, Any, Any]:
    session = await filesystem.set_session()
    settings = dict(filesystem.kwargs)
    # Compressed on the way, sizes and ranges would be those of other bytes.
    headers = {**settings.pop("headers", {}), "Accept-Encoding": "identity"}
    headers |= _range(offset, end)
    response = await session.get(filesystem.encode_url(url), headers=headers, **settings)
    try:
        response.raise_for_status()
    except Exception:
        response.close()
        raise
    ranged = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
    return (offset if ranged else 0), response.content.read, response.close


async def _open_s3(filesystem: Any, path: str, offset: int, end: int | None) -> tuple[int, Any, Any]:
    bucket, key, version = filesystem.split_path(path)
    asked = _range(offset, end)
    if version:
        asked["VersionId"] = version
    response = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **asked)
    ranged = response.get("ContentRange", "").startswith(f"bytes {offset}-")
    return (offset if ranged else 0), response["Body"].read, response["Body"].close


def _range(offset: int, end: int | None) -> dict[str, str]:
    return {"Range": f"bytes={offset}-{'' if end is None else end - 1}"} if offset or end else {}


class _Blocks:
    """Ranged reads of an async file system that has no stream of its own (Google's, Azure's)."""

    def __init__(self, filesystem: Any, path: str, offset: int, stall_s: float, end: int | None) -> None:
        self._filesystem, self._path, self._stall_s = filesystem, path, stall_s
        self.offset = self._at = offset
        self._size = end

    def read(self, size: int) -> bytes:
        from fsspec.asyn import sync

        run, filesystem = sync, self._filesystem
        if self._size is None:  # a range beyond the end is an error to some stores
            self._size = int(run(filesystem.loop, filesystem._info, self._path, timeout=self._stall_s)["size"])
        end = min(self._at + max(size, BLOCK_BYTES), self._size)
        if self._at >= end:
            return b""
        block: bytes = run(
            filesystem.loop, filesystem._cat_file, self._path, start=self._at, end=end, timeout=self._stall_s
        )
        self._at += len(block)
        return block

    def close(self) -> None:
        pass


class _File:
    """A file of a blocking file system; each read has its thread, for only so can it be given up."""

    def __init__(self, filesystem: Any, path: str, offset: int, stall_s: float) -> None:
        self.offset, self._stall_s = offset, stall_s
        self._file = self._within(lambda: filesystem.open(path, "rb"))
        if offset:
            self._within(lambda: self._file.seek(offset))

    def _within(self, function: Callable[[], Any]) -> Any:
        result: list[Any] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                result.append(function())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=run, name="store", daemon=True)
        thread.start()
        thread.join(self._stall_s)
        if thread.is_alive():
            raise TimeoutError
        if failure:
            raise failure[0]
        return result[0]

    def read(self, size: int) -> bytes:
        data: bytes = self._within(lambda: self._file.read(size))
        return data

    def close(self) -> None:
        self._file.close()


class _Pipe:
    """The output of a shell command. It counts only if the command succeeds."""

    offset = 0

    def __init__(self, command: str, stall_s: float) -> None:
        self._stall_s = stall_s
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            bufsize=0,
            start_new_session=True,  # so that the command's own children end with it
        )

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        parts, missing = [], size
        while missing:
            if not poll.poll(self._stall_s * 1000):
                raise TimeoutError
            part = os.read(self._process.stdout.fileno(), min(missing, 1 << 20))
            if not part:
                self._finish()
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _finish(self) -> None:
        try:
            code = self._process.wait(self._stall_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        if code == 0:
            return
        self._complaints.seek(max(0, self._complaints.seek(0, os.SEEK_END) - 4096))
        said = self._complaints.read().decode("utf-8", "replace").strip().splitlines()
        text = f"the command ended with {code}" + (f": {said[-1]}" if said else "")
        # The shell's own codes: not executable, not found.
        raise (_HopelessError if code in (126, 127) else OSError)(text)

    def close(self) -> None:
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._complaints.close()


Root = str | os.PathLike[str] | Store
"""What a set of shards may be named by."""
