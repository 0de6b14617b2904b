"""The rules of `allow_sandbox` let an agent make and reach exactly one sandbox, through the gateway's names."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from support.clients import helper_rules, install_inside
from support.plain import plain_client
from support.server import Server
from support.waiting import until_async

pytestmark = pytest.mark.system

TOOLS = [
    {"backend": "local", "mount": "/workspace"},
    {"backend": "local", "mount": "/tools", "origin": str(install_inside())},
]
PYTHON = {"PYTHONPATH": "/tools", "PYTHONDONTWRITEBYTECODE": "1"}
STATUS = "-w '\\n%{http_code}'"


@pytest.fixture
async def child(egress_server: Server) -> AsyncIterator[str]:
    """The key of the sandbox that an agent may make."""
    key = f"child-{uuid.uuid4().hex[:8]}"
    yield key
    async with plain_client(base_url=egress_server.url, timeout=60) as client:
        await client.post(f"/controller/v1/shutdown/{key}")


def nested(key: str, config: str = 'SandboxConfig(env={"PINNED": "yes"})', more: str = "") -> list[dict[str, Any]]:
    return helper_rules(f"allow_sandbox({key!r}, {config}{more})")


async def listed(server: Server) -> dict[str, str]:
    async with plain_client(base_url=server.url) as client:
        return {entry["key"]: entry["id"] for entry in (await client.get("/controller/v1/sandboxes")).json()}


async def test_an_agent_makes_and_reaches_its_own_sandbox_with_curl(
    sandboxes: Any, egress_server: Server, child: str
) -> None:
    config = 'SandboxConfig(env={"PINNED": "yes"}, entrypoint="python3 -m http.server 8000")'
    agent = await sandboxes(egress=nested(child, config, ', allowed_dirs=["/workspace/shared"]'))
    made = await agent.run(f"curl -sS -X POST -d '{{}}' http://gateway/v1/sandboxes/{child}")
    reference = json.loads(made.stdout)
    assert reference["key"] == child, made
    assert (await listed(egress_server))[child] == reference["id"]
    base = f"http://gateway.hiver:10000/sandbox/{reference['id']}/v1/{child}"

    async def served() -> bool:
        return "Directory listing" in (await agent.run(f"curl -sS {base}/proxy/8000/")).stdout

    await until_async(served, seconds=20, what="the inner server answers")
    written = await agent.run(
        f"echo from outside > /tmp/text && curl -sSf --data-binary @/tmp/text {base}/file/workspace/shared/text"
        f" && curl -sSf $HIVER_GATEWAY_URL{base.removeprefix('http://gateway.hiver:10000')}/file/workspace/shared/text"
    )
    assert written.stdout.endswith("from outside\n"), written

    request, response, *_ = await agent.events()
    assert (request["host"], request["method"], request["path"]) == ("gateway", "POST", f"/v1/sandboxes/{child}")
    shown = {name.lower(): value for name, value in response["headers"].items()}
    assert (response["status"], shown["x-hiver-sandbox-id"]) == (201, reference["id"])
    assert shown["x-hiver-sandbox-key"] == child


async def test_an_agent_uses_the_published_client(sandboxes: Any, egress_server: Server, child: str) -> None:
    script = (
        "import asyncio, hiver, sys\n"
        "async def main():\n"
        "    sandbox = await hiver.get_or_create_sandbox(sys.argv[1])\n"
        "    await sandbox.write_file('/workspace/text', 'by the client')\n"
        "    print((await sandbox.read_file('/workspace/text')).decode(), sandbox.proxy_url(80))\n"
        "asyncio.run(main())\n"
    )
    agent = await sandboxes(egress=nested(child, more=', allowed_dirs=["workspace"]'), fs=TOOLS, env=PYTHON)
    output = await agent.run(["python3", "-c", script, child])
    assert output.stdout.startswith(f"by the client http://gateway:{egress_server.port}/sandbox/"), output
    assert child in await listed(egress_server)


async def test_what_is_pinned_cannot_be_changed(sandboxes: Any, egress_server: Server, child: str) -> None:
    agent = await sandboxes(egress=nested(child))
    wish = {"env": {"PINNED": "no"}, "image": "none-such", "egress": [{"access": "allow", "host": "*"}], "ttl": 1}
    made = await agent.run(
        f"curl -sS -X POST -H 'x-hiver-image: none-such' -H 'content-type: application/json' -d '{json.dumps(wish)}'"
        f" 'http://gateway/v1/sandboxes/{child}?ttl=1' {STATUS}"
    )
    assert made.stdout.endswith("201"), made
    reference = json.loads(made.stdout.splitlines()[0])
    async with plain_client(base_url=egress_server.url) as client:
        config = (await client.get(f"/sandbox/{reference['id']}/v1/{child}/config")).json()
    assert config["env"] == {"PINNED": "yes"}
    assert not config.keys() & {"image", "egress", "ttl"}


async def test_nothing_else_of_the_api_can_be_reached(sandboxes: Any, egress_server: Server, child: str) -> None:
    victim = await sandboxes()
    await victim.write("/workspace/shared/secret", "secret")
    agent = await sandboxes(egress=nested(child, more=', allowed_dirs=["workspace/shared"]'))
    made = await agent.run(f"curl -sS -X POST http://gateway/v1/sandboxes/{child}")
    own = f"/sandbox/{json.loads(made.stdout)['id']}/v1/{child}"
    before = await listed(egress_server)
    denied = [
        ("POST", f"/v1/sandboxes/{child}x"),
        ("PUT", f"/v1/sandboxes/{child}"),
        ("PUT", f"/controller/v1/sandboxes/{child}"),
        ("GET", "/controller/v1/sandboxes"),
        ("POST", f"/controller/v1/shutdown/{victim.key}"),
        ("DELETE", own),
        ("DELETE", victim.base),
        ("GET", f"{victim.base}/file/workspace/shared/secret"),
        ("POST", f"{victim.base}/exec"),
        ("POST", f"{own}/exec"),
        ("PUT", f"{own}/config"),
        ("GET", f"{own}/config"),
        ("GET", f"{own}/file/etc/passwd"),
        ("GET", f"{own}/file/workspace/shared/../../etc/passwd"),
        ("GET", f"{own}/file/workspace/shared/%2e%2e/%2e%2e/etc/passwd"),
        ("GET", f"{own}/file/workspace/shared%2f..%2f..%2fetc%2fpasswd"),
        ("GET", f"{own}/proxy/../config"),
        ("GET", f"{own}/proxy/%2e%2e/config"),
        ("POST", f"{own}/proxy/../../../../../v1/sandboxes/{child}x"),
    ]
    refused = [
        ("GET", f"/sandbox/{victim.id}/v1/{child}/proxy/8000/"),
        ("GET", f"/sandbox/{victim.key}/v1/{child}/proxy/8000/"),
        ("GET", f"/sandbox/{victim.id}/v1/{child}/file/workspace/shared/secret"),
        ("GET", f"/sandbox/{victim.key}/v1/{child}/file/workspace/shared/secret"),
        ("GET", f"/sandbox/{victim.key}%2fv1%2f{victim.key}/v1/{child}/file/workspace/shared/secret"),
    ]
    for method, path in denied + refused:
        output = await agent.run(f"curl -sS --path-as-is -X {method} http://gateway{path} {STATUS}")
        wanted = ("403",) if (method, path) in denied else ("404", "403")
        assert output.stdout.splitlines()[-1] in wanted, (method, path, output)
        assert "secret" not in output.stdout.replace("/secret", ""), (method, path)
    assert await listed(egress_server) == before


@pytest.mark.parametrize("host", ["*", "gatewa*", "*.hiver", "127.0.0.1*", "localhost*"])
async def test_a_wildcard_does_not_name_the_gateway(sandboxes: Any, egress_server: Server, host: str) -> None:
    agent = await sandboxes(egress=[{"access": "allow", "host": host}])
    for name in ("gateway", "gateway.hiver", f"127.0.0.1:{egress_server.port}", f"localhost:{egress_server.port}"):
        # By the Host: under these addresses the sandbox has itself.
        command = f"curl -sS --connect-to ::11.0.0.1: http://{name}/controller/v1/sandboxes {STATUS}"
        output = await agent.run(command)
        assert output.stdout.endswith("403"), output
        assert agent.key not in output.stdout


async def test_every_port_of_the_gateways_name_leads_to_it_also_with_tls(sandboxes: Any, egress_server: Server) -> None:
    agent = await sandboxes(egress=[{"access": "allow", "host": "gateway"}])
    for url in ("http://gateway", "http://gateway:10000", f"http://gateway:{egress_server.port}", "https://gateway"):
        output = await agent.run(f"curl -sS {url}/controller/v1/sandboxes")
        assert agent.key in output.stdout, (url, output)


async def test_a_gateway_of_the_users_own_comes_first(sandboxes: Any, plain: Any) -> None:
    rule = {"access": "allow", "host": "gateway", "override": {"host": plain.address}}
    agent = await sandboxes(egress=[rule], env={"HIVER_GATEWAY_URL": "http://gateway"})
    await agent.run("curl -sS $HIVER_GATEWAY_URL/own")
    assert [(seen.path, seen.header("host")) for seen in plain.seen] == [("/own", "gateway")]


async def test_the_names_mean_nothing_to_browsers_outside(egress_server: Server) -> None:
    async with plain_client(base_url=egress_server.url) as client:
        for host in ("gateway", "gateway.hiver", f"gateway:{egress_server.port}"):
            answer = await client.get("/controller/v1/sandboxes", headers={"host": host})
            assert answer.status_code == 403


async def test_a_page_inside_a_sandbox_is_no_better_than_one_outside(sandboxes: Any) -> None:
    agent = await sandboxes(egress=[{"access": "allow", "host": "gateway"}])
    output = await agent.run(f"curl -sS -H 'Origin: http://gateway' http://gateway/controller/v1/sandboxes {STATUS}")
    assert output.stdout.endswith("403"), output


async def test_both_spellings_of_async_are_accepted(sandboxes: Any, child: str, egress_server: Server) -> None:
    rules = nested(child, 'SandboxConfig(fs=[LocalFileSystem(backend="local", mount="/workspace", async_=True)])')
    assert "async_" in json.dumps(rules), "what the helper writes"
    agent = await sandboxes(egress=rules)
    made = await agent.run(f"curl -sS -X POST http://gateway/v1/sandboxes/{child} {STATUS}")
    assert made.stdout.endswith("201"), made
