"""Files from elsewhere: whole and right in the end, or one line that says why not."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import BUNDLED
from finetune.data.shards import Retry, ShardError, Store
from finetune.data.shards.store import StoppedError, StoreAwayError, resolve
from tests.data.servers import Fault, Server

QUICK = Retry(attempts=4, manifest_attempts=4, first_s=0.001, cap_s=0.002, stall_s=20.0)
IMPATIENT = Retry(attempts=4, manifest_attempts=4, first_s=0.001, cap_s=0.002, stall_s=0.3)
SIZE = 300_000


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = np.random.default_rng(0).bytes(SIZE)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.tar").write_bytes(data)
    return data


@pytest.fixture
def server(tmp_path: Path, content: bytes) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


def copied(store: Store, content: bytes, folder: Path, **more: Any) -> int:
    """Copy `a.tar`, compare it, and return the number of retries."""
    retries: list[None] = []
    with (folder / "copy").open("w+b", buffering=0) as file:
        file.truncate(len(content))
        store.copy(
            "a.tar",
            file,
            len(content),
            hashlib.sha256(content).hexdigest(),
            on_retry=lambda: retries.append(None),
            **more,
        )
    assert (folder / "copy").read_bytes() == content
    return len(retries)


FAULTS = [
    Fault("status", status=500),
    Fault("status", status=503),
    Fault("status", status=429),
    Fault("reset", after=0),
    Fault("reset", after=100_000),
    Fault("cut", after=100_000),
    Fault("short", after=100_000),
    Fault("flip", after=250_000),
    Fault("stall", after=50_000),
    Fault("html"),
    Fault("long"),
    Fault("garbled"),
]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.after}")
def test_a_fault_is_mended_by_another_try(
    server: Server, content: bytes, tmp_path: Path, fault: Fault, ranges: bool
) -> None:
    server.ranges, server.faults = ranges, {"a.tar": [fault]}
    store = Store(server.url + "/far", IMPATIENT if fault.kind == "stall" else QUICK)
    assert copied(store, content, tmp_path) == 1
    assert server.count("a.tar") == 2


@pytest.mark.filterwarnings("ignore:.*trying on")
def test_several_faults_in_a_row_and_one_too_many(server: Server, content: bytes, tmp_path: Path) -> None:
    faults = [Fault("status"), Fault("cut", after=0), Fault("flip", after=7)]
    server.faults = {"a.tar": list(faults)}
    assert copied(Store(server.url + "/far", QUICK), content, tmp_path) == 3
    server.faults = {"a.tar": [*faults, Fault("status", status=502)]}
    with pytest.raises(StoreAwayError, match=re.escape(f"cannot fetch {server.url}/far/a.tar: HTTP 502")):
        copied(Store(server.url + "/far", QUICK), content, tmp_path)


@pytest.mark.parametrize("before", [[], [Fault("flip", after=5)]], ids=["", "after wrong bytes"])
def test_a_broken_body_is_taken_up_where_it_ended(
    server: Server, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[Fault]
) -> None:
    monkeypatch.setattr("finetune.data.shards.store.CHUNK_BYTES", 10_000)
    server.faults = {"a.tar": [*before, Fault("cut on release", after=100_000)]}
    received = 0

    def on_bytes(size: int) -> None:
        nonlocal received
        received += size
        if received == len(before) * SIZE + 100_000:  # nothing is on its way when the connection ends
            server.release.set()

    copied(Store(server.url + "/far", QUICK), content, tmp_path, on_bytes=on_bytes)
    assert [request.range for request in server.requests] == [None] * (len(before) + 1) + ["bytes=100000-"]
    assert received == SIZE * (len(before) + 1)


def test_tries_count_from_the_last_that_brought_more(
    server: Server, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that ends every connection after 50 kB; a store that starts at the beginning again brings no more."""
    monkeypatch.setattr("finetune.data.shards.store.CHUNK_BYTES", 10_000)
    store = Store(server.url + "/far", replace(IMPATIENT, attempts=2))
    server.faults = {"a.tar": [Fault("stall", after=50_000)] * 5}
    assert copied(store, content, tmp_path) == 5
    assert [request.range for request in server.requests[1:]] == [
        f"bytes={n}-" for n in range(50_000, SIZE, 50_000)
    ]
    server.ranges, server.faults = False, {"a.tar": [Fault("stall", after=50_000)] * 2}
    with pytest.raises(StoreAwayError, match="the last of 2 tries"):
        copied(store, content, tmp_path)


