"""Downloads from a real server: order, retries, limits, and a reason for each failure."""

from __future__ import annotations

import errno
import gzip
import io
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_tools.fetch import Fetcher, FetchError, Limits
from finetune import UserError
from tests.data_tools.conftest import Result
from tests.data_tools.web import Handler, Web, send, web

QUICK = Limits(threads=4, stall_s=0.3, total_s=5, tries=3, max_bytes=3 << 20, first_delay_s=0.01)


@pytest.fixture
def site() -> Iterator[Web]:
    with web() as site:
        yield site


def reset(handler: Handler) -> None:
    """End the connection by RST, as a crashed server does."""
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def fetch(url: str, folder: Path, limits: Limits = QUICK) -> bytes | str:
    with Fetcher(limits, folder) as fetcher:
        result = fetcher.fetch(url)
    if isinstance(result, Path):
        data = result.read_bytes()
        result.unlink()
        result = data
    assert list(folder.iterdir()) == []
    return str(result) if isinstance(result, FetchError) else result


def test_order_and_bytes(site: Web, tmp_path: Path) -> None:
    bodies = {f"/{n}": bytes([n]) * (1 if n % 9 else 2 << 20) for n in range(200)}
    site.pages.update(bodies)
    first_may_end = threading.Event()

    def late(handler: Handler, _: int) -> None:  # the first answer comes last
        first_may_end.wait(30)
        send(handler, b"late")

    def last(handler: Handler, _: int) -> None:
        first_may_end.set()
        send(handler, b"last")

    site.pages["/0"], site.pages["/30"] = late, last
    items: list[str | None] = [*bodies, None]
    with Fetcher(replace(QUICK, stall_s=30), tmp_path) as fetcher:
        got = []
        for item, result in fetcher.map(items, lambda item: item and site.url + item):
            assert not isinstance(result, FetchError)
            got.append((item, result.read_bytes() if isinstance(result, Path) else result))
            assert isinstance(result, Path) == (len(got[-1][1] or b"") > 1 << 20)
    assert got == list({**bodies, "/0": b"late", "/30": b"last", None: None}.items())


def test_passing_failures_are_tried_again(site: Web, tmp_path: Path) -> None:
    def twice(fault: str) -> None:
        def page(handler: Handler, number: int) -> None:
            if number > 2:
                send(handler, b"there")
            elif fault == "cut":
                send(handler, b"the", length=5)
                handler.close_connection = True
            elif fault == "reset":
                send(handler, b"the", length=5)
                reset(handler)
            elif fault == "stall":
                send(handler, b"the", length=5)
                site.release.wait(30)
            elif fault == "silent":
                site.release.wait(30)
            else:
                send(handler, b"", int(fault), Retry_After="0")

        site.pages[f"/{fault}"] = page

    for fault in ("cut", "reset", "stall", "silent", "429", "500", "503"):
        twice(fault)
        assert fetch(f"{site.url}/{fault}", tmp_path) == b"there", fault
        assert site.asked[f"/{fault}"] == 3
        site.asked.clear()
        reason = fetch(f"{site.url}/{fault}", tmp_path, replace(QUICK, tries=2))
        assert isinstance(reason, str)
        assert reason.endswith(" (2 tries)")
        want = {"cut": "cut short", "reset": "reset", "stall": "timeout", "silent": "timeout"}
        assert want.get(fault, f"HTTP {fault}") in reason, reason


def test_final_answers_are_not_asked_for_again(site: Web, tmp_path: Path) -> None:
    site.pages.update({f"/{status}": status for status in (400, 401, 403, 404, 410, 204)})
    for status in (400, 401, 403, 404, 410, 204):
        assert fetch(f"{site.url}/{status}", tmp_path) == f"HTTP {status}"
    site.pages["/loop"] = lambda handler, _: send(handler, b"", 302, Location="/loop")
    assert fetch(f"{site.url}/loop", tmp_path) == "more than 5 redirects"
    assert {path: n for path, n in site.asked.items() if path != "/loop"} == {
        f"/{status}": 1 for status in (400, 401, 403, 404, 410, 204)
    }


