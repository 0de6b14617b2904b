"""The command line from outside: starting, stopping, taking over, and the commands for the shell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from contract.raw import Ref, create
from support.leaks import marks_of, traces, wait_until_clean
from support.plain import NOBODY
from support.server import DEFAULT_CONFIG, HIVER, Server, ServerFailed, clean_environment
from support.waiting import until

pytestmark = [pytest.mark.contract, pytest.mark.system]

NewKey = Callable[[], str]
MakeServer = Callable[..., Server]


def hiver(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment({"HIVER_GATEWAY_URL": server.url})
    return subprocess.run([HIVER, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False)


def new_sandbox(server: Server, key: str) -> Ref:
    answer = httpx.post(f"{server.url}/v1/sandboxes/{key}", json={"ttl": 0}, timeout=60, verify=NOBODY)
    assert answer.status_code == 201, answer.text
    return Ref(answer.json()["id"], key)


def run_in(server: Server, ref: Ref, command: str) -> str:
    answer = httpx.post(server.url + ref.api("/exec"), json={"command": command}, timeout=60, verify=NOBODY)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


def event_ids(server: Server, ref: Ref) -> list[int]:
    text = httpx.get(server.url + ref.api("/events?follow=false"), timeout=60, verify=NOBODY).text
    return [int(line.removeprefix("id: ")) for line in text.splitlines() if line.startswith("id: ")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_ephemeral_server_takes_everything_with_it(make_server: MakeServer, number: signal.Signals) -> None:
    server = make_server()
    server.start()
    ref = new_sandbox(server, "short")
    assert run_in(server, ref, "echo here") == "here\n"
    os.kill(server.pid, number)
    assert server.stop() in {0, 128 + number}
    wait_until_clean(marks_of(server.data_dir, [ref.id]))


@pytest.mark.parametrize("crash", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_sandboxes_outlive_the_server(make_server: MakeServer, crash: bool) -> None:
    server = make_server(ephemeral=False)
    server.start()
    ref = new_sandbox(server, "survivor")
    run_in(server, ref, "echo kept > /workspace/f; setsid sleep 271828 >/dev/null 2>&1 </dev/null &")
    before = event_ids(server, ref)
    if crash:
        server.kill()
    else:
        assert server.stop() == 0
    assert [line for line in traces([ref.id, "sleep 271828"]) if "sleep 271828" in line], "its processes go on"
    server.start()
    assert (
        run_in(server, ref, "cat /workspace/f; grep -lz 271828 /proc/[0-9]*/cmdline | wc -l").splitlines()[0] == "kept"
    )
    after = event_ids(server, ref)
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert httpx.delete(server.url + ref.api(), timeout=60, verify=NOBODY).is_success
    server.stop()
    wait_until_clean(marks_of(server.data_dir, [ref.id]))


def test_how_often_a_long_answer_gets_a_byte_is_the_operators(make_server: MakeServer) -> None:
    server = make_server(config=DEFAULT_CONFIG + "[exec]\nkeepalive_seconds = 0.05\n")
    server.start()
    ref = new_sandbox(server, "patient")
    answer = httpx.post(server.url + ref.api("/exec"), json={"command": "sleep 2.5"}, timeout=60, verify=NOBODY)
    assert len(answer.content) - len(answer.content.lstrip(b" ")) > 8  # by default 2


@pytest.mark.oci_alone("no sandbox is made")
def test_two_servers_never_share_a_data_folder(make_server: MakeServer) -> None:
    first = make_server()
    first.start()
    second = make_server()
    second.data_dir = first.data_dir
    with pytest.raises(ServerFailed, match=r"another hiver server"):
        second.start()
    assert first.answers()


@pytest.mark.oci_alone("no sandbox is made")
def test_a_port_in_use_is_said_clearly(make_server: MakeServer) -> None:
    first = make_server()
    first.start()
    second = make_server()
    second.port = first.port
    second.start()  # the first one answers on this port
    until(lambda: not second.running, seconds=20, what="the second server gives up")
    assert second.stop() == 1
    assert str(first.port) in second.log_tail()
    assert "Traceback" not in second.log_tail()


@pytest.mark.oci_alone("no sandbox is made")
@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        ("[server]\nprot = 1\n", {}, "port"),
        ("[sevrer]\nport = 1\n", {}, "server"),
        ("", {"HIVER_PROT": "1"}, "HIVER_PORT"),
        ("not toml", {}, "TOML"),
    ],
)
def test_wrong_settings_name_the_nearest(
    make_server: MakeServer, config: str, environment: dict[str, str], expected: str
) -> None:
    server = make_server(config=config, environment=environment)
    with pytest.raises(ServerFailed) as failed:
        server.start()
    assert expected in str(failed.value)
    assert "Traceback" not in str(failed.value)
    assert server.stop() == 2


async def test_the_commands_for_the_shell(server: Server, http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    assert ref.key in hiver(server, "ls").stdout
    assert {"id": ref.id, "key": ref.key, "status": "running"} in json.loads(hiver(server, "ls", "--json").stdout)
    done = hiver(server, "exec", ref.key, "--", "sh", "-c", "echo out; echo err >&2; exit 5")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 5)
    kinds = [json.loads(line)["type"] for line in hiver(server, "events", ref.key).stdout.splitlines()]
    assert kinds[0] == "system.start"
    assert "exec.response" in kinds
    assert hiver(server, "rm", ref.key).returncode == 0
    gone = hiver(server, "exec", ref.key, "--", "true")
    assert gone.returncode == 125
    assert ref.key in gone.stderr


def test_doctor_finds_this_host_ready(tmp_path: Path) -> None:
    done = subprocess.run([HIVER, "doctor"], env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Ready" in done.stdout


def test_no_server_is_said_clearly(tmp_path: Path) -> None:
    environment = clean_environment({"HIVER_GATEWAY_URL": "http://127.0.0.1:9"})
    done = subprocess.run([HIVER, "ls"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
