"""The command line against a server that is only a script of answers."""

import json
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from hiverd import cli, doctor, plugins
from hiverd.contracts.errors import UnavailableError, UnsupportedError
from hiverd.contracts.isolation import BackendContext, Finding
from hiverd.egress import gate
from hiverd.settings import Settings


class Script(BaseHTTPRequestHandler):
    """Answers from `answers`, by method and path; notes the requests."""

    answers: ClassVar[dict[str, tuple[int, bytes]]] = {}
    requests: ClassVar[list[tuple[str, bytes]]] = []
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        line = f"{self.command} {self.path}"
        self.requests.append((line, body))
        known = (answer for prefix, answer in self.answers.items() if line.startswith(prefix))
        status, content = next(known, (404, b'{"error": "no such route"}'))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = answer  # noqa: N815 -- the library's names

    def log_message(self, *_: Any) -> None:
        pass


LIST = "GET /controller/v1/sandboxes"
BASE = "/sandbox/id-1/v1/demo"
REFS = [{"id": "id-1", "key": "demo", "status": "running"}, {"id": "id-2", "key": "longer-name"}]


@pytest.fixture
def server() -> Iterator[str]:
    Script.answers = {LIST: (200, json.dumps(REFS).encode())}
    Script.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Script) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, name="script")
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def hiver(*arguments: str, **env: str | None) -> Result:
    return CliRunner().invoke(cli.main, arguments, env=env, prog_name="hiver")


def test_ls(server: str) -> None:
    assert hiver("ls", "--server", server).output == (
        "KEY          STATUS   ID\ndemo         running  id-1\nlonger-name  running  id-2\n"
    )
    assert json.loads(hiver("ls", "--json", HIVER_GATEWAY_URL=server).output) == REFS


def test_exec_streams_and_passes_the_exit_code_through(server: str) -> None:
    frames = (
        b': hello\n\nevent: stdout\ndata: {"text":"a\\u00e9\\n","type":"stdout"}\n\n'
        b': keep-alive\n\nevent: stderr\r\ndata: {"text":"oops","type":"stderr"}\r\n\r\n'
        b'event: exit\ndata: {"code":7,"type":"exit"}\n\n'
    )
    Script.answers[f"POST {BASE}/exec-stream/"] = (200, frames)
    result = hiver("exec", "--server", server, "--cwd", "/tmp", "--env", "A=b=c", "demo", "--", "ls", "-l", "$HOME")
    assert (result.exit_code, result.stdout, result.stderr) == (7, "aé\n", "oops")
    assert json.loads(Script.requests[-1][1]) == {"command": ["ls", "-l", "$HOME"], "cwd": "/tmp", "env": {"A": "b=c"}}


def test_exec_that_is_cut_off(server: str) -> None:
    Script.answers[f"POST {BASE}/exec-stream/"] = (200, b'data: {"text":"a","type":"stdout"}\n\n')
    result = hiver("exec", "--server", server, "demo", "--", "x")
    assert (result.exit_code, result.stderr) == (125, "hiver: the connection ended before the command did\n")


def test_exec_in_no_sandbox(server: str) -> None:
    result = hiver("exec", "--server", server, "other", "--", "x")
    assert (result.exit_code, result.stderr) == (125, 'hiver: there is no sandbox "other"; see: hiver ls\n')


def test_events(server: str) -> None:
    Script.answers[f"GET {BASE}/events"] = (200, b'id: 1\ndata: {"type":"stdio",\ndata: "id":1}\n\n')
    assert hiver("events", "--server", server, "demo").output == '{"type": "stdio", "id": 1}\n'
    assert Script.requests[-1][0].endswith("/events?follow=false")
    hiver("events", "--server", server, "--follow", "--after", "5", "demo")
    assert Script.requests[-1][0].endswith("/events?follow=true&lastEventId=5")


