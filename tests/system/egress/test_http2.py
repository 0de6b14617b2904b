"""HTTP/2 from inside a sandbox: curl, Node's client, and gRPC with a real client and a real server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from support.grpc_js import archive
from support.grpc_upstream import GrpcUpstream
from support.upstreams import Authority, HttpUpstream, SocketUpstream, lead

pytestmark = pytest.mark.system

CURL = "curl -sS -m 30 --http2"

NODE = """
const http2 = require('node:http2');
const session = http2.connect('https://api.test');
session.on('error', error => console.log('error', error.code));
function ask(headers, body) {
  return new Promise(resolve => {
    const stream = session.request(headers);
    const seen = {};
    let data = '';
    stream.on('response', head => { seen.status = head[':status']; });
    stream.on('trailers', trailers => { seen.trailer = trailers['x-trailer']; });
    stream.on('data', piece => { data += piece; });
    stream.on('error', error => { seen.error = error.code; });
    stream.on('close', () => resolve({...seen, length: data.length, code: stream.rstCode}));
    stream.end(body);
  });
}
"""

GRPC = """
const grpc = require('@grpc/grpc-js');
const raw = data => data;
const path = name => '/test.Echo/' + name;
const client = new grpc.Client('api.test:443', grpc.credentials.createSsl());
const unary = (name, text) => new Promise(resolve => {
  const seen = {};
  const done = (error, answer) => {
    seen.code = error ? error.code : 0;
    seen.details = error ? error.details : undefined;
    seen.answer = answer && String(answer);
  };
  const call = client.makeUnaryRequest(path(name), raw, raw, Buffer.from(text), new grpc.Metadata(), {}, done);
  call.on('status', status => {
    const [trailer] = status.metadata.get('x-trailer'), [why] = status.metadata.get('x-why');
    resolve({...seen, trailer, why});
  });
});
const both = () => new Promise(resolve => {
  const call = client.makeBidiStreamRequest(path('Both'), raw, raw, new grpc.Metadata(), {});
  const seen = [];
  call.on('data', data => {
    seen.push(String(data));
    if (seen.length < 5) call.write(Buffer.from('m' + seen.length)); else call.end();
  });
  call.on('error', error => resolve(error.message));
  call.on('end', () => resolve(seen));
  call.write(Buffer.from('m0'));
});
const count = () => new Promise(resolve => {
  const call = client.makeServerStreamRequest(path('Count'), raw, raw, Buffer.alloc(20), new grpc.Metadata(), {});
  let count = 0;
  call.on('data', () => count++);
  call.on('error', error => resolve(error.message));
  call.on('end', () => resolve(count));
});
"""


@pytest.fixture
def grpc_upstream(authority: Authority) -> Iterator[GrpcUpstream]:
    with GrpcUpstream(authority, "api.test") as upstream:
        yield upstream


async def _node(sandbox: Any, script: str) -> Any:
    await sandbox.write("/workspace/script.js", script)
    output = await sandbox.run("cd /workspace && node script.js")
    assert output.exit_code == 0, output
    return json.loads(output.stdout)


async def _grpc(sandbox: Any, script: str) -> Any:
    await sandbox.write("/workspace/modules.tar.gz", archive())
    unpacked = await sandbox.run("cd /workspace && tar -xzf modules.tar.gz")
    assert unpacked.exit_code == 0, unpacked
    return await _node(sandbox, GRPC + script)


async def test_curl_speaks_http_2(sandboxes: Any, secure: HttpUpstream) -> None:
    rule = lead("api.test", secure, override={"headers": {"authorization": "Bearer tell-nobody"}})
    sandbox = await sandboxes(egress=[rule])
    output = await sandbox.run(f"{CURL} -w '%{{http_version}}' -d posted https://api.test/a?b=c -H 'cookie: a=1'")
    assert output.exit_code == 0, output
    assert output.stdout.endswith("2")
    assert secure.seen[0].body == b"posted"
    assert secure.seen[0].header("authorization") == "Bearer tell-nobody"
    request, response, chunk = await sandbox.events()
    assert (request["method"], request["host"], request["path"], request["query"]) == ("POST", "api.test", "/a", "b=c")
    assert (request["body"], response["status"]) == ("posted", 200)
    assert "tell-nobody" not in json.dumps([request, response, chunk])


async def test_denials_and_failures_look_as_with_http_1(sandboxes: Any, secure: HttpUpstream) -> None:
    refused = {"access": "allow", "host": "down.test", "override": {"host": "127.0.0.1:1"}}
    sandbox = await sandboxes(egress=[lead("api.test", secure, paths=["/allowed"]), refused])
    output = await sandbox.run(
        f"{CURL} -w '%{{http_version}} %{{http_code}} %{{size_download}}' https://api.test/denied"
    )
    assert output.stdout == "2 403 0"
    output = await sandbox.run(f"{CURL} -o /dev/null -w '%{{http_version}} %{{http_code}}' https://down.test/")
    assert output.stdout == "2 502"
    assert secure.seen == []
    assert [event["status"] for event in await sandbox.events("egress.response")] == [403, 502]


async def test_the_authority_is_judged_besides_the_sni(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    output = await sandbox.run(f"{CURL} -w '%{{http_code}}' -H 'host: other.test' https://api.test/")
    assert output.stdout == "403"
    assert secure.seen == []


async def test_large_bodies_pass_both_ways(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    output = await sandbox.run(f"{CURL} -o /dev/null -w '%{{size_download}}' https://api.test/bytes/50000000")
    assert output.stdout == "50000000", output
    upload = f"head -c 50000000 /dev/zero | {CURL} -T - https://api.test/status/200"
    assert (await sandbox.run(upload)).exit_code == 0
    assert len(secure.seen[-1].body) == 50_000_000
    counted = "truncate -s 50000000 /workspace/zeros; " + f"{CURL} -T /workspace/zeros https://api.test/discard"
    assert json.loads((await sandbox.run(counted)).stdout) == {"bytes": 50_000_000}


async def test_a_denial_before_the_end_of_the_body_reaches_curl(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure, paths=["/allowed"])])
    upload = f"head -c 5000000 /dev/zero | {CURL} -o /dev/null -w '%{{http_code}}' -T - https://api.test/denied"
    assert (await sandbox.run(upload)).stdout == "403"


async def test_http_1_goes_on_working_inside_tls(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    for option in ("--http1.1", "--no-alpn"):
        output = await sandbox.run(f"curl -sS -m 30 {option} -o /dev/null -w '%{{http_version}}' https://api.test/")
        assert output.stdout == "1.1", output


async def test_node_has_many_streams_at_once(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    seen = await _node(
        sandbox,
        NODE
        + """