def test_limits_of_size_and_time(site: Web, tmp_path: Path) -> None:
    site.pages["/large"] = bytes(4 << 20)
    assert fetch(f"{site.url}/large", tmp_path) == "too large: 4194304 bytes, the limit is 3145728"

    def chunked(handler: Handler, _: int) -> None:  # says nothing of its length
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")

    packed = gzip.compress(bytes(20 << 20))

    def bomb(handler: Handler, _: int) -> None:
        send(handler, packed, Content_Encoding="gzip")

    def drip(handler: Handler, _: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not site.release.wait(0.05):
            handler.wfile.write(bytes(1 << 16))

    site.pages.update({"/chunked": chunked, "/bomb": bomb, "/drip": drip})
    for name in ("chunked", "bomb"):
        assert fetch(f"{site.url}/{name}", tmp_path) == "too large: more than 3145728 bytes"
    assert "too slow" in str(fetch(f"{site.url}/drip", tmp_path, replace(QUICK, total_s=0.1)))


def test_owners_who_opt_out_are_heeded(site: Web, tmp_path: Path) -> None:
    site.pages["/a"] = lambda handler, _: send(handler, b"x", X_Robots_Tag="googlebot: noindex, noai")
    site.pages["/b"] = lambda handler, _: send(handler, b"x", X_Robots_Tag="noindex")
    assert "X-Robots-Tag: noai" in str(fetch(f"{site.url}/a", tmp_path))
    assert fetch(f"{site.url}/b", tmp_path) == b"x"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1/x", "connection refused (2 tries)"),
        ("http://no-such-host.invalid/x", "no such host (2 tries)"),
        ("file:///etc/passwd", "URLs that begin with 'file' are not read"),
        ("local:///etc/passwd", "are not read"),
        ("/etc/passwd", "not a URL"),
        ("zip://x::file:///etc/passwd", "are not read"),
        ("s3://x::file:///etc/passwd", "are not read"),
        ("data:image/png;base64,xxxx", "are not read"),
        ("http://[", "not a URL"),
        ("http://", "InvalidURL"),
        ("http://a\x00b/", ""),
        ("", "not a URL"),
    ],
)
def test_what_is_no_url_of_a_picture(url: str, says: str, tmp_path: Path) -> None:
    reason = fetch(url, tmp_path, replace(QUICK, tries=2))
    assert isinstance(reason, str)
    assert says in reason
    assert "\n" not in reason


def test_what_needs_no_download_is_not_taken_ahead(site: Web, tmp_path: Path) -> None:
    """Rows of a table with pictures in it: hundreds of them would be in memory."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(600):
            taken.append(number)
            yield number

    site.pages["/one"] = b"one"
    with Fetcher(QUICK, tmp_path) as fetcher:
        pairs = fetcher.map(items(), lambda number: f"{site.url}/one" if number % 300 == 50 else None)
        ahead = [len(taken) - number for number, _ in pairs]
    assert (ahead[:50], len(ahead)) == ([1] * 50, 600)
    assert ahead[299] == 1 and max(ahead) <= 8 * QUICK.threads


def test_leaving_early_ends_the_downloads(site: Web, tmp_path: Path) -> None:
    site.pages["/0"] = b"first"
    site.pages["/1"] = lambda handler, _: (send(handler, b"", length=9), site.release.wait(30))  # type: ignore[func-returns-value]
    with Fetcher(replace(QUICK, tries=99), tmp_path) as fetcher:
        results = fetcher.map([f"{site.url}/{n}" for n in (0, 1, 1, 1, 1, 1, 1)], str)
        assert next(results)[1] == b"first"
        results.close()  # joins the threads: it would hang if they went on trying
    assert threading.active_count() < 20


def test_object_stores_are_read_through_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="pictures")
        s3.put_object(Bucket="pictures", Key="a b.png", Body=b"picture")
        s3.put_object(Bucket="pictures", Key="large.png", Body=bytes(4 << 20))
        assert fetch("s3://pictures/a b.png", tmp_path) == b"picture"
        assert fetch("s3://pictures/none.png", tmp_path) == "no such file"
        assert "too large" in str(fetch("s3://pictures/large.png", tmp_path))
        assert fetch("s3://pictures/large.png", tmp_path, replace(QUICK, max_bytes=9 << 20)) == bytes(4 << 20)
    finally:
        server.stop()


def test_a_full_disk_ends_the_downloads(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ours, no fault of the picture, which may be tried again once there is room."""
    store = MemoryFileSystem()
    store.pipe("/pictures/large.png", bytes(4 << 20))

    class Full(io.BytesIO):
        name = str(tmp_path / "spooled")

        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (store, url.removeprefix("s3:/")))
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **_: Full())
    (tmp_path / "list.csv").write_text("url,caption\ns3://pictures/large.png,a cat\n")
    result = cli("ingest", "table", tmp_path / "list.csv", "--out", tmp_path / "out")
    assert (result.code, "no space left on device while writing" in result.err) == (2, True)
    assert "data-tools-" in result.err  # the folder of downloads


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="gs:// needs a package"):
            fetch("gs://bucket/a.png", tmp_path)
