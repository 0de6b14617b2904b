"""One HTTP request of the agent on its way out, and the answer on its way back."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from msgspec import Struct

from hiverd.egress import overrides, script
from hiverd.egress.agent import AgentGoneError, AgentSide
from hiverd.egress.dialer import DialError, ForbiddenAddressError
from hiverd.egress.names import HostError, split_authority
from hiverd.egress.outlet import Outlet
from hiverd.egress.recorder import Attempt
from hiverd.egress.rules import DENIED, Rule, Verdict
from hiverd.egress.script import ScriptError
from hiverd.egress.uplinks import Upstream
from hiverd.egress.upload import Upload
from hiverd.egress.upstream import UpstreamSide
from hiverd.egress.upstream_http1 import Http1Upstream
from hiverd.egress.websocket import relay_websocket
from hiverd.http.connection import UpstreamError
from hiverd.http.framing import Headers
from hiverd.http.headers import end_to_end, field_block, relayed_trailers, takes_trailers
from hiverd.http.http2 import is_grpc
from hiverd.http.requests import RequestError, RequestHead

RECORD_SECONDS: Final = 2.0
"""How long a request is not yet on record for the sake of a body that is still coming."""
_IDEMPOTENT: Final = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"))
_REPLACED: Final = frozenset((b"host", b"content-length", b"expect"))

log = logging.getLogger(__name__)


class Way(Struct, frozen=True, kw_only=True):
    """Where a connection was made to, as far as its first bytes tell."""

    secure: bool
    address: str
    """The address that the agent dialled."""
    port: int
    name: str | None
    """SNI or address, for TLS; None for plain HTTP, where each request names its host."""


class Exchange:
    """Use once: `await Exchange(...).run()`."""

    def __init__(self, outlet: Outlet, way: Way, agent: AgentSide) -> None:
        self._outlet = outlet
        self._way = way
        self._agent = agent
        self._head: RequestHead = agent.head
        self._loop = asyncio.get_running_loop()
        self._edit: script.Edit | None = None
        self._hosts = self._hosts_of(agent.head)
        self._own_authority: str | None = None
        self._grpc = agent.full_duplex and is_grpc(agent.head.headers)
        self._side: UpstreamSide | None = None
        self._upload: Upload | None = None
        self._held_bytes = 0
        self._attempt = Attempt(
            outlet.events,
            host=self._hosts[0],
            method=self._head.method,
            path=self._head.path,
            query=self._head.query,
            headers=self._head.headers,
            budget=outlet.recording,
        )

    async def run(self) -> None:
        """Leaves a request and a response event, and the agent with an answer unless it has left.

        Raises nothing but cancellation and `OSError` of the agent's side.
        """
        try:
            await self._attempt.room()
            await self._run()
        except AgentGoneError:
            self._attempt.response(0)
        except RequestError as error:
            self._attempt.response(error.status)
            await self._agent.refuse(error.status, str(error))
        except ScriptError as error:
            self._attempt.denied(502)
            self._attempt.message(str(error), None)
            await self._agent.refuse(502, "egress failed: the request could not be prepared")
        except ForbiddenAddressError as error:
            self._attempt.denied(403)
            await self._refuse_by_policy(str(error))
        except (DialError, UpstreamError) as error:
            self._attempt.response(0 if self._agent.gone else 502)
            await self._agent.refuse(502, str(error))
        except OSError:
            self._attempt.response(0)
            raise
        except Exception:
            # Whatever went wrong while it was judged or changed, it has not passed (STYLE: policy fails closed).
            log.exception("egress: a request to %s failed unexpectedly", self._hosts[0])
            self._attempt.failed(502)
            await self._agent.refuse(502, "it could not be handled")
        finally:
            self._outlet.held_bodies.give(self._held_bytes)
            self._attempt.end()

    def _hosts_of(self, head: RequestHead) -> tuple[str, ...]:
        """Every host that the request names; the first is where it goes. Raises `RequestError`."""
        try:
            named = split_authority(head.host)[0] if head.host else None
        except HostError as error:
            raise RequestError(400, f"the host is not acceptable: {error}") from error
        if self._way.name is None:
            return (named or self._way.address,)
        return (self._way.name,) if named in (None, self._way.name) else (self._way.name, named or "")

    def _judge(self) -> Verdict:
        """Each host that the request names must be allowed: an upstream may go by either (PROTOCOL 5.2)."""
        policy, head, port = self._outlet.policy, self._head, self._way.port
        path = "/" if head.path == "*" else head.path
        first, *others = [policy.judge_request(host, port, head.method, path) for host in self._hosts]
        return first if all(other.allowed for other in others) else DENIED

    async def _run(self) -> None:
        verdict = await self._outlet.verdict(self._judge, self._attempt, lambda: self._agent.gone)
        if verdict.rule is None or not verdict.allowed:
            self._attempt.denied(403)
            await self._refuse_by_policy("no rule allows it")
            return
        rule = verdict.rule
        upstream = self._outlet.upstream(rule, self._hosts[0], self._way.port, secure=self._way.secure)
        self._own_authority = upstream.own_authority
        override = rule.source.override
        if override is not None:
            self._attempt.changed_by(overrides.shown_headers(override, self._head.headers), override.host, rule.secrets)
        if self._head.upgrade == b"websocket" and self._head.method == "GET" and not self._head.has_body:
            await self._switch_protocols(upstream, rule)
        else:
            await self._forward(upstream, rule)

    async def _refuse_by_policy(self, reason: str) -> None:
        """403; inside TLS without a body (PROTOCOL 5.3)."""
        host = self._hosts[0]
        text = f"egress denied: {host}: {reason}; see egress in the sandbox's configuration"
        await self._agent.refuse(403, "" if self._way.secure else text)

    # -- the usual case ---------------------------------------------------------------------------------------------

    async def _forward(self, upstream: Upstream, rule: Rule) -> None:
        body = await self._changed_body(rule)
        if not self._grpc:
            await self._pass_on(upstream, rule, body)
            return
        # A gRPC exchange can go on for as long as a tunnel, so a change of the rules ends it like one.
        with self._outlet.tunnel(lambda: self._judge().allowed, self._cut):
            await self._pass_on(upstream, rule, body)

    def _cut(self) -> None:
        if self._side is not None:
            self._side.abort("the rules do not allow it any more")

    async def _pass_on(self, upstream: Upstream, rule: Rule, body: bytes | None) -> None:
        try:
            side = await self._send_and_await(upstream, rule, body)
            try:
                await self._relay(side)
            except BaseException:
                side.discard()
                raise
        except UpstreamError as error:
            raise (self._upload and self._upload.fault) or error from error
        finally:
            if self._upload is not None:
                await self._upload.end()

    async def _changed_body(self, rule: Rule) -> bytes | None:
        """What is sent instead of the agent's body; None: that body as it comes, or none."""
        override, code = rule.source.override, rule.source.override_script
        replaced = override is not None and overrides.replaces_body(override)
        if not (replaced or code):
            return None
        await self._agent.ask_for_body()
        sent = await self._agent.whole_body(overrides.MAX_MERGED_BODY_BYTES, self._outlet.held_bodies)
        self._held_bytes = len(sent)
        self._attempt.whole_body(sent)
        body = sent
        if override is not None and replaced:
            body = overrides.body(override, overrides.decoded(sent, self._head.headers))
        if code:
            body = await self._run_script(code, rule, body)
        return body if body or replaced or self._head.has_body else None

    async def _run_script(self, code: str, rule: Rule, body: bytes) -> bytes:
        """The body that the script leaves; its changes of header fields are kept. Raises `ScriptError`."""
        head = self._head
        call = script.call_of(
            code,
            method=head.method,
            host=self._hosts[0],
            target=self._target(rule),
            fields=self._overridden(rule),
            body=body,
        )
        edit = script.judge(call, await self._outlet.scripts.run(call))
        self._edit = edit
        self._attempt.hide(overrides.secrets_in(value.decode("utf-8", "replace") for _, value in edit.added))
        return edit.body

    async def _send_and_await(self, upstream: Upstream, rule: Rule, body: bytes | None) -> UpstreamSide:
        """Sends the request until a final head has come; once more if a kept connection had just been closed."""
        streams_body = body is None and self._head.has_body
        repeatable = self._head.method in _IDEMPOTENT and not streams_body
        side = None if self._grpc else self._outlet.kept(upstream, sure=not repeatable)
        while True:
            if side is None:
                side = await self._outlet.reach(upstream, rule, http2=self._grpc)
            self._side = side
            try:
                await self._send(side, rule, body)
                return side
            except UpstreamError as error:
                side.discard()
                if not (repeatable and side.reused and error.unanswered) or self._agent.gone:
                    raise
                side = None
            except BaseException:
                side.discard()
                raise

    async def _send(self, side: UpstreamSide, rule: Rule, body: bytes | None) -> None:
        streams_body = body is None and self._head.has_body
        fields = self._fields(rule, body)
        if streams_body and self._head.expects_continue:
            fields.append((b"expect", b"100-continue"))
        await side.begin(self._head.method, self._target(rule), self._with_host(fields), body, streamed=streams_body)
        timer: asyncio.TimerHandle | None = None
        if streams_body and self._attempt.collects_body:
            timer = self._loop.call_later(RECORD_SECONDS, self._attempt.request, "allowed")
        else:
            self._attempt.request("allowed")
        if streams_body:
            self._upload = Upload(self._agent, side, self._attempt, overrides.header_names(rule.source.override))
        self._agent.watch(side.abort_for_client)
        try:
            await side.response()
        finally:
            self._agent.watch(None)
            if timer is not None:
                timer.cancel()

    def _overridden(self, rule: Rule) -> Headers:
        """The agent's fields as the rule's override leaves them, without framing."""
        override = rule.source.override
        fields = [field for field in end_to_end(self._head.headers, trailers=True) if field[0] not in _REPLACED]
        fields = overrides.headers(override, fields)
        return overrides.without_body_fields(fields) if overrides.replaces_body(override) else fields

    def _fields(self, rule: Rule, body: bytes | None) -> Headers:
        fields = self._overridden(rule)
        if self._edit is not None:
            fields = self._edit.headers(fields)
        if takes_trailers(self._head.headers):
            fields += [(b"te", b"trailers"), (b"connection", b"te")]
        if body is not None:
            if self._own_authority is not None:
                # It names the image where the body does not, and a pinned body is to be all there is (PROTOCOL 4.5).
                fields = [field for field in fields if field[0] != b"x-hiver-image"]
            return [*fields, (b"content-length", b"%d" % len(body))]
        if self._head.framing.chunked:
            fields.append((b"transfer-encoding", b"chunked"))
        elif self._head.framing.content_length is not None:
            fields.append((b"content-length", b"%d" % self._head.framing.content_length))
        return fields

    def _target(self, rule: Rule) -> str:
        head = self._head
        return "*" if head.path == "*" else overrides.target(rule.source.override, head.path, head.query)

    def _with_host(self, fields: Headers) -> Headers:
        """The Host stays the agent's (PROTOCOL 5.5), unless the rule sets it or it is our own API that is asked."""
        if any(name == b"host" for name, _ in fields):
            return fields
        host = self._own_authority or self._head.host or self._hosts[0]
        return [(b"host", host.encode("latin-1")), *fields]

    async def _relay(self, side: UpstreamSide) -> None:
        head = await side.response()
        self._attempt.response(head.status, head.headers)
        agent = self._agent
        fields = [field for field in end_to_end(head.headers, trailers=True) if field[0] != b"content-length"]
        more = not (self._head.method == "HEAD" or head.status in (204, 304))
        length = None if head.status == 204 else head.content_length  # RFC 9110 8.6
        await agent.start(head.status, fields, length=length, has_body=more)
        agent.watch(side.abort_for_client)
        try:
            while more:
                if not side.ready:
                    await agent.write(b"")  # what has come so far is not held back
                data, more = await side.read()
                if data:
                    if self._attempt.reads_response:
                        await self._attempt.room()
                        self._attempt.response_body(data)
                    await agent.write(data)
        finally:
            agent.watch(None)
        await agent.finish(relayed_trailers(side.trailers))
        if agent.body_read and (self._upload is None or self._upload.done):
            side.done()
        else:
            side.discard()

    # -- WebSocket --------------------------------------------------------------------------------------------------

    async def _switch_protocols(self, upstream: Upstream, rule: Rule) -> None:
        if rule.source.override_script and await self._run_script(rule.source.override_script, rule, b""):
            raise ScriptError("it left a body for a WebSocket's handshake")
        connection = await self._outlet.connect(upstream, rule)
        try:
            fields = [field for field in self._fields(rule, None) if field[0] != b"sec-websocket-extensions"]
            fields += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
            line = f"GET {self._target(rule)} HTTP/1.1\r\n".encode("latin-1")
            connection.begin(line + field_block(self._with_host(fields)) + b"\r\n", "GET", upgradable=True)
            self._attempt.request("allowed")
            self._agent.watch(connection.abort_for_client)
            try:
                head = await connection.response()
            finally:
                self._agent.watch(None)
            if head.status != 101:
                await self._relay(Http1Upstream(self._outlet.uplinks, upstream, connection))
                return
            self._attempt.response(101, head.headers)
            connection.start_raw()
            fields = [*end_to_end(head.headers), (b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
            stream = await self._agent.switch(fields)
            with self._outlet.tunnel(lambda: self._judge().allowed, stream.abort):
                await relay_websocket(stream, connection, self._attempt.message, self._attempt.room)
        finally:
            self._outlet.uplinks.discard(connection)