(async () => {
  const many = await Promise.all([...Array(60).keys()].map(n => ask({':path': '/chunked/' + n * 1000})));
  const trailers = await ask({':path': '/trailers', ':method': 'POST'}, 'x'.repeat(100000));
  const cut = await ask({':path': '/cut'});
  const socket = await ask({':method': 'CONNECT', ':authority': 'api.test', ':path': undefined});
  const after = await ask({':path': '/bytes/5'});
  session.close();
  console.log(JSON.stringify({lengths: many.map(one => one.length), trailers, cut, socket, after}));
})();
""",
    )
    assert seen["lengths"] == [n * 1000 for n in range(60)]
    assert seen["trailers"] == {"status": 200, "trailer": "here", "length": 5, "code": 0}
    assert (seen["cut"]["status"], seen["cut"]["length"], seen["cut"]["error"]) == (200, 4, "ERR_HTTP2_STREAM_ERROR")
    assert seen["socket"]["status"] == 501
    assert seen["after"] == {"status": 200, "length": 5, "code": 0}


async def test_node_may_close_its_session_while_streams_go_on(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    script = """
const one = ask({':path': '/slow/0.5'});
session.on('connect', () => setTimeout(() => session.close(), 100));
one.then(seen => console.log(JSON.stringify(seen)));
"""
    seen = await _node(sandbox, NODE + script)
    assert (seen["status"], seen["code"]) == (200, 0)


async def test_what_a_server_breaks_off_is_broken_off_alone(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    script = """
const slow = ask({':path': '/slow/1'});
const gone = session.request({':path': '/slow/30'});
gone.on('error', () => {});
setTimeout(() => gone.close(http2.constants.NGHTTP2_CANCEL), 300);
slow.then(seen => { session.close(); console.log(JSON.stringify(seen)); });
"""
    assert (await _node(sandbox, NODE + script))["status"] == 200
    statuses = [event["status"] for event in await sandbox.events("egress.response")]
    assert sorted(statuses) == [0, 200]


async def test_grpc(sandboxes: Any, grpc_upstream: GrpcUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", grpc_upstream)])
    seen = await _grpc(
        sandbox,
        """
