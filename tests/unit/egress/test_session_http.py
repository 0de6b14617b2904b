"""Requests over a real session: keep-alive, framing both ways, and what each leaves on record."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from support.egress import Agent, eventually, read_head, request, scripted
from support.upstreams import HttpUpstream, SocketUpstream, lead


async def test_requests_follow_each_other_on_one_connection_of_each_side(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    for number in range(5):
        answer = await agent.get(f"http://api.test/{number}?q={number}")
        assert json.loads(answer.body)["path"] == f"/{number}?q={number}"
    assert plain.connections == 1
    assert rig.requests[4].query == "q=4"
    assert rig.summary()[:3] == ["allowed GET api.test/0", "1: 200", f"1: {rig.chunks[0].body!r}"]
    assert [event.request_id for event in rig.responses] == [1, 4, 7, 10, 13]


async def test_pipelined_requests_are_answered_in_order(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    await agent.send(
        b"".join(request(f"http://api.test/{number}", method="POST", body=b"x" * number) for number in range(20))
    )
    for number in range(20):
        document = json.loads((await agent.answer()).body)
        assert (document["path"], len(document["body"])) == (f"/{number}", number)


async def test_each_request_of_a_connection_is_judged_by_itself(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain, paths=["/ok"]))
    agent = await rig.agent()
    assert (await agent.get("http://api.test/ok")).status == 200
    denied = await agent.get("http://api.test/other")
    assert denied.status == 403
    assert denied.headers["content-type"] == "text/plain; charset=utf-8"
    assert denied.headers["connection"] == "close"
    assert b"api.test" in denied.body
    assert b"egress" in denied.body
    assert denied.body.count(b"\n") == 1
    assert await agent.rest() == b""
    assert [seen.path for seen in plain.seen] == ["/ok"]
    assert rig.summary()[-2:] == ["denied GET api.test/other", "4: 403"]


async def test_http_1_0_ends_with_the_answer_unless_it_asks_to_stay(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    await agent.send(request("http://api.test/a", "Connection: keep-alive", version="1.0"))
    answer = await agent.answer()
    assert answer.headers["connection"] == "keep-alive"
    await agent.send(request("http://api.test/chunked/100000", version="1.0"))
    answer = await agent.answer()
    assert "transfer-encoding" not in answer.headers
    assert answer.body == b"x" * 100_000
    assert await agent.rest() == b""


@pytest.mark.parametrize(("method", "path"), [("HEAD", "/bytes/1000"), ("GET", "/status/204"), ("GET", "/status/304")])
async def test_answers_without_a_body(make_rig: Any, plain: HttpUpstream, method: str, path: str) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    for _ in range(2):
        answer = await agent.get(f"http://api.test{path}", method=method)
        assert answer.body == b""
    if method == "HEAD":
        assert answer.headers["content-length"] == "1000"
    if path == "/status/204":
        assert "content-length" not in answer.headers  # RFC 9110 8.6
    assert (await agent.get()).status == 200


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 5_000_000])
@pytest.mark.parametrize("kind", ["bytes", "chunked"])
async def test_answers_of_any_size(make_rig: Any, plain: HttpUpstream, size: int, kind: str) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    answer = await agent.get(f"http://api.test/{kind}/{size}")
    assert answer.body == b"x" * size
    assert ("transfer-encoding" in answer.headers) == (kind == "chunked")
    assert (await agent.get()).status == 200


@pytest.mark.parametrize("size", [0, 1, 70_000, 5_000_000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_of_any_size(make_rig: Any, plain: HttpUpstream, size: int, chunked: bool) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    content = bytes(range(256)) * (size // 256) + b"e" * (size % 256)
    if chunked:
        await agent.send(request("http://api.test/", "Transfer-Encoding: chunked", method="POST"))
        for start in range(0, size, 50_000):
            piece = content[start : start + 50_000]
            await agent.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await agent.send(b"0\r\n\r\n")
    else:
        await agent.send(request("http://api.test/", f"Content-Length: {size}", method="POST") + content)
    assert (await agent.answer()).status == 200
    assert plain.seen[0].body == content
    assert plain.seen[0].header("transfer-encoding") == ("chunked" if chunked else None)
    assert (await agent.get()).status == 200


async def test_trailers_arrive_in_both_directions(make_rig: Any) -> None:
    heads: list[bytes] = []
    bodies: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heads.append(read_head(connection))
        body = b""
        while not body.endswith(b"\r\n\r\n"):
            body += connection.recv(1000)
        bodies.append(body)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nok\r\n0\r\nX-Sum: 7\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
        )

    with SocketUpstream(serve) as upstream:
        rig = await make_rig(lead("api.test", upstream, override={"headers": {"x-key": "of-the-rule"}}))
        agent = await rig.agent()
        await agent.send(
            request(
                "http://api.test/", "Transfer-Encoding: chunked", "Trailer: X-A", "TE: trailers, deflate",
                "Connection: TE", method="POST",
            )
            + b"1\r\nb\r\n0\r\nX-A: 1\r\nHost: evil.test\r\nX-Key: of-the-agent\r\nTransfer-Encoding: chunked\r\n\r\n"
        )  # fmt: skip
        answer = await agent.answer()
    assert (answer.headers["trailer"], answer.trailers) == ("X-Sum", {"x-sum": "7"})
    lines = heads[0].split(b"\r\n")
    assert b"Trailer: X-A" in lines
    assert b"Te: trailers" in lines  # and not the coding, which is between the agent and us (RFC 9110 10.1.4)
    assert b"Connection: te" in lines
    # Neither framing and routing nor what the rule sets can be changed by a trailer (RFC 9110 6.5.1).
    assert bodies[0] == b"1\r\nb\r\n0\r\nX-A: 1\r\n\r\n"


class Careful:
    """An upstream that is asked for consent."""

    def __init__(self, first: bytes) -> None:
        self.first = first
        self.body = b""
        self.head = b""

    def __call__(self, connection: socket.socket) -> None:
        self.head = read_head(connection)
        connection.sendall(self.first)
        if b"417" in self.first:
            connection.recv(1)
            return
        while len(self.body) < 4:
            self.body += connection.recv(4 - len(self.body))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("first", [b"HTTP/1.1 100 Continue\r\n\r\n", b""], ids=["consents", "is-silent"])
async def test_a_body_waits_for_consent(make_rig: Any, first: bytes) -> None:
    careful = Careful(first)
    with SocketUpstream(careful) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.send(request("http://api.test/", "Expect: 100-continue", "Content-Length: 4", method="PUT"))
        assert await agent.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await agent.send(b"body")
        assert (await agent.answer()).status == 200
    assert b"Expect: 100-continue\r\n" in careful.head
    assert careful.body == b"body"
    assert rig.requests[0].body == "body"


async def test_a_body_that_is_refused_is_never_asked_for(make_rig: Any) -> None:
    careful = Careful(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n")
    with SocketUpstream(careful) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.send(request("http://api.test/", "Expect: 100-continue", "Content-Length: 4", method="PUT"))
        answer = await agent.answer()
        assert (answer.status, answer.interim, answer.headers["connection"]) == (417, (), "close")
        assert await agent.rest() == b""
    assert rig.summary() == ["allowed PUT api.test/", "1: 417"]


async def test_a_denied_request_is_not_asked_for_its_body(make_rig: Any) -> None:
    rig = await make_rig()
    agent = await rig.agent()
    await agent.send(request("http://api.test/", "Expect: 100-continue", "Content-Length: 4", method="PUT"))
    answer = await agent.answer()
    assert (answer.status, answer.interim) == (403, ())


@pytest.mark.parametrize("allowed", [True, False])
async def test_an_answer_before_the_end_of_the_body_reaches_an_agent_that_still_sends(
    make_rig: Any, allowed: bool
) -> None:
    """The connection must not be reset under the answer (RFC 9112 9.6)."""

    def serve(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nmuch")
        while connection.recv(65536):
            pass

    with SocketUpstream(serve) as upstream:
        rig = await make_rig(*([lead("api.test", upstream)] if allowed else []))
        agent = await rig.agent()
        await agent.send(request("http://api.test/", "Content-Length: 4000000", method="POST"))
        for _ in range(30):
            await agent.send(b"x" * 100_000)
        answer = await agent.answer("POST")
        assert answer.status == (413 if allowed else 403)
        assert await agent.rest() == b""


async def test_an_upload_goes_on_while_the_answer_comes(make_rig: Any) -> None:
    """Some servers answer what comes as it comes."""

    def serve(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            word = connection.recv(3)
            connection.sendall(b"3\r\n%b\r\n" % word)
        connection.sendall(b"0\r\n\r\n")

    with SocketUpstream(serve) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.send(request("http://api.test/", "Content-Length: 9", method="POST"))
        assert (await agent.head()).startswith(b"HTTP/1.1 200 OK\r\n")
        for word in (b"one", b"two", b"six"):
            await agent.send(word)
            await agent.expect(b"3\r\n%b\r\n" % word)
        await agent.expect(b"0\r\n\r\n")
        assert await agent.rest() == b""


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_an_answer_that_ends_with_the_connection(make_rig: Any, version: bytes) -> None:
    with SocketUpstream(
        scripted(b"HTTP/%b 200 OK\r\nConnection: close\r\n\r\nwhole" % version, keep=False)
    ) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        for _ in range(2):
            answer = await agent.get()
            assert (answer.body, answer.headers.get("connection")) == (b"whole", None)
    assert upstream.connections == 2


async def test_a_malformed_request_is_refused_and_recorded(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    await agent.send(request("http://api.test/", "Content-Length: 1", "Transfer-Encoding: chunked", method="POST"))
    assert (await agent.answer()).status == 400
    assert rig.summary() == ["denied ? 11.0.0.1:80/", "1: 400"]
    assert plain.seen == []


async def test_a_body_with_broken_chunks_is_refused_and_breaks_off_upstream(make_rig: Any) -> None:
    got: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        read_head(connection)
        while data := connection.recv(1000):
            got.append(data)
        got.append(b"end")

    with SocketUpstream(serve) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.send(
            request("http://api.test/", "Transfer-Encoding: chunked", method="POST") + b"2\r\nok\r\nzz\r\n"
        )
        assert (await agent.answer()).status == 400
        await eventually(lambda: got[-1:] == [b"end"], what="the upstream is let go")
    assert b"0\r\n\r\n" not in b"".join(got)
    assert rig.summary() == ["allowed POST api.test/", "1: 400"]


async def test_hop_by_hop_fields_stay_on_their_side(make_rig: Any) -> None:
    heads: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heads.append(read_head(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: x-hop\r\nX-Hop: 1\r\nX-End: 2\r\nContent-Length: 0\r\n\r\n")

    with SocketUpstream(serve) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent: Agent = await rig.agent()
        answer = await agent.get(
            "http://api.test/", "Connection: x-mine, keep-alive", "X-Mine: 1", "Keep-Alive: 5",
            "Proxy-Authorization: Basic eA==", "Upgrade: h2c", "X-End: 2",
        )  # fmt: skip
    assert (answer.headers.get("x-hop"), answer.headers["x-end"]) == (None, "2")
    assert heads == [b"GET / HTTP/1.1\r\nHost: api.test\r\nX-End: 2\r\n\r\n"]
