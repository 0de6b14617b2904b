"""gRPC over HTTP/2 to the end, with a real gRPC server: messages both ways, trailers, shared connections."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from h2.errors import ErrorCodes

from hiverd.egress.upstream_tls import client_context
from support.grpc_upstream import GrpcUpstream
from support.http2 import Answer, Http2Client, Rig, rig
from support.upstreams import Authority, HttpUpstream
from support.waiting import until_async

GRPC = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def upstream(authority: Authority) -> Iterator[GrpcUpstream]:
    with GrpcUpstream(authority, "api.test") as upstream:
        yield upstream


@pytest.fixture
async def connected(
    authority: Authority, upstream: GrpcUpstream, tmp_path: Path
) -> AsyncIterator[tuple[Rig, Http2Client]]:
    async with rig(_rules(upstream.address), tmp_path, _contexts(authority)) as made:
        yield made, await made.connect()


def _rules(address: str, **more: Any) -> list[dict[str, Any]]:
    return [{"access": "allow", "host": "api.test", "override": {"host": address, **more}}]


def _contexts(authority: Authority) -> dict[str, ssl.SSLContext]:
    return {protocol: client_context([authority.path], [protocol]) for protocol in ("h2", "http/1.1")}


def _message(content: bytes) -> bytes:
    return b"\0" + len(content).to_bytes(4) + content


async def _call(client: Http2Client, method: str, *messages: bytes, fields: list[tuple[bytes, bytes]] = GRPC) -> Answer:
    number = await _open(client, method, fields)
    await client.send(number, b"".join(map(_message, messages)), end=True)
    return await client.answer(number)


async def _open(client: Http2Client, method: str, fields: list[tuple[bytes, bytes]] = GRPC) -> int:
    return await client.request(f"/test.Echo/{method}", method="POST", fields=fields, end=False)


async def _until(probe: Callable[[], object], what: str) -> None:
    async def ask() -> bool:
        return bool(probe())

    await until_async(ask, seconds=10, what=what)


async def test_unary(connected: tuple[Rig, Http2Client], upstream: GrpcUpstream) -> None:
    made, client = connected
    answer = await _call(client, "Unary", b"hello", fields=[*GRPC, (b"x-meta", b"data")])
    assert bytes(answer.body) == _message(b"hello")
    assert dict(answer.trailers)[b"grpc-status"] == b"0"
    assert dict(answer.trailers)[b"x-trailer"] == b"here"
    assert upstream.metadata[0]["x-meta"] == "data"
    assert made.statuses == [200]
    assert [(event.method, event.path) for event in made.events("request")] == [("POST", "/test.Echo/Unary")]


async def test_both_directions_at_once(connected: tuple[Rig, Http2Client]) -> None:
    _, client = connected
    number = await _open(client, "Both")
    answer = client.answers[number]
    for round_ in range(5):  # each answer comes before the next message is sent
        await client.send(number, _message(b"%d" % round_))
        await client.until(lambda: len(answer.body) == 6 * (round_ + 1), "the echo")  # noqa: B023 -- awaited here
    client.h2.end_stream(number)
    await client.flush()
    await client.answer(number)
    assert bytes(answer.body) == b"".join(_message(b"%d" % round_) for round_ in range(5))
    assert dict(answer.trailers)[b"grpc-status"] == b"0"


async def test_much_data_both_ways(connected: tuple[Rig, Http2Client]) -> None:
    _, client = connected
    messages = [bytes((n,)) * 100_000 for n in range(40)]
    answer = await _call(client, "Both", *messages)
    assert bytes(answer.body) == b"".join(map(_message, messages))


async def test_an_error_is_in_the_head_that_ends_the_stream(connected: tuple[Rig, Http2Client]) -> None:
    _, client = connected
    answer = await _call(client, "Fail", b"x")
    status = {**dict(answer.fields), **dict(answer.trailers)}
    assert status[b"grpc-status"] == b"9"
    assert status[b"grpc-message"] == b"not today"
    assert status[b"x-why"] == b"just so"
    assert (await _call(client, "Nothing", b"x")).fields[0] == (b":status", b"200")


async def test_exchanges_share_a_connection(connected: tuple[Rig, Http2Client], upstream: GrpcUpstream) -> None:
    made, client = connected
    answers = await asyncio.gather(*(_call(client, "Unary", b"%d" % n) for n in range(40)))
    assert [bytes(answer.body) for answer in answers] == [_message(b"%d" % n) for n in range(40)]
    assert len(upstream.peers) == 1
    assert len(made.outlet.http2_uplinks) == 1


async def test_an_agent_that_breaks_off_is_told_to_the_upstream(
    connected: tuple[Rig, Http2Client], upstream: GrpcUpstream
) -> None:
    made, client = connected
    number = await _open(client, "Wait")
    await client.send(number, _message(b"x"), end=True)
    await _until(lambda: upstream.metadata, "the call")
    client.h2.reset_stream(number, ErrorCodes.CANCEL)
    await client.flush()
    await _until(upstream.left.is_set, "the cancellation")
    await _until(lambda: made.statuses, "the response's event")
    assert made.statuses == [0]
    assert bytes((await _call(client, "Unary", b"still")).body) == _message(b"still")
    assert len(upstream.peers) == 1


async def test_a_change_of_the_rules_ends_a_stream_that_is_open(connected: tuple[Rig, Http2Client]) -> None:
    made, client = connected
    number = await _open(client, "Both")
    await client.send(number, _message(b"x"))
    await client.until(lambda: client.answers[number].body, "the echo")
    made.outlet.change(Rig.rules([]))
    answer = await client.answer(number)
    assert answer.reset == ErrorCodes.INTERNAL_ERROR
    assert (await _call(client, "Unary", b"x")).status == 403


async def test_a_change_of_the_rules_ends_a_call_that_waits(
    connected: tuple[Rig, Http2Client], upstream: GrpcUpstream
) -> None:
    made, client = connected
    number = await _open(client, "Wait")
    await client.send(number, _message(b"x"))
    await _until(lambda: made.outlet._tunnels and upstream.peers, "the call")
    made.outlet.change(Rig.rules([]))
    assert (await client.answer(number)).status == 502


async def test_nothing_new_goes_over_what_was_dialled_under_other_rules(
    connected: tuple[Rig, Http2Client], upstream: GrpcUpstream
) -> None:
    made, client = connected
    await _call(client, "Unary", b"x")
    made.outlet.change(Rig.rules(_rules(upstream.address)))
    await _call(client, "Unary", b"x")
    assert len(upstream.peers) == 2
    await _until(lambda: len(made.outlet.http2_uplinks) == 1, "the old connection's end")


async def test_an_idle_connection_to_the_upstream_is_closed(
    connected: tuple[Rig, Http2Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, client = connected
    monkeypatch.setattr("hiverd.egress.upstream_http2.IDLE_SECONDS", 0.2)
    await _call(client, "Unary", b"x")
    await _until(lambda: len(made.outlet.http2_uplinks) == 0, "the connection's end")


async def test_an_upstream_that_leaves_keeps_what_is_open(authority: Authority, tmp_path: Path) -> None:
    options = {"grpc.max_connection_age_ms": 300, "grpc.max_connection_age_grace_ms": 10_000}
    with GrpcUpstream(authority, "api.test", **options) as upstream:
        async with rig(_rules(upstream.address), tmp_path, _contexts(authority)) as made:
            client = await made.connect()
            number = await _open(client, "Both")
            await client.send(number, _message(b"1"))
            await client.until(lambda: len(client.answers[number].body) == 6, "the echo")
            (uplink,) = [uplink for uplinks in made.outlet.http2_uplinks._uplinks.values() for uplink in uplinks]
            await _until(lambda: uplink.retired, "the upstream's GOAWAY")
            await client.send(number, _message(b"2"), end=True)
            assert bytes((await client.answer(number)).body) == _message(b"1") + _message(b"2")
            assert bytes((await _call(client, "Unary", b"x")).body) == _message(b"x")
            assert len(upstream.peers) == 2


async def test_overrides_reach_a_grpc_server(authority: Authority, upstream: GrpcUpstream, tmp_path: Path) -> None:
    rules = _rules(upstream.address, headers={"Authorization": "Bearer secret-of-the-rule"})
    async with rig(rules, tmp_path, _contexts(authority)) as made:
        client = await made.connect()
        await _call(client, "Unary", b"x", fields=[*GRPC, (b"authorization", b"mine")])
        assert upstream.metadata[0]["authorization"] == "Bearer secret-of-the-rule"
        assert "secret-of-the-rule" not in repr(made.sink.recorded)


@pytest.mark.parametrize("protocols", [(), ("http/1.1",)])
async def test_an_upstream_without_http_2_is_answered_502(
    authority: Authority, tmp_path: Path, protocols: tuple[str, ...]
) -> None:
    with HttpUpstream(authority.context("api.test", protocols=protocols)) as upstream:
        async with rig(_rules(upstream.address), tmp_path, _contexts(authority)) as made:
            client = await made.connect()
            answer = await _call(client, "Unary", b"x")
            assert answer.status == 502
            assert b"does not speak HTTP/2" in answer.body
            assert made.statuses == [502]
            assert (await client.get("/")).status == 200  # what is no gRPC goes by HTTP/1.1
        assert [seen.path for seen in upstream.seen] == ["/"]


async def test_a_certificate_for_another_name_is_answered_502(authority: Authority, tmp_path: Path) -> None:
    with GrpcUpstream(authority, "other.test") as upstream:
        async with rig(_rules(upstream.address), tmp_path, _contexts(authority)) as made:
            client = await made.connect()
            assert (await _call(client, "Unary", b"x")).status == 502
            assert upstream.metadata == []


async def test_an_upstream_that_dies_ends_its_streams(authority: Authority, tmp_path: Path) -> None:
    with GrpcUpstream(authority, "api.test") as upstream:
        async with rig(_rules(upstream.address), tmp_path, _contexts(authority)) as made:
            client = await made.connect()
            number = await _open(client, "Both")
            await client.send(number, _message(b"x"))
            await client.until(lambda: client.answers[number].body, "the echo")
            for task in tuple(made.outlet.http2_uplinks._tasks):
                task.cancel()
            assert (await client.answer(number)).reset == ErrorCodes.INTERNAL_ERROR
            assert (await _call(client, "Unary", b"y")).status == 200


async def test_one_dial_for_many_calls_even_if_it_fails(authority: Authority, tmp_path: Path) -> None:
    with HttpUpstream() as plain:
        async with rig(_rules(plain.address), tmp_path, _contexts(authority)) as made:
            client = await made.connect()
            answers = await asyncio.gather(*(_call(client, "Unary", b"x") for _ in range(5)))
            assert [answer.status for answer in answers] == [502] * 5
            assert len(made.outlet.http2_uplinks) == 0
