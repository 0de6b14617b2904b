"""Engines on which a sandbox could not be guarded: refused with the true reason, by `hiver doctor` as well."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Final

import pytest

from hiver_backends.docker.guarantees import ACCEPTABLE, MEANINGS
from support.docker import Engine
from support.docker_rootless import USER_ID, RootlessDocker, RootlessEngine, RootlessPodman
from support.engines import running_or_skipped
from support.leaks import marks_of, wait_until_clean
from support.server import DEFAULT_CONFIG, HIVER, Backend, Server, ServerFailed, clean_environment, free_port

pytestmark = pytest.mark.system

CONSENT: Final = f"accept = {json.dumps(ACCEPTABLE)}\n"
OUTSIDE: Final = ("egress", "governed-mounts", "mount-changes", "file-events")


def _refusal(folder: Path, host: str, finding: str) -> str:
    """What the server says of a finding, all consent given; the doctor must say the same."""
    server = Server(folder, config=f"{DEFAULT_CONFIG}[docker]\n{CONSENT}", backend=Backend("docker", host))
    with pytest.raises(ServerFailed) as caught:
        server.start()
    found = re.search(rf"{finding}: (.*?) -> ([^;\n]*)", str(caught.value))
    assert found, caught.value
    argv = [HIVER, "doctor", "--config", str(server.config_path)]
    environment = clean_environment({"DOCKER_HOST": host})
    doctor = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60, env=environment).stdout
    assert re.search(rf"MISSING +{re.escape(finding)} +{re.escape(found[1])}\n +-> {re.escape(found[2])}", doctor), (
        doctor
    )
    wait_until_clean(marks_of(server.data_dir))
    return found[1]


@pytest.mark.parametrize("kind", [RootlessDocker, RootlessPodman])
def test_an_engine_without_root(tmp_path: Path, kind: type[RootlessEngine]) -> None:
    with running_or_skipped(kind(str(os.getpid()))) as engine:
        refusal = _refusal(tmp_path, engine.host, "rootless engine")
        assert f"the engine runs as user {USER_ID}" in refusal
        for name in OUTSIDE:
            assert f"{name}: {MEANINGS[name]}" in refusal  # type: ignore[index]
        assert engine.containers() == []


def test_an_engine_over_tcp_though_it_is_here(tmp_path: Path) -> None:
    port = free_port()
    with running_or_skipped(Engine(f"tcp-{os.getpid()}", tcp_port=port)) as engine:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            assert b"OK" in connection.recv(4096)
        assert "reached over TCP" in _refusal(tmp_path, f"tcp://127.0.0.1:{port}", "engine's host")
        assert engine.containers() == []


@pytest.mark.parametrize(
    ("form", "way"),
    [
        ("tcp://127.0.0.1:{}", "over TCP"),
        ("127.0.0.1:{}", "over TCP"),
        ("ssh://nobody@127.0.0.1:{}/run/docker.sock", "over SSH"),
    ],
)
def test_an_address_is_judged_without_going_there(tmp_path: Path, form: str, way: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = form.format(listener.getsockname()[1])
        refusal = _refusal(tmp_path, host, "engine's host")
        assert f"reached {way}" in refusal
        for name in OUTSIDE:
            assert f"{name}: {MEANINGS[name]}" in refusal  # type: ignore[index]
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
