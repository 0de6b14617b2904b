"""Gates as the core opens them; what a gate does is in tests/system/egress."""

from __future__ import annotations

import socket

import pytest

from hiverd.egress import gate
from hiverd.egress.gate import GateSockets
from hiverd.sandboxes import egress
from hiverd.testing.fakes import FakeWorkload
from hiverd.wire.config import SandboxConfig


async def test_a_lost_authority_is_told_once(open_core, caplog):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", SandboxConfig)
        first = core.egress._authority(sandbox, install=False)
        assert "authority was lost" in caplog.text
        caplog.clear()
        assert core.egress._authority(sandbox, install=False).certificate_pem == first.certificate_pem
        assert caplog.text == ""


async def test_a_gate_that_opens_half_way_leaves_no_socket(open_core, monkeypatch):
    sockets = GateSockets(*(socket.socket() for _ in range(4)))

    async def set_up(namespace: str, *, fresh: bool) -> GateSockets:
        return sockets

    def fail(*_: object) -> None:
        raise OSError("no memory")

    async with open_core() as core:
        sandbox, _ = await core.obtain("k", SandboxConfig)
        monkeypatch.setattr(gate, "set_up", set_up)
        monkeypatch.setattr(egress, "ServerContexts", fail)
        monkeypatch.setattr(FakeWorkload, "network_namespace", "/nowhere")
        with pytest.raises(OSError, match="no memory"):
            await core.egress.open(sandbox, fresh=False)
    assert not core.egress.is_open(sandbox.id)
    assert {sock.fileno() for sock in (sockets.tcp, sockets.dns, sockets.dns_tcp, sockets.packet_log)} == {-1}
