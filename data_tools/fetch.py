"""Download many files at once, in the order asked for; what fails has a reason.

Threads download ahead of who reads, a bounded number of files. Bodies above a megabyte wait on disk, so memory
stays bounded whatever the servers send. What may pass (no connection, a stall, a body cut short, HTTP 408, 429 and
5xx) is tried again after a growing, random delay, or the one that the server asks for; other answers are final.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from finetune import DISK_FULL, UserError, __version__
from finetune.data.shards.files import naming

Item = TypeVar("Item")

SCHEMES = ("abfs", "abfss", "az", "gcs", "gs", "hf", "s3", "s3a")
"""What fsspec reads for us, besides http and https. Not `file`: a table from elsewhere may not name our files."""
_PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))
_SPOOL_BYTES = 1 << 20
_CHUNK = 1 << 16
_MAX_DELAY_S = 60.0
_MAX_REDIRECTS = 5
_AHEAD = 8  # files per thread that may be ready: one slow server doesn't stop the others at once
_OPT_OUTS = frozenset(("noai", "noimageai"))


class FetchError(Exception):
    """A file that can't be had; the text is the reason."""


class _PassingError(FetchError):
    """One more try may succeed, after `delay_s` if the server said so."""

    def __init__(self, reason: str, delay_s: float | None = None) -> None:
        super().__init__(reason)
        self.delay_s = delay_s


@dataclass(frozen=True)
class Limits:
    """How a `Fetcher` downloads."""

    threads: int = 32
    stall_s: float = 10.0  # without a byte
    total_s: float = 300.0  # of one try
    tries: int = 3
    max_bytes: int = 256 << 20
    first_delay_s: float = 1.0  # before the second try; doubles


class Fetcher:
    """Downloads with the given limits; large files are put into `folder`, and belong to the caller.

    with tempfile.TemporaryDirectory() as folder, Fetcher(Limits(), Path(folder)) as fetcher:
        for url, result in fetcher.map(urls, str):
            ...
    """

    def __init__(self, limits: Limits, folder: Path) -> None:
        self.limits, self.folder = limits, folder
        self._stop = threading.Event()
        self._local = threading.local()
        self._random = random.Random()  # delays alone: no result depends on it

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def map(
        self, items: Iterable[Item], url: Callable[[Item], str | None]
    ) -> Generator[tuple[Item, bytes | Path | FetchError | None], None, None]:
        """(item, what its URL holds: bytes, a temporary file, or why not) in the order of items; None without URL.

        Raises:
            UserError: a library for the URL's scheme is missing.
        """
        queue: deque[tuple[Item, Future[bytes | Path | FetchError] | None]] = deque()
        pool = ThreadPoolExecutor(self.limits.threads, thread_name_prefix="fetch")
        try:
            for item in items:
                where = url(item)
                queue.append((item, None if where is None else pool.submit(self.fetch, where)))
                # What has no URL may hold a picture's bytes: it waits only for downloads that come before it.
                while queue and (queue[0][1] is None or len(queue) == _AHEAD * self.limits.threads):
                    item, future = queue.popleft()
                    yield item, None if future is None else future.result()
            for item, future in queue:
                yield item, None if future is None else future.result()
        finally:
            self._stop.set()  # downloads under way end at their next chunk
            pool.shutdown(cancel_futures=True)
            self._stop.clear()

    def fetch(self, url: str) -> bytes | Path | FetchError:
        """One file, tried as often as the limits say."""
        delay_s = self.limits.first_delay_s
        for attempt in range(1, self.limits.tries + 1):
            try:
                return self._once(url)
            except _PassingError as error:
                last: FetchError = error
                if attempt == self.limits.tries:
                    break
                wait_s = delay_s * self._random.uniform(0.5, 1.5) if error.delay_s is None else error.delay_s
                if self._stop.wait(min(wait_s, _MAX_DELAY_S)):
                    break
                delay_s *= 2
            except FetchError as error:
                return error
        tries = f" ({attempt} tries)" if attempt > 1 else ""
        return FetchError(f"{last}{tries}")

    def _once(self, url: str) -> bytes | Path:
        try:
            scheme = urlsplit(url).scheme.lower()
        except ValueError as error:
            raise FetchError(f"not a URL ({error})") from None
        if scheme in ("http", "https"):
            return self._http(url)
        if "::" in url or scheme not in SCHEMES:  # "::" would chain file systems, to one on this machine perhaps
            raise FetchError(f"URLs that begin with {scheme!r} are not read" if scheme else "not a URL")
        return self._store(url, scheme)

    def _http(self, url: str) -> bytes | Path:
        import requests

        limits = self.limits
        begin = time.monotonic()
        try:
            with self._session().get(url, stream=True, timeout=(limits.stall_s, limits.stall_s)) as response:
                status = response.status_code
                if status in _PASSING:
                    raise _PassingError(f"HTTP {status}", _seconds(response.headers.get("Retry-After")))
                if status != 200:
                    raise FetchError(f"HTTP {status}")
                directives = response.headers.get("X-Robots-Tag", "").lower().replace(":", ",").split(",")
                if opted := sorted(_OPT_OUTS & {directive.strip() for directive in directives}):
                    raise FetchError(f"its owner doesn't want it used for this (X-Robots-Tag: {opted[0]})")
                stated = response.headers.get("Content-Length", "")
                if stated.isdigit() and int(stated) > limits.max_bytes:
                    raise FetchError(f"too large: {stated} bytes, the limit is {limits.max_bytes}")
                with _Body(self.folder, limits.max_bytes) as body:
                    for chunk in response.iter_content(_CHUNK):
                        body.add(chunk)
                        if time.monotonic() - begin > limits.total_s:
                            raise FetchError(f"too slow: {body.size} bytes in {limits.total_s:g} s")
                        if self._stop.is_set():
                            raise FetchError("stopped")
                    return body.finish()
        except requests.Timeout:
            raise _PassingError(f"timeout: nothing came in {limits.stall_s:g} s") from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise _PassingError(_why(error)) from None
        except requests.TooManyRedirects:
            raise FetchError(f"more than {_MAX_REDIRECTS} redirects") from None
        except (requests.RequestException, ValueError) as error:
            raise FetchError(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}") from None

    def _session(self) -> Any:
        """A session of this thread: it keeps connections open."""
        import http.cookiejar

        import requests

        if not hasattr(self._local, "session"):
            session = requests.Session()
            session.max_redirects = _MAX_REDIRECTS
            session.headers["User-Agent"] = f"ldm-finetune/{__version__}"
            session.headers["Accept"] = "image/*,*/*;q=0.5"
            # None are kept: they would add up over millions of servers.
            session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
            self._local.session = session
        return self._local.session

    def _store(self, url: str, scheme: str) -> bytes | Path:
        import fsspec

        try:
            store, path = fsspec.core.url_to_fs(url)
            size = store.info(path)["size"]
            if size is not None and size > self.limits.max_bytes:
                raise FetchError(f"too large: {size} bytes, the limit is {self.limits.max_bytes}")
            with _Body(self.folder, self.limits.max_bytes) as body, store.open(path, "rb") as file:
                while chunk := file.read(_CHUNK * 16):
                    body.add(chunk)
                return body.finish()
        except FetchError:
            raise
        except ImportError as error:
            raise UserError(f"{scheme}:// needs a package that is not installed ({error})") from None
        except (FileNotFoundError, IsADirectoryError):
            raise FetchError("no such file") from None
        except PermissionError as error:
            raise FetchError(f"access denied ({str(error).partition(chr(10))[0][:200]})") from None
        except Exception as error:  # each store has errors of its own
            if isinstance(error, OSError) and error.errno in DISK_FULL:  # our disk, where its file was to wait
                raise
            what = str(error).partition("\n")[0][:200]
            raise _PassingError(f"{type(error).__name__}: {what}" if what else type(error).__name__) from None


