"""The way out of each sandbox: opened before its first instruction, in step with its configuration, closed last."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable
from pathlib import Path
from typing import Final, Literal

from hiverd.contracts.isolation import HOST_GATEWAY_ADDRESS
from hiverd.egress import gate
from hiverd.egress.authority import Authority, ServerContexts
from hiverd.egress.dialer import Dialer
from hiverd.egress.gate import GateSockets
from hiverd.egress.guard import Guard
from hiverd.egress.names import HostError, canonical_host
from hiverd.egress.outlet import Outlet, Rules
from hiverd.egress.script_pool import ScriptPool
from hiverd.sandboxes import trust
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.wire.config import SandboxConfig, effective_egress, effective_extra_hosts

HOST_GATEWAY: Final = "127.0.0.1"
"""Where a name with the address `host-gateway` leads: this host, if a rule names it exactly."""
_PROTOCOLS: Final = ["h2", "http/1.1"]

log = logging.getLogger(__name__)


class EgressGates:
    """All gates of this server."""

    def __init__(self, folder: Path, dialer: Dialer, scripts: ScriptPool, default: Literal["allow", "deny"]) -> None:
        """`folder` is for the sandboxes' authorities."""
        self._folder = folder
        self._dialer = dialer
        self._scripts = scripts
        self._default: Literal["allow", "deny"] = default
        self._guards: dict[str, Guard] = {}

    async def open(self, sandbox: Sandbox, *, fresh: bool) -> None:
        """Sets the gate up; `fresh` also makes the programs inside trust it. Raises if there is no gate afterwards:
        then nothing leaves, and a fresh sandbox must not start."""
        namespace = sandbox.workload.network_namespace
        if namespace is None:
            return
        sockets, authority = await _both(
            gate.set_up(namespace, fresh=fresh), asyncio.to_thread(self._authority, sandbox, install=fresh)
        )
        try:
            contexts = ServerContexts(authority, _PROTOCOLS)
            outlet = Outlet(self._rules(sandbox.config), sandbox.events, self._dialer, contexts, self._scripts.share())
            self._guards[sandbox.id] = Guard(sandbox.key, outlet, sockets)
        except BaseException:
            sockets.close()
            raise

    def _authority(self, sandbox: Sandbox, *, install: bool) -> Authority:
        authority = Authority.load_or_make(self._folder / sandbox.id)
        if authority.made and not install:
            log.warning("sandbox %s: its authority was lost; programs inside do not trust the new one", sandbox.key)
        if install:
            environment = {} if sandbox.spec is None else sandbox.spec.env
            trust.install(sandbox.workload, authority.certificate_pem, environment)
        return authority

    def change(self, sandbox: Sandbox) -> None:
        """Puts the sandbox's configuration in force."""
        guard = self._guards.get(sandbox.id)
        if guard is not None:
            guard.outlet.change(self._rules(sandbox.config))

    async def release(self, sandbox_id: str) -> None:
        """Closes the gate, and removes what was kept for it. Idempotent."""
        guard = self._guards.pop(sandbox_id, None)
        if guard is not None:
            await guard.close()
        await asyncio.to_thread(shutil.rmtree, self._folder / sandbox_id, ignore_errors=True)

    async def close(self) -> None:
        """The server stops: gates close, sandboxes stay."""
        guards, self._guards = self._guards, {}
        await asyncio.gather(*(guard.close() for guard in guards.values()))

    def is_open(self, sandbox_id: str) -> bool:
        return sandbox_id in self._guards

    async def list_owned(self) -> frozenset[str]:
        """Ids of all sandboxes of which anything is kept, for the sweep."""
        return await asyncio.to_thread(self._list_owned)

    def _list_owned(self) -> frozenset[str]:
        return frozenset(path.name for path in self._folder.iterdir()) if self._folder.is_dir() else frozenset()

    def _rules(self, config: SandboxConfig) -> Rules:
        hosts: dict[str, str] = {}
        of_this_host: set[str] = set()
        for given, address in effective_extra_hosts(config):
            try:
                name = canonical_host(given)
            except HostError:
                log.warning("extra_hosts: %r is no host name", given)
                continue
            hosts[name] = HOST_GATEWAY if address == "host-gateway" else address.strip("[]")
            if address == "host-gateway":
                of_this_host.add(name)
        return Rules(
            rules=effective_egress(config, self._default),
            mitm=config.mitm is not False,
            deny_wait_seconds=float(config.egress_deny_wait or 0),
            hosts=hosts,
            # With several names it could not be told which one a rule has to allow.
            names={HOST_GATEWAY_ADDRESS: of_this_host.pop()} if len(of_this_host) == 1 else {},
        )


async def _both(setting_up: Awaitable[GateSockets], preparing: Awaitable[Authority]) -> tuple[GateSockets, Authority]:
    """Side by side; no socket is left open if either fails."""
    sockets, authority = await asyncio.gather(setting_up, preparing, return_exceptions=True)
    if isinstance(authority, BaseException):
        if isinstance(sockets, GateSockets):
            sockets.close()
        raise authority
    if isinstance(sockets, BaseException):
        raise sockets
    return sockets, authority
