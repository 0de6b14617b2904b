"""What the fakes of storage services share: HTTP/1.1 on loopback in threads, counted requests, misbehaviour on demand.

A fake speaks its service's real API as far as a plug-in uses it, and refuses what the service would refuse.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from hiverd.testing.filesystem import FailureKind, Faults
from support.upstreams import SocketUpstream, read_body


class Call(NamedTuple):
    """A request. `target` is the path as it was sent, `path` the same decoded."""

    method: str
    target: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return unquote(self.target, errors="surrogateescape")

    def json(self) -> dict[str, Any]:
        found = json.loads(self.body or b"{}")
        assert isinstance(found, dict)
        return found

    @property
    def bearer(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 -- never changed


def json_answer(status: int, body: object, **headers: str) -> Answer:
    return Answer(status, json.dumps(body).encode(), {"Content-Type": "application/json; charset=UTF-8", **headers})


def ranged_answer(data: bytes, wanted: str | None, **headers: str) -> Answer:
    """Data, or the part that a `Range` header asks for (RFC 9110, 14)."""
    if wanted is None:
        return Answer(200, data, dict(headers))
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, end = int(first), min(int(last or len(data)), len(data) - 1)
    if start >= len(data):
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


def _handle(handler: Callable[..., object], connection: object) -> None:
    handler(connection, ("127.0.0.1", 0), None)


class FakeService(SocketUpstream, Faults):
    """`answer` is called for one request at a time.

    `counts`: requests by kind; `slow_ms`: before each answer; `cut_bytes`: the next body that is longer ends there;
    `looked` is called with each request as it arrives and may ask for its failure; `before` with each that is to be
    answered, for what others do in the moment before.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.calls: list[Call] = []
        self.slow_ms = 0
        self.cut_bytes: int | None = None
        self.accepted_tokens = {"token-0"}
        self.tokens = 0
        self.revoked = False
        self.looked: Callable[[Call], object] | None = None
        self.before: Callable[[Call], object] | None = None
        self._failures: tuple[FailureKind, int] = ("500", 0)
        self._lock = threading.RLock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                body = read_body(self)
                if len(body) < int(self.headers.get("Content-Length") or 0):
                    self.close_connection = True  # the client has gone: nothing is done
                    return
                split = urlsplit(self.path)
                query = dict(parse_qsl(split.query, keep_blank_values=True))
                headers = {name.lower(): value for name, value in self.headers.items()}
                service._respond(self, Call(self.command, split.path, query, headers, body))

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(lambda connection: _handle(Handler, connection))

    # -- to be written by each fake -----------------------------------------------------------------------------------

    def kind(self, call: Call) -> str:
        """What `counts` counts it as."""
        return call.method

    def answer(self, call: Call) -> Answer:
        raise NotImplementedError

    def refused(self, kind: FailureKind) -> Answer:
        """What the service says when it is busy or broken."""
        return json_answer(int(kind), {"error": {"code": int(kind)}})

    # -- misbehaviour -------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> int:
        return self.counts.total()

    def fail(self, kind: FailureKind, count: int) -> None:
        with self._lock:
            self._failures = kind, count

    def revoke(self) -> None:
        with self._lock:
            self.revoked = True
            self.accepted_tokens.clear()

    def expire_token(self) -> bool:
        with self._lock:
            self.accepted_tokens.clear()
        return True

    def new_token(self) -> str:
        """One that is accepted from now on."""
        self.tokens += 1
        token = f"token-{self.tokens}"
        self.accepted_tokens.add(token)
        return token

    # -- serving ------------------------------------------------------------------------------------------------------

    def _respond(self, handler: BaseHTTPRequestHandler, call: Call) -> None:
        if self.slow_ms:
            time.sleep(self.slow_ms / 1000)
        with self._lock:
            self.counts[self.kind(call)] += 1
            self.calls.append(call)
            if self.looked:
                self.looked(call)
            failure = self._next_failure()
            if failure == "cut":
                handler.close_connection = True
                return
            if failure in ("429", "500", "503"):
                answer = self.refused(failure)
            else:
                if self.before:
                    self.before(call)
                answer = self.answer(call)
        if failure == "lost-answer":
            handler.close_connection = True
            return
        self._send(handler, answer, short=failure == "short-body")

    def _next_failure(self) -> FailureKind | None:
        kind, count = self._failures
        if count <= 0:
            return None
        self._failures = kind, count - 1
        return kind

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer, *, short: bool) -> None:
        body = answer.body
        if self.cut_bytes is not None and len(body) > self.cut_bytes:
            body, self.cut_bytes = body[: self.cut_bytes], None
        elif short:
            body = body[: len(body) // 2]
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if answer.status not in (204, 304):
            handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        handler.wfile.write(body)
        if len(body) != len(answer.body):
            handler.close_connection = True
