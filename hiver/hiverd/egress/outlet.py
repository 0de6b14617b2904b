"""One sandbox's way out: the rules in force, and what its connections share."""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from msgspec import Struct

from hiverd.contracts.isolation import RESOLVER_ADDRESS
from hiverd.egress.authority import ServerContexts
from hiverd.egress.budget import Budget
from hiverd.egress.dialer import Dialer, DialError
from hiverd.egress.names import Address, HostError, joined
from hiverd.egress.overrides import dial_target
from hiverd.egress.own_api import GATEWAY_NAMES
from hiverd.egress.recorder import Attempt
from hiverd.egress.rules import Policy, Rule, Verdict
from hiverd.egress.script_pool import ScriptShare
from hiverd.egress.splice import Splicer
from hiverd.egress.stream import Stream
from hiverd.egress.uplinks import Uplinks, Upstream
from hiverd.egress.upstream import UpstreamSide
from hiverd.egress.upstream_http1 import Http1Upstream
from hiverd.egress.upstream_http2 import Http2Uplinks
from hiverd.http.connection import Connection
from hiverd.wire.events import EventSink
from hiverd.wire.model import EgressRule

_WAIT_STEP_SECONDS: Final = 0.25
RECORDED_BODIES_BYTES: Final = 32 << 20
"""Of requests on their way to the record, all connections together; what finds no room is recorded without its rest."""
HELD_BODIES_BYTES: Final = 64 << 20
"""Of requests whose bodies are changed, all connections together; what finds no room is refused."""
_MAX_RECENT_NAMES: Final = 64
_RECENT_SECONDS: Final = 10.0


class Rules(Struct, frozen=True, kw_only=True):
    """What a sandbox's configuration says about egress."""

    rules: tuple[EgressRule, ...]
    mitm: bool = True
    deny_wait_seconds: float = 0.0
    hosts: Mapping[str, str] = {}
    """Names with addresses of their own (`extra_hosts`), canonical."""
    names: Mapping[str, str] = {}
    """What an address inside stands for: the name to be judged where bytes name none."""