class _Body:
    """What has come of a file: in memory at first, on disk when it grows."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.size = 0
        self.chunks: list[bytes] = []
        self.file: IO[bytes] | None = None
        self.kept = False

    def __enter__(self) -> _Body:
        return self

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size > self.max_bytes:
            raise FetchError(f"too large: more than {self.max_bytes} bytes")
        with naming(self.folder):
            if self.file is None and self.size > _SPOOL_BYTES:
                self.file = tempfile.NamedTemporaryFile(dir=self.folder, delete=False)  # noqa: SIM115 (closed below)
                self.file.writelines(self.chunks)
                self.chunks.clear()
            if self.file is None:
                self.chunks.append(chunk)
            else:
                self.file.write(chunk)

    def finish(self) -> bytes | Path:
        if self.file is None:
            return b"".join(self.chunks)
        with naming(self.folder):
            self.file.close()
        self.kept = True
        return Path(self.file.name)

    def __exit__(self, *_: object) -> None:
        if self.file is not None and not self.kept:
            with contextlib.suppress(OSError):
                self.file.close()
            Path(self.file.name).unlink(missing_ok=True)


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for; None if it names a date, or nothing."""
    return float(retry_after) if retry_after is not None and retry_after.strip().isdigit() else None


def _why(error: Exception) -> str:
    """The cause at the bottom of a connection error, without the addresses of Python objects."""
    text = repr(error)
    for sign, reason in (
        ("NameResolutionError", "no such host"),
        ("IncompleteRead", "the body is cut short"),
        ("InvalidChunkLength", "the body is cut short"),
        ("ReadTimeout", "timeout: the body stalled"),
        ("Read timed out", "timeout: the body stalled"),
        ("timed out", "timeout"),
        ("SSLError", "no secure connection"),
        ("CERTIFICATE", "no secure connection"),
        ("Connection refused", "connection refused"),
        ("reset by peer", "connection reset"),
        ("RemoteDisconnected", "the server closed the connection"),
    ):
        if sign in text:
            return reason
    return f"no connection ({type(error).__name__})"
