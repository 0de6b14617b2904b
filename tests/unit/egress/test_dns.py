"""The sink's answers, and what it takes for data on its way out."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.egress import dns

ADDRESS = bytes((11, 0, 0, 1))


def query(
    name: bytes = b"api.test",
    kind: int = 1,
    *,
    kind_class: int = 1,
    flags: int = 0x0100,
    counts: tuple[int, int, int, int] = (1, 0, 0, 0),
    extra: bytes = b"",
) -> bytes:
    labels = b"".join(bytes((len(label),)) + label for label in name.split(b".") if label)
    return struct.pack("!6H", 7, flags, *counts) + labels + b"\0" + struct.pack("!HH", kind, kind_class) + extra


def opt(options: bytes = b"", *, version: int = 0) -> bytes:
    return struct.pack("!BHHBBHH", 0, 41, 4096, 0, version, 0, len(options)) + options


def answered(data: bytes) -> tuple[bytes, dns.Question]:
    found = dns.answer(data)
    assert found is not None
    return found


def test_an_address_is_asked_for() -> None:
    answer, question = answered(query(b"Api.TEST"))
    assert question == dns.Question("api.test", 1)
    assert not question.suspicious
    assert answer[:12] == struct.pack("!6H", 7, 0x8180, 1, 1, 0, 0)
    assert answer[12:] == query(b"Api.TEST")[12:] + b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + ADDRESS


@pytest.mark.parametrize("kind", [28, 5, 6, 12, 15, 33, 64, 65])
def test_usual_types_are_empty(kind: int) -> None:
    answer, question = answered(query(kind=kind))
    assert answer == struct.pack("!6H", 7, 0x8180, 1, 0, 0, 0) + query(kind=kind)[12:]
    assert not question.suspicious


@pytest.mark.parametrize(
    "data",
    [
        query(kind=16),
        query(kind=10),
        query(kind=255),
        query(b"x" * 49 + b".test"),
        query(b".".join([b"x" * 40] * 4)),
        query(kind_class=3),
        query(flags=0x0900),
        query(extra=b"more"),
        query(counts=(1, 0, 0, 1), extra=opt(b"\xff\xfe\0\x2d" + bytes(45))),
        query(counts=(1, 0, 0, 1), extra=b"\1x" + opt()[1:]),
        query(counts=(1, 1, 0, 0), extra=b"\0" * 11),
        query(counts=(1, 0, 0, 2), extra=opt() * 2),
        query(counts=(1, 0, 0, 1)),
    ],
)
def test_what_could_carry_data_is_answered_and_suspicious(data: bytes) -> None:
    answer, question = answered(data)
    assert question.suspicious
    assert len(answer) <= len(query(question.name.encode())) + 27


def test_edns_is_answered_with_edns() -> None:
    answer, question = answered(query(counts=(1, 0, 0, 1), extra=opt(b"\0\x0a\0\x08" + bytes(8))))
    assert not question.suspicious
    assert answer[10:12] == b"\0\1"
    assert answer.endswith(ADDRESS + b"\0\0\x29\x04\xd0\0\0\0\0\0\0")


def test_a_later_version_of_edns_is_refused() -> None:
    answer, _ = answered(query(counts=(1, 0, 0, 1), extra=opt(version=1)))
    assert ADDRESS not in answer
    assert answer.endswith(b"\0\0\x29\x04\xd0\1\0\0\0\0\0")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        query()[:11],
        query()[:-1],
        query(flags=0x8100),
        query(counts=(0, 0, 0, 0)),
        query(counts=(2, 0, 0, 0)),
        query()[:12] + b"\xc0\x0c\0\1\0\1",
        query()[:12] + b"\x40" + b"x" * 64 + b"\0\0\1\0\1",
        query(b".".join([b"x" * 63] * 4)),
    ],
)
def test_what_is_no_query_is_not_answered(data: bytes) -> None:
    assert dns.answer(data) is None


def test_the_longest_name_is_answered() -> None:
    assert dns.answer(query(b".".join([b"x" * 63] * 3 + [b"x" * 61]))) is not None


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=60).map(lambda tail: query()[:12] + tail)))
def test_any_bytes(data: bytes) -> None:
    found = dns.answer(data)
    if found is not None:
        answer, question = found
        assert answer[:2] == data[:2]
        assert len(answer) <= len(data) + 27
        assert len(question.name) <= 4 * 255
        assert isinstance(question.suspicious, bool)
