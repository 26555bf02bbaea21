"""Foreign tars: WebDataset's samples as `webdataset` reads them, and damage that is named and never passed on."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_tools.tars import TarSample, Unreadable, iter_tar

BLOCK = tarfile.BLOCKSIZE


def tar_bytes(files: list[tuple[Any, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, or a TarInfo with a size and type of its own; content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "a.txt") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(path: Path, content: bytes, **options: Any) -> tuple[dict[str, dict[str, bytes]], list[Unreadable]]:
    path.write_bytes(content)
    items = list(iter_tar(path, **options))
    samples = [item for item in items if isinstance(item, TarSample)]
    assert len({sample.key for sample in samples}) == len(samples)
    return {s.key: s.members for s in samples}, [item for item in items if isinstance(item, Unreadable)]


def payload(seed: int, size: int) -> bytes:
    """Bytes that carry their own checksum."""
    body = random.Random(seed).randbytes(size)
    return hashlib.sha256(body).digest() + body


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path: Path, format: int) -> None:
    import webdataset

    names = [
        "./v1.0/a.jpg", "./v1.0/a.json", "dir.d/b.Mask.PNG", "dir.d/b.JPG", "__meta__/info.json", "c.txt", "c.jpg",
        "README", "d/" + "long-name-" * 9 + ".jpg", "e.jpg", "c.jpg",
    ]  # fmt: skip
    if format != tarfile.USTAR_FORMAT:
        names += ["x" * 180 + ".jpg", "größe/日本.jpg", "größe/日本.txt"]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([(name, payload(n, 100 * n)) for n, name in enumerate(names)], format))
    want = [
        (row.pop("__key__"), {name: data for name, data in row.items() if not name.startswith("__")})
        for row in map(dict, webdataset.WebDataset(str(path), shardshuffle=False))
    ]
    got = list(iter_tar(path))
    assert [(item.key, item.members) for item in got if isinstance(item, TarSample)] == want
    assert len(got) == len(want)
    some = [item for item in iter_tar(path, lambda member: member == "jpg") if isinstance(item, TarSample)]
    assert [(s.key, s.members) for s in some] == [
        (key, {n: d for n, d in row.items() if n == "jpg"}) for key, row in want
    ]


def test_hostile_names_are_only_keys(tmp_path: Path) -> None:
    names = ["../../x.jpg", "/etc/passwd.jpg", "C:\\x.jpg", "a\x1b[2J\nb.jpg", "..", ".hidden.jpg", "/.jpg"]
    samples, problems = read(tmp_path / "a.tar", tar_bytes([(name, b"data") for name in names]))
    assert list(samples) == ["../../x", "/etc/passwd", "C:\\x", "a\x1b[2J\nb"]
    assert problems == []
    # A pax header may hold what a plain one can't: NUL, and bytes that are no UTF-8.
    raw = tar_bytes([("é" * 60 + ".jpg", b"data")]).replace("é".encode(), b"\xff\x00")
    samples, problems = read(tmp_path / "a.tar", raw)
    assert [key.encode() for key in samples] == [b"\\xff\x00" * 60]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_what_is_no_plain_file_costs_its_sample(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("s.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "t.jpg"}
    unknown = tarfile.TarInfo("u.jpg")
    files: list[tuple[Any, bytes]] = [("a.jpg", b"1"), ("a.txt", b"1")]
    kinds = {
        "b": (tarfile.SYMTYPE, "txt is a symbolic link"),
        "c": (tarfile.LNKTYPE, "txt is a hard link"),
        "d": (tarfile.CHRTYPE, "txt is a device"),
        "e": (tarfile.FIFOTYPE, "txt is a pipe"),
    }
    for key, (kind, _) in kinds.items():
        files += [(f"{key}.jpg", b"1"), (special(f"{key}.txt", kind), b"")]
    files += [("f.jpg", b"1"), ("f.JPG", b"2"), ("f.txt", b"3"), (special("dir.x/", tarfile.DIRTYPE), b"")]
    files += [("t.json", b"1"), (sparse, b"map"), ("z.jpg", b"9")]
    raw = bytearray(tar_bytes(files))
    raw = bytearray(tar_bytes([(unknown, b"1")])[: 2 * BLOCK]) + raw
    raw[156:157] = b"Z"
    raw[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(raw[:BLOCK]))[0]
    samples, problems = read(tmp_path / "a.tar", bytes(raw))
    assert samples == {"a": {"jpg": b"1", "txt": b"1"}, "z": {"jpg": b"9"}}
    reasons = {problem.key: problem.reason for problem in problems}
    assert reasons == {
        "u": "jpg is of an unknown kind (b'Z')",
        **{key: reason for key, (_, reason) in kinds.items()},
        "f": "jpg occurs twice",
        "t": "jpg is a sparse file",
    }
    assert problems[1].where == "a.tar: b"


def test_a_sparse_file_of_the_old_form_is_gone_past(tmp_path: Path) -> None:
    info = special("b.jpg", tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % 700
    header[482] = 1  # the map goes on in a block of its own
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    a, c = (tar_bytes([(f"{key}.jpg", key.encode())])[: 2 * BLOCK] for key in "ac")
    samples, problems = read(tmp_path / "x.tar", a + header + bytes(BLOCK) + b"d" * 1024 + c + bytes(2 * BLOCK))
    assert samples == {"a": {"jpg": b"a"}, "c": {"jpg": b"c"}}
    assert [problem.reason for problem in problems] == ["jpg is a sparse file"]


def test_absurd_sizes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    files = [
        ("a.jpg", bytes(100)),
        ("b.jpg", bytes(5000)),
        ("c.jpg", bytes(900)),
        ("c.x", bytes(900)),
        ("d.jpg", b""),
    ]
    samples, problems = read(tmp_path / "a.tar", tar_bytes(files), max_member=1000, max_sample=1500)
    assert list(samples) == ["a", "d"]
    assert [problem.reason for problem in problems] == [
        "jpg has 5000 bytes, the limit is 1000",
        "it has more than 1500 bytes, the limit of a sample",
    ]
    big = tarfile.TarInfo("b.jpg")
    for size in (1 << 62, 1 << 40, 700):
        big.size = size  # stated, but not there
        raw = tar_bytes([("a.jpg", b"1")])[: 2 * BLOCK] + big.tobuf(tarfile.GNU_FORMAT) + b"short"
        samples, problems = read(tmp_path / "a.tar", raw)
        assert samples == {"a": {"jpg": b"1"}}
        (problem,) = problems
        assert problem.where == "a.tar"
        assert "not a whole tar (a member ends at byte" in problem.reason
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        header = special("x", kind)
        header.size = 1 << 33
        samples, problems = read(tmp_path / "a.tar", header.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK))
        assert [problem.reason for problem in problems] == ["not a whole tar (a header of 8589934592 bytes)"]
    many = tar_bytes([(f"a.{n}", b"") for n in range(1100)])
    samples, problems = read(tmp_path / "a.tar", many)
    assert [problem.reason for problem in problems] == ["more than 1000 members"]


@pytest.mark.parametrize(
    "record", [b"12 size=9999\n", b"99 path=a\n", b"x path=a\n", b"11 path=abc", b"0 path=a\n"]
)
def test_broken_pax_headers_end_the_tar(tmp_path: Path, record: bytes) -> None:
    header = special("x", tarfile.XHDTYPE)
    header.size = len(record)
    raw = header.tobuf(tarfile.GNU_FORMAT) + record.ljust(BLOCK, b"\0") + tar_bytes([("a.jpg", b"1")])
    samples, problems = read(tmp_path / "a.tar", raw)
    assert samples == {}
    assert len(problems) == 1


def test_no_end_mark_and_data_after_it(tmp_path: Path) -> None:
    whole = tar_bytes([(f"{n}.jpg", bytes([n]) * 600) for n in range(3)])
    one = BLOCK + 1024
    samples, problems = read(tmp_path / "a.tar", whole[: 3 * one])
    assert list(samples) == ["0", "1"]  # the last may have had more members
    assert "it ends without an end mark" in problems[0].reason
    samples, problems = read(tmp_path / "a.tar", whole[:one] + bytes(BLOCK) + whole[one + BLOCK :])  # a lost header
    assert list(samples) == []
    assert "data after an end mark" in problems[0].reason
    for odd, says in ((b"", "an empty file"), (b"no tar at all", "it ends at byte 13"), (b"x" * 5000, "at byte 0")):
        samples, problems = read(tmp_path / "a.tar", odd)
        assert (samples, len(problems)) == ({}, 1)
        assert says in problems[0].reason
    assert "no such file" in str(list(iter_tar(tmp_path / "b.tar")))
    assert "not a regular file" in str(list(iter_tar(tmp_path)))


def test_compressed_tars(tmp_path: Path) -> None:
    whole = tar_bytes([(f"{n}.jpg", payload(n, 3000)) for n in range(5)])
    packed = gzip.compress(whole)
    samples, problems = read(tmp_path / "a.tgz", packed)
    assert (len(samples), problems) == (5, [])
    for broken in (packed[:-9], packed[:-5] + bytes(5), packed[:3000] + b"\0" + packed[3001:]):
        samples, problems = read(tmp_path / "a.tgz", broken)
        assert samples == {}  # its checksum stands at the end: all or nothing
        assert "not a whole gzip file" in problems[0].reason
    samples, problems = read(tmp_path / "a.tar", b"\xfd7zXZ\x00 and so on")
    assert problems == [Unreadable("a.tar", "compressed with xz; unpack it first")]


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data_tools.tars

    monkeypatch.setattr(data_tools.tars, "_FREE_BYTES", 1 << 20)
    bomb = gzip.compress(tar_bytes([("a.jpg", bytes(20 << 20))]))
    samples, problems = read(tmp_path / "a.tgz", bomb)
    assert samples == {}
    assert "it unpacks to more than" in problems[0].reason


# --- damage of any kind

MEMBERS = [
    (f"{'long-' * 25 if n == 3 else ''}{n}.{member}", payload(7 * n + len(member), 40 + 300 * n))
    for n in range(6)
    for member in ("jpg", "json", "mask.png")
]
WHOLE = {format: tar_bytes(MEMBERS, format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)}
WANT: dict[str, dict[str, bytes]] = {}
for _name, _data in MEMBERS:
    WANT.setdefault(_name.partition(".")[0], {})[_name.partition(".")[2]] = _data
SHORT = {key for key in WANT if len(key) < 100}


def intact(data: bytes) -> bool:
    return hashlib.sha256(data[32:]).digest() == data[:32]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(format=1, flips=[], holes=[(12076, 1500)], cut=13824)
@given(
    format=st.sampled_from(sorted(WHOLE)),
    flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), max_size=6),
    holes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1500)), max_size=1),
    cut=st.none() | st.integers(0, 1 << 20),
)
def test_damage_is_named_and_never_passed_on(
    tmp_path: Path, format: int, flips: list[tuple[int, int]], holes: list[tuple[int, int]], cut: int | None
) -> None:
    whole = WHOLE[format]
    data = bytearray(whole)
    for where, change in flips:
        data[where % len(data)] ^= change
    for where, length in holes:
        where %= len(data)
        data[where : where + length] = bytes(len(data[where : where + length]))
    if cut is not None:
        del data[cut % len(data) :]
    path = tmp_path / "fuzzed.tar"
    path.write_bytes(data)
    items = list(iter_tar(path))
    samples = [item for item in items if isinstance(item, TarSample)]
    problems = [item for item in items if isinstance(item, Unreadable)]
    # A long name stands in a block of its own that has no checksum: its sample may come under other names.
    unknown = [s for s in samples if s.key not in WANT]
    for sample in samples:
        for member, content in sample.members.items():
            if intact(content) and sample.key in WANT:
                assert content == WANT[sample.key].get(member, content)
        if sample.key in SHORT and all(map(intact, sample.members.values())):
            assert sample.members == WANT[sample.key]
    assert len(unknown) <= 3
    # A hole before a cut leaves a file that ends as a whole one does.
    ends_well = cut is not None and holes and not any(data[-2 * tarfile.BLOCKSIZE :])
    assert problems or ends_well or {sample.key for sample in samples} >= SHORT
    if bytes(data) == whole:
        assert {s.key: s.members for s in samples} == WANT
        assert not problems


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = WHOLE[tarfile.GNU_FORMAT]
    content = len(whole.rstrip(b"\0"))
    for cut in [*range(0, content, 97), *range(BLOCK, content + BLOCK, BLOCK)]:
        samples, problems = read(tmp_path / "a.tar", whole[:cut])
        assert problems, cut
        assert all(WANT[key] == members for key, members in samples.items())


def test_every_flipped_byte_of_a_plain_header_is_noticed(tmp_path: Path) -> None:
    whole = tar_bytes(MEMBERS[:9], tarfile.GNU_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        offsets = [info.offset for info in tar]
    rng = random.Random(0)
    for offset in offsets:
        for place in range(offset, offset + BLOCK, 3):
            data = bytearray(whole)
            data[place] ^= rng.randrange(1, 256)
            samples, problems = read(tmp_path / "a.tar", bytes(data))
            if bytes(data[148:156]) != whole[148:156] and not problems:
                continue  # the checksum in another spelling, of the same value
            assert problems, place
            assert all(WANT[key] == members for key, members in samples.items())


@pytest.mark.parametrize("packed", [False, True])
def test_a_disk_that_does_not_answer_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    class Away(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= BLOCK:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().read(size)

    path = tmp_path / "a.tar"
    content = tar_bytes([("a.png", payload(0, 4000)), ("b.png", payload(1, 4000))])
    data = gzip.compress(content, 0) if packed else content
    path.write_bytes(data)
    monkeypatch.setattr(Path, "open", lambda self, mode: Away(data))
    with pytest.raises(OSError, match="Stale file handle") as caught:
        list(iter_tar(path))
    assert caught.value.filename == str(path)