@pytest.mark.filterwarnings("ignore:.*trying on")
@pytest.mark.parametrize(
    ("fault", "kind", "what"),
    [
        (Fault("flip", after=5), ShardError, "sha256 is [0-9a-f]{12}, the manifest says [0-9a-f]{12}"),
        (Fault("short", after=100_000), ShardError, "ends after 100000 of 300000 bytes"),
        (Fault("long"), ShardError, "more than the 300000 bytes"),
        (Fault("html"), ShardError, "ends after 26 of 300000 bytes"),
        (Fault("stall", after=10), StoreAwayError, "no bytes for 0.3 s"),
        (Fault("status", status=500), StoreAwayError, "HTTP 500"),
        (Fault("garbled"), StoreAwayError, "an answer that is no HTTP"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_what_stays_wrong_is_one_line(
    server: Server, content: bytes, tmp_path: Path, fault: Fault, kind: type[Exception], what: str
) -> None:
    server.ranges, server.faults = False, {"a.tar": [fault] * 4}
    with pytest.raises(kind, match=what) as caught:
        copied(Store(server.url + "/far", IMPATIENT), content, tmp_path)
    line = str(caught.value)
    assert "\n" not in line and f"{server.url}/far/a.tar" in line and "4 tries" in line
    assert server.count("a.tar") == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_will_not_be_had_is_asked_for_once(
    server: Server, content: bytes, tmp_path: Path, status: int
) -> None:
    server.faults = {"a.tar": [Fault("status", status=status)] * 4}
    what = "is missing" if status in (404, 410) else "not allowed" if status in (401, 403) else "HTTP 400"
    with pytest.raises(ShardError, match=what) as caught:
        copied(Store(server.url + "/far", QUICK), content, tmp_path)
    assert server.url in str(caught.value) and server.count("a.tar") == 1


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_part_of_a_file(server: Server, content: bytes, ranges: bool) -> None:
    store, server.ranges = Store(server.url + "/far", QUICK), ranges
    for begin, end in ((0, 512), (70_000, 70_001), (1000, SIZE)):
        server.faults = {"a.tar": [Fault("status", status=503)]}
        assert store.read_range("a.tar", begin, end) == (content[begin:end] if ranges or begin == 0 else None)
        assert server.requests[-1].range == f"bytes={begin}-{end - 1}"
    with pytest.raises(ShardError, match="b.tar is missing"):
        store.read_range("b.tar", 0, 10)


def test_a_part_of_a_file_that_is_shorter(server: Server, content: bytes) -> None:
    store = Store(server.url + "/far", QUICK)
    with pytest.raises(ShardError, match=f"ends after {SIZE} bytes"), pytest.warns(UserWarning, match="trying on"):
        store.read_range("a.tar", SIZE - 10, SIZE + 10)


def test_slow_is_not_stalled(server: Server, content: bytes, tmp_path: Path) -> None:
    server.faults = {"a.tar": [Fault("trickle")]}  # 0.6 s in all, 0.05 s between two pieces
    assert copied(Store(server.url + "/far", IMPATIENT), content, tmp_path) == 0


def test_nobody_there(tmp_path: Path, content: bytes) -> None:
    gone = Server(tmp_path)
    gone.close()
    trying = pytest.warns(UserWarning, match="trying on")
    with pytest.raises(StoreAwayError, match="4 tries; check the address and the network"), trying:
        Store(gone.url, QUICK).read("manifest.json")


def test_tokens_are_sent_but_not_shown(server: Server, content: bytes, tmp_path: Path) -> None:
    store = Store(f"http://user:secret@{server.address}/far/?sig=secret", QUICK)
    assert copied(store, content, tmp_path) == 0
    assert [(request.path, request.query) for request in server.requests] == [("/far/a.tar", "sig=secret")]
    with pytest.raises(ShardError) as caught:
        store.read_checked("absent.npy", 100, lambda data: None)
    server.faults = {"a.tar": [Fault("status", status=403)]}
    with pytest.raises(ShardError) as forbidden:
        copied(store, content, tmp_path)
    assert "secret" not in f"{caught.value} {forbidden.value} {store.name}"


def test_a_small_file_that_is_too_large_is_not_read_to_its_end(server: Server) -> None:
    with pytest.raises(ShardError, match="more than 1000 bytes"), pytest.warns(UserWarning, match="trying on"):
        Store(server.url + "/far", QUICK).read_checked("a.tar", 1000, lambda data: None)


def test_stop_ends_the_tries(server: Server, content: bytes, tmp_path: Path) -> None:
    stop = threading.Event()
    server.faults = {"a.tar": [Fault("status")] * 4}
    server.on_request = lambda name: stop.set()
    with pytest.raises(StoppedError):
        copied(
            Store(server.url + "/far", Retry(attempts=4, first_s=1000, cap_s=1000)), content, tmp_path, stop=stop
        )
    assert server.count("a.tar") == 1


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_backoff_is_within_its_cap(failures: int, draw: float) -> None:
    retry = Retry()
    assert 0 <= retry.delay_s(failures, draw) <= min(retry.cap_s, retry.first_s * 2 ** min(failures - 1, 20))


# --- pipes


def test_pipe(content: bytes, tmp_path: Path) -> None:
    store = Store(f"pipe:cat {tmp_path}/far/{{}}", QUICK)
    assert copied(store, content, tmp_path) == 0
    (tmp_path / "far" / "it's; a $name").write_bytes(b"quoted")
    assert store.read("it's; a $name") == b"quoted"


def test_a_pipe_counts_only_if_its_command_succeeds(content: bytes, tmp_path: Path) -> None:
    fails_once = f"cat {tmp_path}/far/{{}}; if [ ! -e {tmp_path}/seen ]; then touch {tmp_path}/seen; exit 3; fi"
    assert copied(Store(f"pipe:{fails_once}", QUICK), content, tmp_path) == 1
    store = Store(f"pipe:cat {tmp_path}/far/{{}}; echo no such luck >&2; exit 3", QUICK)
    with (
        pytest.raises(StoreAwayError, match="the command ended with 3: no such luck, the last of 4"),
        pytest.warns(UserWarning, match="trying on"),
    ):
        copied(store, content, tmp_path)


def test_a_pipe_without_a_command_is_refused_at_once(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="has no {} where the file's name goes"):
        Store("pipe:cat a.tar")
    with pytest.raises(ShardError, match="the command ended with 127: .*not found"):
        copied(Store("pipe:no-such-command-here {}", Retry()), content, tmp_path)


def test_a_silent_pipe_is_ended_with_its_children(content: bytes, tmp_path: Path) -> None:
    # The lock is free only when the command and the child that inherited it are gone.
    lock = tmp_path / "lock"
    command = (
        f"exec 9>{lock}; flock -n 9 || exit 5; if [ -e {tmp_path}/once ]; then cat {tmp_path}/far/{{}}; exit; fi"
    )
    command += f"; touch {tmp_path}/once; head -c 1000 {tmp_path}/far/{{}}; sleep 100"
    assert copied(Store(f"pipe:{command}", IMPATIENT), content, tmp_path) == 1


# --- other file systems


def test_memory(content: bytes, tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/far/a.tar", content)
    store = Store("memory://far", QUICK)
    assert copied(store, content, tmp_path) == 0
    with pytest.raises(FileNotFoundError):
        store.read("manifest.json")


def test_stores_without_a_stream_are_read_by_ranges(content: bytes, tmp_path: Path, monkeypatch: Any) -> None:
    """As Google's and Azure's are: an async file system that knows sizes and ranges."""
    import fsspec
    from fsspec.asyn import AsyncFileSystem

    asked: list[tuple[int, int]] = []
    failures = [OSError("503"), None, OSError("reset"), None, None, None, None]

    class Ranged(AsyncFileSystem):
        protocol = "ranged"

        async def _info(self, path: str, **_: Any) -> dict[str, Any]:
            if not path.endswith("a.tar"):
                raise FileNotFoundError(path)
            return {"size": len(content)}

        async def _cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
            asked.append((start, end))
            if failure := failures.pop(0):
                raise failure
            return content[start:end]

    monkeypatch.setattr("finetune.data.shards.streams.BLOCK_BYTES", 100_000)
    monkeypatch.setattr("finetune.data.shards.store.CHUNK_BYTES", 100_000)
    fsspec.register_implementation("ranged", Ranged, clobber=True)
    assert copied(Store("ranged://far", QUICK), content, tmp_path) == 2
    cuts = [(0, 100_000), (0, 100_000), (100_000, 200_000), (100_000, 200_000), (200_000, 300_000)]
    assert asked == cuts
    asked.clear()
    failures[:] = [OSError("503"), None]
    assert Store("ranged://far", QUICK).read_range("a.tar", 250, 1234) == content[250:1234]
    assert asked == [(250, 1234)] * 2
    with pytest.raises(ShardError, match="is missing"):
        Store("ranged://far", QUICK).read_checked("b.npy", 10, lambda data: None)


def test_a_blocking_store_that_hangs_is_given_up(content: bytes, tmp_path: Path) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    release, calls = threading.Event(), []

    class Hangs(MemoryFileSystem):
        protocol = "hangs"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return MemoryFileSystem._strip_protocol(path.replace("hangs://", "memory://"))

        def _open(self, path: str, *args: Any, **more: Any) -> Any:
            calls.append(path)
            if len(calls) == 1:
                release.wait(60)
            return super()._open(path, *args, **more)

    fsspec.register_implementation("hangs", Hangs, clobber=True)
    fsspec.filesystem("memory").pipe("/far/a.tar", content)
    try:
        assert copied(Store("hangs://far", IMPATIENT), content, tmp_path) == 1
    finally:
        release.set()


# --- roots


def test_what_is_local_and_what_is_not(tmp_path: Path) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == resolve(f"file://{tmp_path}") == tmp_path
    assert resolve("shards/v1:2") == Path("shards/v1:2")
    assert resolve("fluent-emoji") == BUNDLED / "fluent-emoji"
    assert resolve("fluent") == Path("fluent") and resolve("emoji-base") == Path("emoji-base")  # a model
    assert resolve(Path("fluent-emoji")) == resolve("./fluent-emoji") == Path("fluent-emoji")
    far = resolve("https://host/latents/")
    assert isinstance(far, Store) and far.url("a.tar") == "https://host/latents/a.tar" and resolve(far) is far


def test_roots_that_cannot_be_used() -> None:
    for url in ("s3://bucket/latents", "https://host/latents", "pipe:cat x/{}"):
        with pytest.raises(ShardError, match="a folder of this machine is needed"):
            resolve(Path(url))
    with pytest.raises(ShardError, match="unknown protocol 'nope'"):
        Store("nope://host/latents")
    with pytest.raises(ShardError, match="chained URL"):
        Store("simplecache::https://host/latents")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import known_implementations

    entry = {"class": "library_that_is_not_there.sub.FileSystem", "err": "install it"}
    monkeypatch.setitem(known_implementations, "absent", entry)
    with pytest.raises(ShardError, match="`pip install library_that_is_not_there`"):
        Store("absent://bucket/latents")


def _child(store: Store, queue: Any) -> None:
    queue.put(store.read("a.tar"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_used_store_works_in_a_child(server: Server, content: bytes, method: str) -> None:
    store = Store(server.url + "/far", QUICK)
    assert store.read("a.tar") == content
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(store, queue))
    child.start()
    assert queue.get(timeout=60) == content
    child.join()
    assert pickle.loads(pickle.dumps(store)).read("a.tar") == content