def test_rm(server: str) -> None:
    Script.answers[f"DELETE {BASE}"] = (204, b"")
    assert hiver("rm", "--server", server, "demo").output == "demo\n"
    assert hiver("rm", "--server", server, "other").exit_code == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, b'{"error": "starting"}'), "hiver: starting (HTTP 503)\n"),
        ((500, b"plain text"), "hiver: plain text (HTTP 500)\n"),
        ((500, b""), "hiver: Internal Server Error (HTTP 500)\n"),
    ],
)
def test_the_servers_errors_are_one_line(server: str, answer: tuple[int, bytes], message: str) -> None:
    Script.answers[LIST] = answer
    result = hiver("ls", "--server", server)
    assert (result.exit_code, result.stderr) == (1, message)


def test_answers_that_are_no_json(server: str) -> None:
    Script.answers[LIST] = (200, b"<html>")
    result = hiver("ls", "--server", server)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"hiver: the connection to {server} failed: ")


@pytest.mark.parametrize("answer", [b"", b"{}", b'["x"]', b'[{"id": "x"}]'])
def test_servers_of_another_kind(server: str, answer: bytes) -> None:
    Script.answers[LIST] = (200, answer)
    result = hiver("ls", "--server", server)
    assert (result.exit_code, result.stderr) == (3, f"hiver: what answers at {server} is no Hiver server\n")


def test_no_server() -> None:
    result = hiver("ls", "--server", "http://127.0.0.1:1")
    assert result.exit_code == 3
    assert result.stderr == "hiver: no server answers at http://127.0.0.1:1; start one with: hiver serve\n"


@pytest.mark.parametrize("url", ["x", "ftp://x", "http://", "http://x:99999"])
def test_wrong_urls(url: str) -> None:
    result = hiver("ls", "--server", url)
    assert (result.exit_code, result.stderr) == (2, f"hiver: {url} is not an http:// or https:// URL\n")


