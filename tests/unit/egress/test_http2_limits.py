"""What an HTTP/2 peer cannot do: floods, endless heads, lies about lengths. Each is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from h2.errors import ErrorCodes
from h2.events import PingAckReceived
from hpack import Encoder

from hiverd.egress import http2_frames
from hiverd.egress.http2_connection import CONNECTION_WINDOW_BYTES, MAX_STREAMS
from hiverd.egress.http2_frames import PREFACE, Budget, FloodError, FrameReader, GoAway
from hiverd.egress.outlet import Rules
from support.http2 import Http2Client, Rig, rig
from support.upstreams import HttpUpstream, lead
from support.waiting import until_async

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
HEAD = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"api.test"), (b":path", b"/slow/9")]


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


@pytest.fixture
def upstream() -> Iterator[HttpUpstream]:
    with HttpUpstream() as upstream:
        yield upstream


@pytest.fixture
async def connected(upstream: HttpUpstream, tmp_path: Path) -> AsyncIterator[tuple[Rig, Http2Client]]:
    async with rig([lead("api.test", upstream)], tmp_path) as made:
        yield made, await made.connect()


def _continuations(_: int) -> bytes:
    block = frame(CONTINUATION, b"\0\1x\0" * 4000, stream=1)
    return frame(HEADERS, b"", stream=1) + block * 20


def _tiny_continuations(_: int) -> bytes:
    return frame(HEADERS, b"", stream=1) + frame(CONTINUATION, b"", stream=1) * 5000


def _resets(_: int) -> bytes:
    encoder = Encoder()
    sent = b""
    for number in range(1, 1001, 2):
        sent += frame(HEADERS, encoder.encode(HEAD), flags=5, stream=number)
        sent += frame(RST_STREAM, b"\0\0\0\x08", stream=number)
    return sent


def _broken_windows(_: int) -> bytes:
    """The server is made to reset streams itself (CVE-2025-8671)."""
    encoder = Encoder()
    sent = b""
    for number in range(1, 1001, 2):
        sent += frame(HEADERS, encoder.encode(HEAD), flags=5, stream=number)
        sent += frame(WINDOW_UPDATE, b"\x7f\xff\xff\xff", stream=number)
    return sent


def _repeated(unit: bytes) -> Callable[[int], bytes]:
    return lambda _: unit * 5000


def _on_a_stream(unit: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """The flood comes on a stream that is open."""
    return lambda _: frame(HEADERS, Encoder().encode(HEAD), flags=4, stream=1) + unit(1) * 5000


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(_continuations, id="continuations"),
        pytest.param(_tiny_continuations, id="empty continuations"),
        pytest.param(_resets, id="rapid reset"),
        pytest.param(_broken_windows, id="made to reset"),
        pytest.param(_repeated(frame(SETTINGS)), id="settings"),
        pytest.param(_repeated(frame(SETTINGS, flags=1)), id="settings' echoes"),
        pytest.param(_repeated(frame(PING, b"12345678")), id="pings"),
        pytest.param(_repeated(frame(PRIORITY, b"\0\0\0\0\1", stream=3)), id="priorities"),
        pytest.param(_repeated(frame(WINDOW_UPDATE, b"\0\0\0\1")), id="window updates"),
        pytest.param(_repeated(frame(0xEE, b"x")), id="unknown frames"),
        pytest.param(_on_a_stream(lambda number: frame(DATA, stream=number)), id="empty data"),
        pytest.param(_on_a_stream(lambda number: frame(WINDOW_UPDATE, b"\0\0\0\1", stream=number)), id="on a stream"),
        pytest.param(lambda _: frame(0xEE, b"x" * 20_000), id="long frame"),
    ],
)
async def test_a_flood_ends_the_connection(connected: tuple[Rig, Http2Client], flood: Callable[[int], bytes]) -> None:
    made, client = connected
    sending = asyncio.create_task(client.raw(flood(0)))
    await client.until(lambda: client.closed, "the connection's end")
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert client.error in (ErrorCodes.ENHANCE_YOUR_CALM, ErrorCodes.PROTOCOL_ERROR)
    await asyncio.wait_for(made.tasks[0], 10)
    assert "?" in {event.method for event in made.events("request") if event.access == "denied"}
    assert made.outlet.http2_streams == 0


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"GET / HTTP/1.1\r\nhost: api.test\r\n\r\n", id="HTTP/1.1"),
        pytest.param(PREFACE[:-1] + b"\0", id="preface"),
        pytest.param(PREFACE + frame(DATA, b"x", stream=1), id="data without a stream"),
        pytest.param(PREFACE + frame(HEADERS, b"\xff" * 9, flags=5, stream=1), id="compression"),
        pytest.param(PREFACE + frame(HEADERS, b"", flags=5, stream=2), id="a server's stream"),
        pytest.param(PREFACE + frame(PUSH, b"\0\0\0\2", flags=4, stream=1), id="push"),
        pytest.param(PREFACE + frame(CONTINUATION, b"", flags=4, stream=1), id="continuation"),
        pytest.param(PREFACE + frame(HEADERS, b"", stream=1) + frame(GOAWAY, b"\0" * 8), id="goaway in a head"),
        pytest.param(PREFACE + frame(WINDOW_UPDATE, b"\0\0\0\0"), id="no increment"),
        pytest.param(PREFACE + frame(SETTINGS, b"\0\4\xff\xff\xff\xff"), id="window"),
    ],
)
async def test_what_is_no_http_2_ends_the_connection(upstream: HttpUpstream, tmp_path: Path, sent: bytes) -> None:
    async with rig([lead("api.test", upstream)], tmp_path) as made:
        client = await made.connect(start=False)
        await client.raw(sent)
        await asyncio.wait_for(made.tasks[0], 10)
        assert [(event.method, event.access) for event in made.events("request")] == [("?", "denied")]
    assert upstream.seen == []


async def test_what_the_library_did_not_expect_ends_the_connection(
    connected: tuple[Rig, Http2Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: bytes) -> None:
        raise ValueError(data)

    made, client = connected
    monkeypatch.setattr(made.connections[0]._h2, "receive_data", fail)
    await client.request("/")
    await client.until(lambda: client.closed, "the connection's end")
    await asyncio.wait_for(made.tasks[0], 10)
    assert [(event.method, event.access) for event in made.events("request")] == [("?", "denied")]


@pytest.mark.parametrize("body", [b"longer than told", b"s"])
async def test_a_body_of_another_length_than_told_is_not_passed_on(
    connected: tuple[Rig, Http2Client], upstream: HttpUpstream, body: bytes
) -> None:
    _, client = connected
    number = await client.request("/post", method="POST", fields=[(b"content-length", b"4")], end=False)
    await client.send(number, body, end=True)
    await client.until(lambda: client.closed, "the connection's end")
    assert client.answers[number].status is None
    assert [seen for seen in upstream.seen if len(seen.body) == 4] == []


async def test_a_large_head_is_answered_431(connected: tuple[Rig, Http2Client]) -> None:
    made, client = connected
    fields = [(b"x-%d" % number, b"v" * 1000) for number in range(70)]
    assert (await client.get("/", fields=fields)).status == 431
    assert made.statuses == [431]
    assert (await client.get("/")).status == 200


async def test_a_head_that_unpacks_to_far_more_ends_the_connection(connected: tuple[Rig, Http2Client]) -> None:
    _, client = connected
    await client.request("/", fields=[(b"x", b"v" * 3000)] + [(b"x", b"v" * 3000)] * 200)
    await client.until(lambda: client.closed, "the connection's end")
    assert client.error == ErrorCodes.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([(b":method", b"CONNECT"), (b":authority", b"api.test:443")], 501),
        ([(b":method", b"CONNECT"), (b":protocol", b"websocket"), *HEAD[1:]], 501),
        ([*HEAD, (b"host", b"other.test")], 400),
        ([*HEAD, (b"Upper", b"case")], 400),
        ([*HEAD, (b"transfer-encoding", b"chunked")], 400),
        ([*HEAD[:2], (b":authority", b"user@api.test"), HEAD[3]], 400),
    ],
)
async def test_a_bad_head_ends_its_stream_alone(
    connected: tuple[Rig, Http2Client], upstream: HttpUpstream, fields: list[tuple[bytes, bytes]], status: int
) -> None:
    made, client = connected
    good = await client.request("/slow/0.2")
    answer = await client.answer(await client.send_head(fields))
    assert answer.status == status
    assert (await client.answer(good)).status == 200
    recorded = {(event.method, event.access) for event in made.events("request")}
    assert recorded == {("GET", "allowed"), ("?", "denied")}
    assert [seen.path for seen in upstream.seen] == ["/slow/0.2"]


async def test_streams_are_limited(connected: tuple[Rig, Http2Client]) -> None:
    """A client that does not know the limit yet would end its connection; here it does."""
    _, client = connected
    await client.until(lambda: client.h2.remote_settings.max_concurrent_streams == MAX_STREAMS, "settings")
    numbers = [await client.request("/slow/0.3") for _ in range(MAX_STREAMS)]
    # Those that are broken off still have to come to their end, so there is no room for others in their place.
    for number in numbers[:10]:
        client.h2.reset_stream(number)
    late = [await client.request("/slow/0") for _ in range(10)]
    refused = [await client.answer(number) for number in late]
    assert {answer.reset for answer in refused} == {ErrorCodes.REFUSED_STREAM}
    assert {(await client.answer(number)).status for number in numbers[10:]} == {200}
    assert (await client.get("/")).status == 200


async def test_streams_of_a_sandbox_are_limited(
    connected: tuple[Rig, Http2Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, client = connected
    monkeypatch.setattr("hiverd.egress.agent_http2.MAX_STREAMS_OF_SANDBOX", 2)
    other = await made.connect()
    numbers = [await client.request("/slow/0.3"), await client.request("/slow/0.3")]
    await until_async(_true(lambda: made.outlet.http2_streams == 2), seconds=5, what="streams")
    assert (await other.get("/")).reset == ErrorCodes.REFUSED_STREAM
    assert [(await client.answer(number)).status for number in numbers] == [200, 200]
    assert (await other.get("/")).status == 200


async def test_settings_that_nobody_knows_are_not_kept(tmp_path: Path) -> None:
    async with rig([], tmp_path) as made:
        client = await made.connect()
        for start in range(0, 60_000, 2_000):
            settings = b"".join((0x100 + start + n).to_bytes(2) + b"\0\0\0\1" for n in range(2_000))
            await client.raw(frame(SETTINGS, settings))
        assert (await client.get("/")).status == 403
        connection = made.connections[0]
        assert len(connection._h2.remote_settings) < 20


async def test_the_peers_wish_does_not_grow_our_table(tmp_path: Path) -> None:
    async with rig([], tmp_path) as made:
        client = await made.connect()
        await client.raw(frame(SETTINGS, b"\0\1\xff\xff\xff\xff"))
        client.h2.decoder.max_allowed_table_size = 0xFFFF_FFFF
        assert (await client.get("/")).status == 403
        assert made.connections[0]._h2.encoder.header_table_size == 4096


def _true(probe: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def ask() -> bool:
        return probe()

    return ask


async def test_what_is_held_of_bodies_is_bounded(tmp_path: Path) -> None:
    """Requests that wait for a verdict, with as much of their bodies as the agent can send, padded where that helps."""
    async with rig([], tmp_path) as made:
        made.outlet.change(Rules(rules=(), deny_wait_seconds=30))
        client = await made.connect()
        await client.until(lambda: client.h2.remote_settings.max_concurrent_streams == MAX_STREAMS, "settings")
        numbers = [await client.request("/", method="POST", end=False) for _ in range(20)]
        for number in numbers:
            while (room := min(client.h2.local_flow_control_window(number), 16_000)) > 1000:
                client.h2.send_data(number, b"x" * (room - 256), pad_length=255)
                await client.flush()
        client.h2.ping(b"12345678")
        await client.flush()
        await client.until(lambda: any(isinstance(event, PingAckReceived) for event in client.events), "all was read")
        assert client.h2.outbound_flow_control_window < 1000
        held = [len(stream._data) for stream in made.connections[0]._streams.values()]
        assert len(held) == 20
        assert 400 * 1024 < sum(held) <= CONNECTION_WINDOW_BYTES


def test_goaway_is_told_apart() -> None:
    reader = FrameReader(server=False)
    sent = frame(PING, b"12345678") + frame(GOAWAY, b"\0\0\0\5" + b"\0" * 4 + b"why") + frame(PING, b"87654321")
    parts = [part for byte in sent for part in reader.feed(bytes((byte,)))]
    assert parts == [frame(PING, b"12345678"), GoAway(5), frame(PING, b"87654321")]
    assert reader.held_bytes == 0


def test_many_frames_come_in_batches() -> None:
    reader = FrameReader(server=False)
    parts = list(reader.feed(frame(DATA, b"x", stream=1) * 200))
    assert [len(part) // 10 for part in parts if isinstance(part, bytes)] == [64, 64, 64, 8]


def test_data_pays_for_window_updates() -> None:
    reader = FrameReader(server=False, clock=lambda: 0.0)
    for _ in range(5000):
        list(reader.feed(frame(DATA, b"x" * 1000, stream=1) + frame(WINDOW_UPDATE, b"\0\0\0\1") * 4))
    with pytest.raises(FloodError):
        list(reader.feed(frame(WINDOW_UPDATE, b"\0\0\0\1") * (http2_frames.OVERHEAD_BURST + 1)))


def test_a_budget_refills_up_to_its_burst() -> None:
    now = [0.0]
    budget = Budget(2, 1.0, lambda: now[0])
    assert [budget.take() for _ in range(3)] == [True, True, False]
    now[0] = 1.0
    assert [budget.take() for _ in range(2)] == [True, False]
    now[0] = 100.0
    assert [budget.take() for _ in range(3)] == [True, True, False]
