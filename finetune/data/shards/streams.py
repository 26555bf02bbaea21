"""A remote file's bytes as they come: by HTTP, from S3, by ranges, from blocking file systems and commands."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from typing import Any, Protocol

from finetune.data.shards.failures import HopelessError

BLOCK_BYTES = 8 << 20  # of ranged reads, where a store can't stream: one request each


class Body(Protocol):
    """A file's bytes from `offset` on (0 where the store can't start elsewhere)."""

    offset: int

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end; raises whatever the store's library does, or `TimeoutError`."""

    def close(self) -> None: ...


class Stream:
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


async def open_http(filesystem: Any, url: str, offset: int, end: int | None) -> tuple[int, Any, Any]:
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


async def open_s3(filesystem: Any, path: str, offset: int, end: int | None) -> tuple[int, Any, Any]:
    bucket, key, version = filesystem.split_path(path)
    asked = _range(offset, end)
    if version:
        asked["VersionId"] = version
    response = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **asked)
    ranged = response.get("ContentRange", "").startswith(f"bytes {offset}-")
    return (offset if ranged else 0), response["Body"].read, response["Body"].close


def _range(offset: int, end: int | None) -> dict[str, str]:
    return {"Range": f"bytes={offset}-{'' if end is None else end - 1}"} if offset or end else {}


class Blocks:
    """Ranged reads of an async file system that has no stream of its own (Google's, Azure's)."""

    def __init__(self, filesystem: Any, path: str, offset: int, stall_s: float, end: int | None) -> None:
        self._filesystem, self._path, self._stall_s = filesystem, path, stall_s
        self.offset = self._at = offset
        self._size = end

    def read(self, size: int) -> bytes:
        from fsspec.asyn import sync

        filesystem = self._filesystem
        if self._size is None:  # a range beyond the end is an error to some stores
            self._size = int(sync(filesystem.loop, filesystem._info, self._path, timeout=self._stall_s)["size"])
        end = min(self._at + max(size, BLOCK_BYTES), self._size)
        if self._at >= end:
            return b""
        block: bytes = sync(
            filesystem.loop, filesystem._cat_file, self._path, start=self._at, end=end, timeout=self._stall_s
        )
        self._at += len(block)
        return block

    def close(self) -> None:
        pass


class BlockingFile:
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


class Pipe:
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
        raise (HopelessError if code in (126, 127) else OSError)(text)

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