class Outlet:
    """Used from one event loop only."""

    def __init__(
        self, rules: Rules, events: EventSink, dialer: Dialer, contexts: ServerContexts, scripts: ScriptShare
    ) -> None:
        self.events = events
        self.scripts = scripts
        self.contexts = contexts
        self.uplinks = Uplinks()
        self.http2_uplinks = Http2Uplinks()
        self.http2_streams = 0
        """That agents have open, on all their connections."""
        self.splicer = Splicer()
        self.dialer = dialer
        self.names = RecentNames()
        self.recording = Budget(RECORDED_BODIES_BYTES)
        self.held_bodies = Budget(HELD_BODIES_BYTES)
        self._tunnels: dict[object, tuple[Callable[[], bool], Callable[[], None]]] = {}
        self._changed = asyncio.Event()
        self._rules = rules
        self.policy = Policy(rules.rules)

    @property
    def mitm(self) -> bool:
        return self._rules.mitm

    def name_of(self, address: str) -> str | None:
        """What the sandbox must have meant by connecting there; every name that it asked for has the same address."""
        return self.names.take_single() if address == RESOLVER_ADDRESS else self._rules.names.get(address)

    def change(self, rules: Rules) -> None:
        """Puts other rules in force: for every request from now on, and at once for tunnels that are open."""
        self.policy = Policy(rules.rules)
        self._rules = rules
        self.uplinks.forget_idle()
        self.http2_uplinks.forget()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for still_allowed, cut in list(self._tunnels.values()):
            if not still_allowed():
                cut()

    @contextmanager
    def tunnel(self, still_allowed: Callable[[], bool], cut: Callable[[], None]) -> Iterator[None]:
        """Marks bytes that flow unread: `cut` is called when a change of the rules does not allow them any more."""
        mark = object()
        self._tunnels[mark] = (still_allowed, cut)
        try:
            yield
        finally:
            del self._tunnels[mark]

    async def verdict(self, judge: Callable[[], Verdict], attempt: Attempt, gone: Callable[[], bool]) -> Verdict:
        """The verdict; what would be denied is recorded as such and waits for other rules, if so configured
        (PROTOCOL 5.6). A wait keeps the deadline it began with."""
        verdict = judge()
        if verdict.allowed:
            return verdict
        attempt.request("denied")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._rules.deny_wait_seconds
        while not verdict.allowed and (left := deadline - loop.time()) > 0 and not gone():
            await self._change(min(left, _WAIT_STEP_SECONDS))
            verdict = judge()
        return verdict

    async def _change(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass

    def upstream(self, rule: Rule, host: str, port: int, *, secure: bool) -> Upstream:
        """Where a request that this rule allows goes. Raises `DialError` for an override that names no host."""
        override, denials = rule.source.override, self.policy.address_denials(rule)
        own_api = self.dialer.own_api
        if host in GATEWAY_NAMES and host not in self._rules.hosts and not (override is not None and override.host):
            return Upstream(False, host, own_api.host, own_api.port, rule.names_host, denials, own_api.authority)
        try:
            target, port = dial_target(override, host, port)
        except HostError as error:
            raise DialError("the rule's override names no host") from error
        exact = rule.names_host or (override is not None and bool(override.host))
        return Upstream(secure, host, target, port, exact, denials)

    async def connect(self, upstream: Upstream, rule: Rule) -> Connection:
        """A fresh HTTP connection. Raises `DialError`, `ForbiddenAddressError`."""
        generation = self.uplinks.generation
        sock = await self.socket_to(upstream, rule)
        loop = asyncio.get_running_loop()
        connection = Connection(loop, sock, joined(upstream.host, upstream.port).encode())
        try:
            if upstream.secure:
                await self.dialer.secure(sock, upstream.host, connection)
            else:
                await loop.create_connection(lambda: connection, sock=sock)
        except BaseException:
            connection.abort()
            sock.close()
            raise
        self.uplinks.add(connection, generation)
        return connection

    def kept(self, upstream: Upstream, *, sure: bool) -> UpstreamSide | None:
        """An HTTP/1.1 exchange on a connection that is idle, if there is one; `sure` as for `Uplinks.take`."""
        connection = self.uplinks.take(upstream, sure=sure)
        return None if connection is None else Http1Upstream(self.uplinks, upstream, connection)

    async def reach(self, upstream: Upstream, rule: Rule, *, http2: bool) -> UpstreamSide:
        """An exchange on a fresh connection, or with HTTP/2 on one that has room.

        Raises `DialError`, `ForbiddenAddressError`.
        """
        if not http2:
            return Http1Upstream(self.uplinks, upstream, await self.connect(upstream, rule))

        async def dial() -> Stream:
            return await self.dialer.http2_to(await self.socket_to(upstream, rule), upstream.host)

        return await self.http2_uplinks.reserve(upstream, dial)

    def socket_to(self, upstream: Upstream, rule: Rule) -> Awaitable[socket.socket]:
        """A connected TCP socket. Raises `DialError`, `ForbiddenAddressError`."""

        def judge(address: Address) -> bool:
            return not self.policy.denies_address(address, upstream.port, before=rule)

        return self.dialer.socket_to(
            upstream.target, upstream.port, exact=upstream.exact, judge=judge, hosts=self._rules.hosts
        )

    def close(self) -> None:
        self.uplinks.close()
        self.http2_uplinks.close()
        for _, cut in list(self._tunnels.values()):
            cut()
        self.splicer.close()


class RecentNames:
    """What the sandbox has just resolved: the only hint at the host where bytes are neither HTTP nor TLS."""

    def __init__(self) -> None:
        self._asked: OrderedDict[str, float] = OrderedDict()

    def note(self, name: str) -> None:
        self._asked[name] = asyncio.get_running_loop().time()
        self._asked.move_to_end(name)
        if len(self._asked) > _MAX_RECENT_NAMES:
            self._asked.popitem(last=False)

    def used(self, name: str) -> None:
        """A connection has told its host itself."""
        self._asked.pop(name, None)

    def take_single(self) -> str | None:
        """The one name that was resolved in the last moments and not used; None if there are several, or none."""
        now = asyncio.get_running_loop().time()
        recent = [name for name, asked in self._asked.items() if now - asked < _RECENT_SECONDS]
        self._asked = OrderedDict((name, self._asked[name]) for name in recent)
        if len(recent) != 1:
            return None
        self.used(recent[0])
        return recent[0]
