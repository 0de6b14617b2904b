"""Programs of other people work in a sandbox as they are, with nothing configured there; each request is on record."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from support.clients import CLIENTS, install_inside
from support.registries import bare_repository, git_server
from support.upstreams import Authority, HttpUpstream, lead

pytestmark = pytest.mark.system

TOOLS = "/tools"
PYTHON = {"PYTHONPATH": TOOLS, "PYTHONDONTWRITEBYTECODE": "1"}
JAVA_SOURCE = """
import java.net.URI;
import java.net.http.*;

class Fetch {
    public static void main(String[] arguments) throws Exception {
        var request = HttpRequest.newBuilder(URI.create("https://api.test/hello")).build();
        var answer = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
        System.out.println(answer.body());
    }
}
"""

PROGRAMS = {
    "curl": "curl -sSf https://api.test/hello",
    "wget": "wget -qO- https://api.test/hello",
    "urllib": "python3 -c 'import urllib.request as u; print(u.urlopen(\"https://api.test/hello\").read().decode())'",
    "requests": "python3 -c 'import requests; print(requests.get(\"https://api.test/hello\").text)'",
    "httpx": "python3 -c 'import httpx; print(httpx.get(\"https://api.test/hello\").text)'",
    "node": "node -e 'fetch(\"https://api.test/hello\").then(r => r.text()).then(console.log)'",
    "java": "java -XX:TieredStopAtLevel=1 /tmp/Fetch.java",
}


def mounts() -> list[dict[str, Any]]:
    """Packages of the host for the sandbox's Python."""
    return [{"backend": "local", "mount": TOOLS, "origin": str(install_inside())}]


def require(program: str) -> None:
    """Sandboxes see this machine's `/usr`."""
    if shutil.which(program, path="/usr/bin") is None:
        pytest.skip(f"{program} is not on this machine")


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_program_reaches_an_intercepted_upstream(sandboxes: Any, secure: HttpUpstream, program: str) -> None:
    require(PROGRAMS[program].split()[0])
    sandbox = await sandboxes(egress=[lead("api.test", secure)], fs=mounts(), env=PYTHON)
    await sandbox.write("/tmp/Fetch.java", JAVA_SOURCE)
    output = await sandbox.run(PROGRAMS[program])
    assert output.exit_code == 0, output
    assert '"path": "/hello"' in output.stdout
    assert "PKIX" not in output.stderr
    assert [seen.path for seen in secure.seen] == ["/hello"]
    request, response, *_ = await sandbox.events()
    assert (request["type"], request["access"], request["host"]) == ("egress.request", "allowed", "api.test")
    assert (request["method"], request["path"]) == ("GET", "/hello")
    assert (response["type"], response["status"]) == ("egress.response", 200)
    assert response["request_id"] == request["id"]


async def test_git_clones_and_pushes(sandboxes: Any, authority: Authority, tmp_path: Path) -> None:
    bare_repository(tmp_path / "project.git", {"README": "first\n"})
    with git_server(tmp_path, authority.context("git.test")) as upstream:
        sandbox = await sandboxes(egress=[lead("git.test", upstream)])
        output = await sandbox.run(
            "cd /tmp && git clone -q https://git.test/project.git && cd project && cat README"
            " && git config user.email a@b && git config user.name a"
            " && head -c 3000000 /dev/urandom > large && git add . && git commit -qm second && git push -q"
        )
        assert output.exit_code == 0, output
        assert output.stdout.startswith("first\n")
        events = [event for event in await sandbox.events() if event["type"] == "egress.request"]
        assert {(event["method"], event["path"]) for event in events} >= {
            ("GET", "/project.git/info/refs"),
            ("POST", "/project.git/git-upload-pack"),
            ("POST", "/project.git/git-receive-pack"),
        }
        assert max(len(seen.body) for seen in upstream.seen) > 3_000_000


async def test_nss_lists_the_authority(sandboxes: Any) -> None:
    require("certutil")
    sandbox = await sandboxes()
    output = await sandbox.run("certutil -L -d sql:$HOME/.pki/nssdb")
    assert "Hiver Sandbox CA" in output.stdout, output
    assert "C,," in output.stdout


async def test_chromium_shows_a_page(sandboxes: Any, secure: HttpUpstream) -> None:
    program = Path("/usr/lib/chromium/chromium")  # its wrapper reads a folder in /etc that sandboxes do not have
    require(str(program))
    sandbox = await sandboxes(egress=[lead("api.test", secure)], memory=1500)
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage"
    output = await sandbox.run(f"timeout 60 {program} {flags} --dump-dom https://api.test/hello")
    assert "/hello" in output.stdout, output
    assert secure.seen[0].header("user-agent")


async def test_an_authority_is_known_in_its_sandbox_only(sandboxes: Any) -> None:
    one, other = await sandboxes(), await sandboxes()
    first, second = [(await each.run("cat /etc/ssl/certs/sandbox-ca.crt")).stdout for each in (one, other)]
    bundle = (await one.run("cat $SSL_CERT_FILE")).stdout
    assert "BEGIN CERTIFICATE" in first
    assert first in bundle
    assert second not in bundle
    assert "PRIVATE" not in bundle + (await one.run("grep -rl PRIVATE /etc/ssl /root/.pki 2>/dev/null")).stdout


async def test_what_is_mounted_into_a_sandbox_does_not_learn_of_its_authority(sandboxes: Any) -> None:
    with tempfile.TemporaryDirectory(dir=CLIENTS) as folder:
        shared = Path(folder)
        (shared / "bundle.pem").write_text("-----BEGIN CERTIFICATE-----\nof the operator\n")
        mount = {"backend": "local", "mount": "/shared", "origin": folder}
        sandbox = await sandboxes(fs=[mount], env={"HOME": "/shared", "SSL_CERT_FILE": "/shared/bundle.pem"})
        assert (await sandbox.run("ls -A /shared")).stdout == "bundle.pem\n"
        assert "Hiver" not in (shared / "bundle.pem").read_text()
        assert (shared / "bundle.pem").read_text().count("BEGIN") == 1
