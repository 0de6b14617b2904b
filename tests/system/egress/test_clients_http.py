"""What HTTP can do works through the proxy as it would without: bodies, streams, connections, WebSockets."""

from __future__ import annotations

import gzip
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.sync.server import ServerConnection, serve

from support.clients import install_inside
from support.registries import Answer, AnsweringUpstream
from support.upstreams import Authority, HttpUpstream, Seen, lead

pytestmark = pytest.mark.system

TOOLS = [{"backend": "local", "mount": "/tools", "origin": str(install_inside())}]
PYTHON = {"PYTHONPATH": "/tools", "PYTHONDONTWRITEBYTECODE": "1"}


async def test_redirects_are_the_agents_to_follow(sandboxes: Any, secure: HttpUpstream, plain: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure), lead("other.test", plain)])
    output = await sandbox.run("curl -sSL 'https://api.test/redirect?to=http://other.test/there'")
    assert json.loads(output.stdout)["path"] == "/there"
    denied = await sandbox.run("curl -sSL -w '%{http_code}' 'https://api.test/redirect?to=http://denied.test/there'")
    assert denied.stdout.endswith("403")
    statuses = [event["status"] for event in await sandbox.events() if event["type"] == "egress.response"]
    assert statuses == [302, 200, 302, 403]


async def test_compressed_answers_can_be_read(sandboxes: Any, authority: Authority) -> None:
    text = "much of the same " * 1000

    def answer(request: Seen) -> Answer:
        assert "gzip" in (request.header("accept-encoding") or "")
        return Answer(200, "text/plain", gzip.compress(text.encode()), (("Content-Encoding", "gzip"),))

    with AnsweringUpstream(answer, authority.context("api.test")) as upstream:
        sandbox = await sandboxes(egress=[lead("api.test", upstream)], fs=TOOLS, env=PYTHON)
        assert (await sandbox.run("curl -sS --compressed https://api.test/")).stdout == text
        script = "import httpx; print(httpx.get('https://api.test/').text, end='')"
        assert (await sandbox.run(["python3", "-c", script])).stdout == text


async def test_a_large_post_asks_before_it_is_sent(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    output = await sandbox.run(
        "head -c 2000000 /dev/zero | tr '\\0' z > /tmp/body;"
        "curl -sS -v --http1.1 --data-binary @/tmp/body https://api.test/echo -o /dev/null"
    )
    assert "< HTTP/1.1 100 Continue" in output.stderr, output
    assert "< HTTP/1.1 200" in output.stderr
    assert secure.seen[0].header("expect") == "100-continue"
    assert secure.seen[0].body == b"z" * 2_000_000
    request = (await sandbox.events())[0]
    assert request["method"] == "POST"
    assert request["body"] == "z" * (1 << 20), "what is recorded is bounded"


async def test_a_post_that_is_refused_before_its_body_is_told_so(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure, methods=["GET"])])
    output = await sandbox.run(
        "head -c 2000000 /dev/zero > /tmp/body; curl -sS -w '%{http_code}' --data-binary @/tmp/body https://api.test/"
    )
    assert output.stdout == "403", output
    assert secure.seen == []


async def test_uploads_by_put_and_heads(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    output = await sandbox.run(
        "echo content > /tmp/file; curl -sSf -T /tmp/file https://api.test/put/ && echo chunks |"
        " curl -sSf -T - https://api.test/chunks && curl -sSfI https://api.test/head"
    )
    assert output.exit_code == 0, output
    assert [(seen.method, seen.path, seen.body) for seen in secure.seen] == [
        ("PUT", "/put/file", b"content\n"),
        ("PUT", "/chunks", b"chunks\n"),
        ("HEAD", "/head", b""),
    ]
    assert "content-length" in output.stdout.lower(), "a HEAD tells the length of what it does not send"


async def test_one_connection_carries_many_requests(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    urls = " ".join(f"https://api.test/{number} -o /dev/null" for number in range(5))
    output = await sandbox.run(f"curl -sS --http1.1 -w '%{{num_connects}} ' {urls}")
    assert output.stdout.split() == ["1", "0", "0", "0", "0"], output
    assert [seen.path for seen in secure.seen] == [f"/{number}" for number in range(5)]
    assert secure.connections == 1
    requests = [event["path"] for event in await sandbox.events() if event["type"] == "egress.request"]
    assert requests == [f"/{number}" for number in range(5)]


async def test_server_sent_events_come_as_they_are_sent(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    script = (
        "import time, urllib.request\n"
        "for line in urllib.request.urlopen('https://api.test/sse/4?pause=0.25'):\n"
        "    if line.strip(): print(time.monotonic(), line.decode().strip(), flush=True)\n"
    )
    output = await sandbox.run(["python3", "-c", script])
    lines = [line.split(" ", 1) for line in output.stdout.splitlines()]
    assert [line[1] for line in lines] == [f"data: {number}" for number in range(4)], output
    assert float(lines[-1][0]) - float(lines[0][0]) > 0.5, "they were held back"
    chunks = [event["body"] for event in await sandbox.events() if event["type"] == "egress.chunk"]
    assert chunks == [f"data: {number}\n\n" for number in range(4)]


async def test_trailers_arrive(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    output = await sandbox.run("curl -sS --http1.1 -D /tmp/head https://api.test/trailers; cat /tmp/head")
    assert output.stdout.startswith("body\n"), output
    assert "x-trailer: here" in output.stdout.lower()


# -- WebSocket --------------------------------------------------------------------------------------------------------

CHAT = """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1]) as socket:
    socket.send("hello")
    print(socket.recv())
    socket.send(b"12345")
    print(socket.recv())
"""


@contextmanager
def echo_server(context: ssl.SSLContext | None) -> Iterator[str]:
    """Sends every message back; yields its address."""

    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with serve(echo, "127.0.0.1", 0, ssl=context) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
    thread.join()


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_websockets_pass_and_their_messages_are_labelled(
    sandboxes: Any, authority: Authority, scheme: str
) -> None:
    with echo_server(authority.context("chat.test") if scheme == "wss" else None) as address:
        rule = {"access": "allow", "host": "chat.test", "override": {"host": address}}
        sandbox = await sandboxes(egress=[rule], fs=TOOLS, env=PYTHON)
        output = await sandbox.run(["python3", "-c", CHAT, f"{scheme}://chat.test/room"])
        assert output.stdout.splitlines() == ["hello", "b'12345'"], output
        denied = await sandbox.run(["python3", "-c", CHAT, f"{scheme}://other.test/room"])
        assert denied.exit_code != 0
    request, response, *rest = await sandbox.events()
    assert (request["method"], request["path"], response["status"]) == ("GET", "/room", 101)
    chunks = [(event["label"], event["body"]) for event in rest if event.get("request_id") == request["id"]]
    assert chunks[:4] == [
        ("up", "hello"),
        ("down", "hello"),
        ("up", "[binary 5 bytes]"),
        ("down", "[binary 5 bytes]"),
    ]
    assert ("up", "[close 1000]") in chunks
    assert [event["access"] for event in rest if event["type"] == "egress.request"] == ["denied"]