def test_wrong_usage() -> None:
    for arguments in (("exec", "demo"), ("rm",), ("serve", "--port", "70000"), ("exec", "--env", "A", "d", "--", "x")):
        assert hiver(*arguments).exit_code == 2


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Stands in for the server itself and notes the settings that it was started with."""
    seen: list[Settings] = []

    def run(settings: Settings) -> int:
        seen.append(settings)
        return 4

    app = types.ModuleType("hiverd.app")
    app.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hiverd.app", app)
    return seen


def test_serve_hands_over_settings_and_exit_code(served: list[Settings], tmp_path: Path) -> None:
    config = tmp_path / "hiver.toml"
    config.write_text('[server]\nport = 1\nhost = "10.0.0.1"\nephemeral = true\n')
    options = ("--port", "2", "--data-dir", str(tmp_path), "--container-backend", "oci", "--no-ephemeral")
    result = hiver("serve", "--config", str(config), *options, HIVER_LOG_LEVEL="debug")
    assert result.exit_code == 4
    server = served[0].server
    assert (server.host, server.port, server.data_dir, server.log_level) == ("10.0.0.1", 2, tmp_path, "debug")
    assert (server.container_backend, server.ephemeral) == ("oci", False)
    hiver("serve", "--ephemeral")
    assert served[1].server.ephemeral


def test_serve_with_wrong_settings(served: list[Settings]) -> None:
    result = hiver("serve", HIVER_PROT="1")
    assert (result.exit_code, result.stderr) == (2, 'hiver: HIVER_PROT: unknown setting, did you mean "HIVER_PORT"?\n')
    assert not served


def test_serve_that_cannot_start(served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: Settings) -> int:
        raise UnavailableError("runc is missing: apt-get install runc")

    monkeypatch.setattr(sys.modules["hiverd.app"], "run", run)
    result = hiver("serve")
    assert (result.exit_code, result.stderr) == (1, "hiver: runc is missing: apt-get install runc\n")


class Probed:
    """An isolation plug-in that only probes."""

    findings: ClassVar[dict[str, list[Finding]]] = {}
    opened: ClassVar[list[object]] = []

    def __init__(self, context: BackendContext) -> None:
        assert context.data_dir.stat().st_mode & 0o777 == 0o700
        assert context.run_dir.is_dir()
        self.name = str(context.options["name"])

    async def probe(self) -> list[Finding]:
        self.opened.append(self)
        return self.findings[self.name]

    async def close(self) -> None:
        self.opened.remove(self)


GOOD = Finding("runtime", ok=True, detail="runc 1.1.5")
BAD = Finding("conmon", ok=False, detail="not found", remedy="apt-get install conmon")
OPTIONAL = Finding("kvm", ok=False, detail="absent", required=False)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Finding]]:
    def find(name: str) -> Any:
        if name not in Probed.findings:
            raise UnsupportedError(f"{name} needs a library")
        return Probed

    Probed.findings = {"oci": [GOOD, OPTIONAL], "docker": [BAD]}
    monkeypatch.setattr(plugins, "names", lambda _group: ("docker", "microvm", "oci"))
    monkeypatch.setattr(plugins, "isolation_class", find)
    monkeypatch.setattr(gate, "probe", _nothing)
    for name in ("oci", "docker"):
        monkeypatch.setenv(f"HIVER_{name.upper()}_NAME", name)
    return Probed.findings


def test_doctor_on_a_good_host(probed: dict[str, list[Finding]]) -> None:
    result = hiver("doctor")
    assert result.exit_code == 0
    assert result.stdout == (
        "docker\n  MISSING   conmon  not found\n                    -> apt-get install conmon\n\n"
        "microvm\n  MISSING   microvm  microvm needs a library\n\n"
        "oci\n  ok        runtime  runc 1.1.5\n  optional  kvm      absent\n\n"
        "egress\n  ok        packet filter  refuses and records what the proxy does not take\n\n"
        "files\n  ok        governed mounts  by FUSE: mounts with rules, and remote ones\n"
        "  ok        file events      by fanotify: open local mounts at native speed\n\n"
        "Ready: hiver serve\n"
    )


def test_doctor_without_a_packet_filter(probed: dict[str, list[Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse() -> None:
        raise UnavailableError("the kernel does not take it")

    monkeypatch.setattr(gate, "probe", refuse)
    result = hiver("doctor")
    assert result.exit_code == 1
    assert "MISSING   packet filter  the kernel does not take it" in result.stdout
    assert "nftables" in result.stdout


async def _nothing() -> None:
    pass


def test_doctor_judges_the_chosen_backend(probed: dict[str, list[Finding]]) -> None:
    assert hiver("doctor", HIVER_CONTAINER_BACKEND="docker").exit_code == 1
    probed["oci"] = [BAD]
    result = hiver("doctor")
    assert result.exit_code == 1
    assert result.stdout.endswith("Not ready: see the remedies above.\n")


def test_doctor_leaves_nothing_behind(probed: dict[str, list[Finding]], tmp_path: Path) -> None:
    assert hiver("doctor", HIVER_DATA_DIR=str(tmp_path)).exit_code == 0
    assert not list(tmp_path.iterdir())
    assert Probed.opened == []


def test_doctor_without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "names", lambda _group: ())
    report = doctor.examine(Settings())
    assert not report.healthy
    assert "No isolation plug-in is installed." in report.text


def test_version() -> None:
    assert hiver("version").output.startswith("hiver ")


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from hiverd.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*[name for name in ('litestar', 'msgspec', 'asyncio', 'http.client', 'uvicorn') if name in sys.modules],"
        " file=sys.stderr)"
    )
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "hiver serve" in done.stdout
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(command: str) -> None:
    output = hiver(command, "--help").output
    assert output.startswith(f"Usage: hiver {command}")
    assert len(output.splitlines()) > 4


def test_interrupting_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_url: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "server_at", interrupted)
    for arguments in (("ls",), ("exec", "demo", "--", "x"), ("events", "demo")):
        assert hiver(*arguments).exit_code == 130
