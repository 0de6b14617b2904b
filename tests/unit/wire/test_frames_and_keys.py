"""Server-sent events, answers, and the names that callers choose."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.contracts.errors import InvalidError
from hiverd.wire import sse
from hiverd.wire.answers import (
    ApplyResult,
    DirectoryEntry,
    DirectoryListing,
    ErrorBody,
    ExecResult,
    SandboxRef,
    encode,
    wire_text,
)
from hiverd.wire.events import EVENT_CLASSES, EVENT_TYPES, SILENT_TYPES, StdioEvent, type_of
from hiverd.wire.keys import check_exec_id, check_key, is_key


def parse(frame: bytes) -> dict[str, Any]:
    """As a client reads it: fields by name, `data` as JSON."""
    assert frame.isascii()
    assert frame.endswith(b"\n\n")
    assert frame.count(b"\n\n") == 1
    fields = dict(line.split(": ", 1) for line in frame.decode().splitlines() if line)
    return {**fields, "data": json.loads(fields["data"])}


def test_frame_layout() -> None:
    assert sse.frame({"a": 1}) == b'data: {"a":1}\n\n'
    assert sse.frame({"a": 1}, id=7, event="exit") == b'id: 7\nevent: exit\ndata: {"a":1}\n\n'
    assert sse.frame(b'{\n  "a": 1\r\n}', id=0) == b'id: 0\ndata: {   "a": 1  }\n\n'
    assert sse.frame(StdioEvent(stdout="x\n")) == b'data: {"type":"stdio","stdout":"x\\n"}\n\n'


@given(st.text(st.characters(codec="utf-8")), st.booleans())
def test_every_text_survives_as_one_ascii_line(text: str, as_bytes: bool) -> None:
    document = {"text": text}
    frame = sse.frame(json.dumps(document, ensure_ascii=False).encode() if as_bytes else document, id=3)
    assert parse(frame) == {"id": "3", "data": document}


@pytest.mark.parametrize("text", ["é", "\u2028", "\x85", "\r\n", "\x00", "😀", "\x7f", "a" * 100_000 + "é"])
def test_characters_that_break_lines_elsewhere(text: str) -> None:
    assert parse(sse.frame({"text": text}))["data"] == {"text": text}


def test_comments_are_ignored_by_parsers() -> None:
    for comment in (sse.comment(), sse.comment("keep-alive")):
        assert comment.startswith(b":")
        assert comment.endswith(b"\n\n")


def test_answers_leave_out_what_is_absent() -> None:
    assert encode(SandboxRef(id="i", key="k")) == b'{"id":"i","key":"k"}'
    assert encode([SandboxRef(id="i", key="k", status="running")]) == b'[{"id":"i","key":"k","status":"running"}]'
    assert encode(ExecResult("a", "b", 0)) == b'{"stdout":"a","stderr":"b","exit_code":0}'
    assert json.loads(encode(ExecResult("", "", 1, 5, 0)))["stdout_truncated_bytes"] == 5
    assert encode(ApplyResult(True, {}, {})) == b'{"applied":true,"config":{},"changes":{}}'
    assert encode(ErrorBody("no")) == b'{"error":"no"}'
    assert encode(DirectoryListing(())) == b'{"entries":[]}'


def test_file_names_that_are_no_text_become_text() -> None:
    name = b"a\xffb".decode("utf-8", "surrogateescape")
    assert wire_text(name) == wire_text(b"a\xffb") == "a\ufffdb"
    encode(DirectoryEntry(name=wire_text(name), path="/", is_dir=False, size=0))


@pytest.mark.parametrize("key", ["a", "A.b-c_9", "x" * 64, "exec", "..."])
def test_good_keys(key: str) -> None:
    assert is_key(key)
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", ".", "..", "x" * 65, "a/b", "a b", "a\n", "é", "a%2fb"])
def test_bad_keys(key: str) -> None:
    assert not is_key(key)
    with pytest.raises(InvalidError, match=r"^key: must be 1 to 64 characters"):
        check_key(key)


def test_exec_ids() -> None:
    assert check_exec_id("0f8fad5b-d9cb-469f-a165-70867728950e")
    for exec_id in ("", "a/b", "x" * 129, "a\n"):
        with pytest.raises(InvalidError):
            check_exec_id(exec_id)


def test_event_types_are_those_of_the_clients() -> None:
    assert len(EVENT_TYPES) == len(EVENT_CLASSES) == 19
    assert SILENT_TYPES < EVENT_TYPES
    assert type_of(StdioEvent()) == type_of(StdioEvent) == "stdio"
