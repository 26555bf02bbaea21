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

import errno
import hashlib
import os
import random
import re
import shlex
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from finetune import BUNDLED
from finetune.data.shards.failures import http_status, in_one_line, is_forbidden, is_hopeless
from finetune.data.shards.files import MANIFEST, ShardError
from finetune.data.shards.forks import reset_after_fork
from finetune.data.shards.streams import BlockingFile, Blocks, Body, Pipe, Stream, open_http, open_s3

T = TypeVar("T")

CHUNK_BYTES = 4 << 20  # read, hashed and written at once: large beside the cost of a hop between threads
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)")
FOLDED = re.compile(r"(?!file:|local:)[A-Za-z][A-Za-z0-9+.-]+:/")
LOCAL = ("file://", "local://")


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


# which kind of root

# fsspec's file systems, one a store that was used. They are never let go: closed in a forked child, when the
# garbage is collected there, each would wait a second for the parent's thread.
_kept: list[Any] = []


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
                unsatisfiable = http_status(error) == 416 or getattr(error, "errno", None) == errno.EINVAL
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
                if isinstance(error, FileNotFoundError) or http_status(error) in (404, 410):
                    raise FileNotFoundError(errno.ENOENT, "no such file", self.url(name)) from error
                if is_hopeless(error):
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
        if is_forbidden(error):
            what = f"not allowed ({in_one_line(error)})"
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
        return in_one_line(error)

    # the libraries

    def _open(self, name: str, offset: int, end: int | None = None) -> Body:
        address, stall_s = self.address(name), self.retry.stall_s
        if self.protocol == "pipe":
            return Pipe(address.removeprefix("pipe:"), stall_s)
        filesystem = self._connect()
        if self.protocol in ("http", "https"):
            return Stream(filesystem, open_http(filesystem, address, offset, end), stall_s)
        path = filesystem._strip_protocol(address)
        if self.protocol in ("s3", "s3a"):
            return Stream(filesystem, open_s3(filesystem, path, offset, end), stall_s)
        if getattr(filesystem, "async_impl", False):
            return Blocks(filesystem, path, offset, stall_s, end)
        return BlockingFile(filesystem, path, offset, stall_s)

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


Root = str | os.PathLike[str] | Store
"""What a set of shards may be named by."""