(async () => {
  const seen = {unary: await unary('Unary', 'hello'), fail: await unary('Fail', 'x'), none: await unary('None', 'x')};
  seen.both = await both();
  seen.count = await count();
  seen.many = (await Promise.all([...Array(50).keys()].map(n => unary('Unary', 'n' + n)))).map(one => one.answer);
  client.close();
  console.log(JSON.stringify(seen));
})();
""",
    )
    assert seen["unary"] == {"code": 0, "answer": "hello", "trailer": "here"}
    assert seen["fail"] == {"code": 9, "details": "not today", "why": "just so"}
    assert seen["none"]["code"] == 12
    assert seen["both"] == ["m0", "m1", "m2", "m3", "m4"]
    assert seen["count"] == 20
    assert seen["many"] == [f"n{n}" for n in range(50)]
    assert len(grpc_upstream.peers) == 1
    paths = {event["path"] for event in await sandbox.events("egress.request") if event["method"] == "POST"}
    assert paths == {f"/test.Echo/{name}" for name in ("Unary", "Fail", "None", "Both", "Count")}


async def test_grpc_is_judged_by_method(sandboxes: Any, grpc_upstream: GrpcUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", grpc_upstream, paths=["/test.Echo/Unary"])])
    seen = await _grpc(
        sandbox,
        """
(async () => {
  const seen = [await unary('Unary', 'a'), await unary('Fail', 'b')];
  client.close();
  console.log(JSON.stringify(seen.map(one => one.code)));
})();
""",
    )
    assert seen == [0, 7]  # PERMISSION_DENIED, as gRPC reads a 403
    assert len(grpc_upstream.metadata) == 1


async def test_grpc_to_a_server_without_http_2(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    script = "unary('Unary', 'a').then(seen => { client.close(); console.log(JSON.stringify(seen.code)); });"
    assert await _grpc(sandbox, script) == 14  # UNAVAILABLE, as gRPC reads a 502
    assert secure.seen == []
    assert 502 in [event["status"] for event in await sandbox.events("egress.response")]


WEBSOCKET = """
import socket, ssl, sys
context = ssl.create_default_context()
if sys.argv[1] != "none":
    context.set_alpn_protocols(sys.argv[1].split(","))
with context.wrap_socket(socket.create_connection(("api.test", 443)), server_hostname="api.test") as stream:
    stream.sendall(b"GET /ws HTTP/1.1\\r\\nHost: api.test\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\n"
                   b"Sec-WebSocket-Version: 13\\r\\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n")
    head = b""
    while not head.endswith(b"\\r\\n\\r\\n"):
        head += stream.recv(1)
    stream.sendall(b"\\x81\\x82\\0\\0\\0\\0hi")
    print(stream.selected_alpn_protocol(), head.split()[1].decode(), stream.recv(100))
"""


def _websocket(connection: socket.socket) -> None:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    connection.sendall(b"\x81\x02" + connection.recv(100)[-2:])


@pytest.mark.parametrize(
    ("offered", "settled"), [("none", "None"), ("http/1.1", "http/1.1"), ("x,http/1.1", "http/1.1")]
)
async def test_websockets_inside_tls_go_by_http_1(
    sandboxes: Any, authority: Authority, offered: str, settled: str
) -> None:
    with SocketUpstream(_websocket, authority.context("api.test")) as upstream:
        sandbox = await sandboxes(egress=[lead("api.test", upstream)])
        await sandbox.write("/workspace/ws.py", WEBSOCKET)
        output = await sandbox.run(f"python3 /workspace/ws.py {offered}")
        assert output.stdout == f"{settled} 101 b'\\x81\\x02hi'\n", output
        chunks = await sandbox.events("egress.chunk")
    assert [(chunk["label"], chunk["body"]) for chunk in chunks[:2]] == [("up", "hi"), ("down", "hi")]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("--http2-prior-knowledge http://api.test/", id="prior knowledge"),
        pytest.param("--http2 http://api.test/denied", id="upgrade to h2c"),
        pytest.param("--http1.1 -H 'Connection: Upgrade' -H 'Upgrade: h2c' http://api.test/denied", id="by hand"),
    ],
)
async def test_http_2_without_tls_is_no_way_round(sandboxes: Any, command: str) -> None:
    arrived: list[bytes] = []
    with SocketUpstream(lambda connection: arrived.append(connection.recv(1000))) as upstream:
        sandbox = await sandboxes(egress=[lead("api.test", upstream, paths=["/allowed"])])
        output = await sandbox.run(f"curl -sS -m 10 -o /dev/null -w '%{{http_code}}' {command}")
        assert output.stdout in ("000", "403")
        await asyncio.sleep(0)
        assert arrived == []
    assert {event["access"] for event in await sandbox.events("egress.request")} == {"denied"}


async def test_h2c_is_not_offered_to_the_upstream(sandboxes: Any, plain: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", plain)])
    output = await sandbox.run("curl -sS -m 10 --http2 -w '%{http_version}' -o /dev/null http://api.test/")
    assert output.stdout == "1.1"
    assert plain.seen[0].header("upgrade") is None
    assert plain.seen[0].header("http2-settings") is None
