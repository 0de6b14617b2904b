"""One connection that a sandbox has made, from its first bytes to its end (PROTOCOL 5.2 and 5.3)."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable
from typing import Final

from hiverd.egress.agent import AgentGoneError
from hiverd.egress.agent_http1 import Http1Agent
from hiverd.egress.agent_http2 import Http2AgentConnection
from hiverd.egress.dialer import DialError, ForbiddenAddressError
from hiverd.egress.exchange import Exchange, Way
from hiverd.egress.first_bytes import Kind, classify
from hiverd.egress.hello import ACCESS_DENIED, DECODE_ERROR, INTERNAL_ERROR, ClientHello, HelloError, alert, read_hello
from hiverd.egress.names import joined
from hiverd.egress.openings import FIRST_BYTES_SECONDS, first_kind, opening, upstream_speaks_first
from hiverd.egress.outlet import Outlet
from hiverd.egress.peek import Peeker
from hiverd.egress.recorder import Attempt
from hiverd.egress.relay import relay
from hiverd.egress.rules import Rule, Verdict
from hiverd.egress.stream import Stream
from hiverd.http.requests import RequestError

UNKNOWN: Final = "?"
"""The method on record for what is neither HTTP nor TLS."""


class Session:
    """Use once: `await Session(...).run()`."""

    def __init__(self, outlet: Outlet, sock: socket.socket, address: str, port: int) -> None:
        """`sock` is owned by this object; `address` and `port` are where the sandbox wanted to go."""
        self._outlet = outlet
        self._sock = sock
        self._address = address
        self._port = port
        self._host: str | None = None
        self._stream: Stream | None = None

    async def run(self) -> None:
        """Raises nothing but cancellation."""
        try:
            await self._serve()
        except (OSError, AgentGoneError, asyncio.IncompleteReadError):
            self._abort()
        except BaseException:
            self._abort()
            raise
        finally:
            if self._stream is not None:
                await self._stream.close()
            self._sock.close()

    def _abort(self) -> None:
        if self._stream is not None:
            self._stream.abort()

    async def _serve(self) -> None:
        peeker = Peeker(self._sock)
        kind = await opening(peeker)
        if kind == "silent":
            if await self._greeted(peeker):
                return
            kind = await first_kind(peeker)
        if kind == "tls":
            await self._serve_tls(peeker)
        elif kind == "http":
            self._stream = await Stream.over(self._sock)
            await self._serve_http(Way(secure=False, address=self._address, port=self._port, name=None))
        elif kind == "opaque":
            await self._serve_opaque(self._opaque_host())
        elif kind == "refused":
            self._attempt(joined(self._address, self._port), UNKNOWN).denied(0)

    # -- HTTP -------------------------------------------------------------------------------------------------------

    async def _serve_http(self, way: Way) -> None:
        stream = self._stream
        assert stream is not None  # noqa: S101 -- set by the caller
        excess = b""
        while True:
            agent = Http1Agent(stream, excess)
            try:
                if not await agent.read_head():
                    return
                exchange = Exchange(self._outlet, way, agent)
            except RequestError as error:
                self._attempt(way.name or joined(self._address, self._port), UNKNOWN).denied(error.status)
                await agent.refuse(error.status, str(error))
                await stream.linger()
                return
            if agent.head.host and way.name is None:
                self._outlet.names.used(agent.head.host.partition(":")[0].lower())
            await exchange.run()
            if not agent.reusable:
                if not agent.body_read:
                    await stream.linger()
                return
            excess = agent.excess

    # -- TLS --------------------------------------------------------------------------------------------------------

    async def _serve_tls(self, peeker: Peeker) -> None:
        try:
            hello = await self._read_hello(peeker)
        except HelloError as error:
            self._attempt(joined(self._address, self._port), UNKNOWN).denied(0)
            await self._alert(DECODE_ERROR, str(error))
            return
        host = hello.server_name or self._address
        self._outlet.names.used(host)

        def judge() -> Verdict:
            return self._outlet.policy.judge_handshake(host, self._port)

        attempt = self._attempt(host, "TLS")
        verdict = await self._outlet.verdict(judge, attempt, self._has_closed)
        if verdict.rule is None or not verdict.allowed:
            attempt.denied(0)
            await self._alert(ACCESS_DENIED, "no rule allows it")
        elif self._outlet.mitm:
            await self._intercept(host)
        elif hello.encrypted:
            # What its inner hello names would be reached by whoever holds the key, unseen.
            attempt.denied(0)
            await self._alert(ACCESS_DENIED, "an encrypted hello cannot be judged")
        else:
            await self._splice(host, verdict.rule, judge, attempt)

    async def _read_hello(self, peeker: Peeker) -> ClientHello:
        try:
            async with asyncio.timeout(FIRST_BYTES_SECONDS):
                while (hello := read_hello(peeker.data)) is None:
                    if not await peeker.more():
                        raise HelloError("the connection ended within the ClientHello")
        except TimeoutError as error:
            raise HelloError("the ClientHello did not come in time") from error
        return hello

    async def _intercept(self, host: str) -> None:
        try:
            self._stream = await Stream.over(self._sock, self._outlet.contexts.get(host))
        except OSError as error:
            # The agent does not trust us, or gave up: it would be a riddle without a trace.
            attempt = self._attempt(host, "TLS")
            attempt.response(0)
            raise ConnectionAbortedError from error
        way = Way(secure=True, address=self._address, port=self._port, name=host)
        if self._stream.protocol == "h2":
            await Http2AgentConnection(self._stream, self._outlet, way).serve()
            return
        kind = await self._inner_kind(self._stream)
        if kind == "http":
            await self._serve_http(way)
        elif kind == "opaque":
            await self._relay_opaque(host, self._stream)
        elif kind is not None:
            self._attempt(joined(host, self._port), UNKNOWN).denied(0)

    async def _inner_kind(self, stream: Stream) -> Kind | None:
        """What is spoken inside TLS; what was read to tell is given back."""
        data = b""
        try:
            async with asyncio.timeout(FIRST_BYTES_SECONDS):
                while (kind := classify(data)) is None:
                    more = await stream.read()
                    if not more:
                        return "opaque" if data else None
                    data += more
        except TimeoutError:
            kind = "refused" if data else "opaque"
        stream.unread = data
        return kind

    async def _splice(self, host: str, rule: Rule, judge: Callable[[], Verdict], attempt: Attempt) -> None:
        """Untouched bytes, once the upstream is reached (PROTOCOL 0.11)."""
        attempt.leads_to(rule)
        try:
            upstream = self._outlet.upstream(rule, host, self._port, secure=False)
            sock = await self._outlet.socket_to(upstream, rule)
        except ForbiddenAddressError as error:
            attempt.denied(0)
            await self._alert(ACCESS_DENIED, str(error))
            return
        except DialError as error:
            attempt.request("allowed")
            attempt.response(502)
            await self._alert(INTERNAL_ERROR, str(error))
            return
        attempt.request("allowed")
        attempt.response(200)
        await self._join(sock, lambda: judge().allowed)

    async def _alert(self, description: int, _reason: str) -> None:
        """Instead of a ServerHello. What was only peeked at is read, or the kernel would reset the connection first."""
        with contextlib.suppress(OSError):
            self._sock.recv(1 << 16)
            await asyncio.get_running_loop().sock_sendall(self._sock, alert(description))
            self._sock.shutdown(socket.SHUT_WR)

    # -- anything else ----------------------------------------------------------------------------------------------

    async def _serve_opaque(self, host: str) -> None:
        found = await self._dial_opaque(host, self._has_closed, secure=False)
        if found is not None:
            sock, attempt = found
            attempt.response(200)
            await self._join(sock, lambda: self._judge_opaque(host).allowed)

    async def _greeted(self, peeker: Peeker) -> bool:
        """Lets an upstream that speaks first do so, if a rule allows bytes that are no requests. False if the agent
        has begun meanwhile, or is to begin: what it says then decides."""
        host = self._opaque_host()
        rule = self._judge_opaque(host).rule
        if rule is None or not rule.allows:
            return False
        try:
            sock = await self._outlet.socket_to(self._outlet.upstream(rule, host, self._port, secure=False), rule)
        except DialError:
            await self._serve_opaque(host)  # which finds the same, and records it
            return True
        except ForbiddenAddressError:
            return False  # the agent may still name a host that it can reach
        attempt = self._attempt(joined(host, self._port), UNKNOWN)
        attempt.leads_to(rule)
        try:
            speaks = await upstream_speaks_first(peeker, sock)
            if speaks is None:
                attempt.response(0)
                return True
            if not speaks or not self._judge_opaque(host).allowed:
                return False
            attempt.response(200)
            self._stream = await Stream.over(self._sock)
            await self._relay(host, self._stream, await Stream.to(sock))
        finally:
            sock.close()
        return True

    def _opaque_host(self) -> str:
        """The address, or the one name that it stands for."""
        if self._host is None:
            self._host = self._outlet.name_of(self._address) or self._address
        return self._host

    async def _relay_opaque(self, host: str, stream: Stream) -> None:
        """What is no HTTP within TLS goes to the upstream within TLS."""
        found = await self._dial_opaque(host, lambda: stream.gone, secure=True)
        if found is None:
            return
        sock, attempt = found
        try:
            other = await self._outlet.dialer.stream_to(sock, host)
        except DialError:
            attempt.response(502)
            return
        attempt.response(200)
        await self._relay(host, stream, other)

    async def _relay(self, host: str, stream: Stream, other: Stream) -> None:
        """For an agent that may not have spoken yet."""

        def admit(begun: bytes) -> bool | None:
            kind = classify(begun)
            if kind not in (None, "opaque"):
                self._attempt(joined(host, self._port), UNKNOWN).denied(0)
            return None if kind is None else kind == "opaque"

        try:
            with self._outlet.tunnel(lambda: self._judge_opaque(host).allowed, other.abort):
                await relay(stream, other, admit)
            await asyncio.gather(stream.close(), other.close())
        finally:
            other.abort()
            stream.abort()

    def _judge_opaque(self, host: str) -> Verdict:
        return self._outlet.policy.judge_opaque(host, self._port)

    async def _dial_opaque(
        self, host: str, gone: Callable[[], bool], *, secure: bool
    ) -> tuple[socket.socket, Attempt] | None:
        """A connection under a rule that allows all of this host and port (PROTOCOL 5.2); None, recorded, if there is
        none."""
        attempt = self._attempt(joined(host, self._port), UNKNOWN)
        verdict = await self._outlet.verdict(lambda: self._judge_opaque(host), attempt, gone)
        if verdict.rule is None or not verdict.allowed:
            attempt.denied(0)
            return None
        attempt.leads_to(verdict.rule)
        try:
            upstream = self._outlet.upstream(verdict.rule, host, self._port, secure=secure)
            sock = await self._outlet.socket_to(upstream, verdict.rule)
        except ForbiddenAddressError:
            attempt.denied(0)
            return None
        except DialError:
            sock = None
        attempt.request("allowed")
        if sock is None:
            attempt.response(502)
            return None
        return sock, attempt

    async def _join(self, other: socket.socket, still_allowed: Callable[[], bool]) -> None:
        """Bytes as they are, both ways, until both directions end or the rules do not allow it any more."""

        def cut() -> None:
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)

        try:
            with self._outlet.tunnel(still_allowed, cut):
                await self._outlet.splicer.join(self._sock, other)
        finally:
            other.close()

    def _has_closed(self) -> bool:
        """Also where bytes that nobody has taken yet stand before the end."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _attempt(self, host: str, method: str) -> Attempt:
        return Attempt(self._outlet.events, host=host, method=method, path="/")
