"""Reading HTTP/1.1 requests from a client that may be hostile: bytes in, head and body pieces out, no I/O (RFC 9112).

Stricter than for responses, as a rule is judged on what is read here: every line ends with CRLF, there is one Host, and
whatever a lenient reader could take for another target, another length or another request is refused. So what is
relayed, written anew from these parts, means to everyone what it meant here.
"""

from __future__ import annotations

import re
from typing import Final

from hiverd.http.framing import (
    MAX_HEAD_BYTES,
    BodyReader,
    Framing,
    Headers,
    ProtocolError,
    connection_tokens,
    judge_framing,
    parse_fields,
)

MAX_TARGET_BYTES: Final = 16 * 1024

_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])")
_ORIGIN_FORM = re.compile(rb"(/[^?#]*)(?:\?([^#]*))?")
_ABSOLUTE_FORM = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?#@]+)(/[^?#]*)?(?:\?([^#]*))?")


class RequestError(ProtocolError):
    """The request is refused. The connection ends with an answer of this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RequestHead:
    """Request line and header fields of one request, and how its body is delimited."""

    __slots__ = ("expects_continue", "framing", "headers", "host", "method", "old", "path", "query", "upgrade")

    def __init__(self, method: str, path: str, query: str | None, headers: Headers, *, old: bool) -> None:
        self.method = method
        self.path = path
        """As received, percent-encoded; `*` for a request about the server as a whole."""
        self.query = query
        self.headers = headers
        self.old = old
        """HTTP/1.0."""
        self.host: str | None = None
        """The Host field, or the authority of an absolute target, which must be the same; None if there is none."""
        self.framing: Framing = judge_framing(headers, old=old)
        """In HTTP/2, a body whose length is not told counts as chunked."""
        self.expects_continue = False
        self.upgrade: bytes | None = None
        """The one protocol that the client wants to switch to, in lower case."""

    @property
    def has_body(self) -> bool:
        return self.framing.chunked or bool(self.framing.content_length)


class RequestParser(BodyReader):
    """Reads one request. `excess` is the beginning of the next; feed it to the next parser."""

    __slots__ = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.head: RequestHead | None = None

    def feed(self, data: bytes) -> bytes:
        """Takes what was received, returns the body bytes in it. Raises `ProtocolError`: the connection has to end."""
        if self.head is None:
            rest = self._read_head(self._buffer + data)
            if rest is None:
                return b""
            data = rest
        return self._read_body(data)

    @property
    def begun(self) -> bool:
        """Something of a request has arrived."""
        return bool(self._buffer) or self.head is not None

    def _read_head(self, data: bytes) -> bytes | None:
        data = data.removeprefix(b"\r\n")  # RFC 9112 2.2: an empty line left over from the body before
        end = data.find(b"\r\n\r\n")
        if (end if end >= 0 else len(data)) > MAX_HEAD_BYTES:
            raise RequestError(431, "the request head is too large")
        if end < 0:
            self._buffer = data
            return None
        self._buffer = b""
        self.head = parse_request_head(data[:end])
        framing = self.head.framing
        if not framing.chunked and framing.content_length is None:
            framing = Framing(content_length=0)
        self._frame(framing)
        return data[end + 4 :]


def parse_request_head(block: bytes) -> RequestHead:
    """Parses a head without its final empty line. Raises `RequestError`."""
    line, *field_lines = block.split(b"\r\n")
    try:
        head = _request_line(line, parse_fields(field_lines))
    except RequestError:
        raise
    except ProtocolError as error:
        raise RequestError(400, str(error)) from error
    _judge_host(head)
    judge_expectation(head)
    _judge_upgrade(head)
    return head


def _request_line(line: bytes, headers: Headers) -> RequestHead:
    parts = _REQUEST_LINE.fullmatch(line)
    if parts is None:
        raise RequestError(400, "malformed request line")
    method, target, old = parts[1].decode("ascii"), parts[2], parts[3] == b"0"
    if method == "CONNECT":
        raise RequestError(501, "CONNECT is not supported")
    if origin := split_target(method, target):
        return RequestHead(method, *origin, headers, old=old)
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None:
        raise RequestError(400, "malformed request target")
    head = RequestHead(method, (absolute[2] or b"/").decode("ascii"), _text(absolute[3]), headers, old=old)
    head.host = absolute[1].decode("ascii")
    return head


def split_target(method: str, target: bytes) -> tuple[str, str | None] | None:
    """Path and query of a target in origin form, or `*` for OPTIONS; None if it has another form (RFC 9112 3.2).

    `target` is visible ASCII. Raises `RequestError` 414.
    """
    if len(target) > MAX_TARGET_BYTES:
        raise RequestError(414, "the request target is too long")
    if target == b"*" and method == "OPTIONS":
        return "*", None
    origin = _ORIGIN_FORM.fullmatch(target)
    return None if origin is None else (origin[1].decode("ascii"), _text(origin[2]))


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("ascii")


def _judge_host(head: RequestHead) -> None:
    hosts = [value for name, value in head.headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and not head.old):
        raise RequestError(400, "a request needs exactly one Host")
    if not hosts:
        return
    host = hosts[0].decode("latin-1")
    if head.host is not None and head.host.lower() != host.lower():
        raise RequestError(400, "the request target and Host name different hosts")
    head.host = host


def judge_expectation(head: RequestHead) -> None:
    """Sets `expects_continue`. Raises `RequestError` 417 (RFC 9110 10.1.1)."""
    expectations = [value.lower() for name, value in head.headers if name == b"expect"]
    if expectations and expectations != [b"100-continue"]:
        raise RequestError(417, "the only expectation that is known is 100-continue")
    head.expects_continue = bool(expectations) and head.has_body and not head.old


def _judge_upgrade(head: RequestHead) -> None:
    """A switch is on offer only if Connection says so (RFC 9110 7.8); of several protocols none is taken."""
    wanted = [
        value.strip().lower() for name, value in head.headers if name == b"upgrade" for value in value.split(b",")
    ]
    if len(wanted) == 1 and not head.old and b"upgrade" in connection_tokens(head.headers):
        head.upgrade = wanted[0]
