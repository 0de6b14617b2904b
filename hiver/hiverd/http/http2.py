"""Header lists of HTTP/2 as heads of requests and responses: fields in, heads out, no I/O (RFC 9113 8).

As strict as for HTTP/1.1: what is relayed may be written as HTTP/1.1, so whatever could be read in two ways there, or
says the same thing twice, is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from hiverd.http.framing import MAX_FIELDS, MAX_HEAD_BYTES, Headers, ProtocolError
from hiverd.http.requests import RequestError, RequestHead, judge_expectation, split_target
from hiverd.http.responses import ResponseHead

FIELD_OVERHEAD_BYTES: Final = 32
"""What a field counts besides its name and value (RFC 9113 6.5.2)."""

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE: Final = re.compile(rb"(?![ \t])[\t\x20-\x7e\x80-\xff]*(?<![ \t])")
_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}")
_TARGET: Final = re.compile(rb"[\x21-\x7e]+")
_AUTHORITY: Final = re.compile(rb"[\x21-\x7e]+")
_STATUS: Final = re.compile(rb"[1-5][0-9]{2}")
_GRPC: Final = re.compile(rb"application/grpc(?![^+; \t])", re.IGNORECASE)

_REQUEST: Final = frozenset((b":method", b":scheme", b":authority", b":path", b":protocol"))
_RESPONSE: Final = frozenset((b":status",))
_OF_CONNECTIONS: Final = frozenset(
    (b"connection", b"http2-settings", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_NO_TRAILERS: Final = frozenset((b"content-length", b"expect", b"host", b"te"))


def parse_http2_request(fields: Iterable[tuple[bytes, bytes]], *, ended: bool) -> RequestHead:
    """The head in a header list; `ended`: no body follows. Raises `RequestError`.

    The headers have `host` in front and one `cookie`, as they would in HTTP/1.1. A body without a length counts as
    chunked.
    """
    fields = list(fields)
    size = sum(len(name) + len(value) + FIELD_OVERHEAD_BYTES for name, value in fields)
    if len(fields) > MAX_FIELDS or size > MAX_HEAD_BYTES:
        raise RequestError(431, "the request head is too large")
    try:
        pseudo, headers = _split(fields, _REQUEST)
        return _request_head(pseudo, headers, ended=ended)
    except RequestError:
        raise
    except ProtocolError as error:
        raise RequestError(400, str(error)) from error


def parse_http2_response(fields: Iterable[tuple[bytes, bytes]]) -> ResponseHead:
    """The head in a header list. Raises `ProtocolError`."""
    pseudo, headers = _split(fields, _RESPONSE)
    status = pseudo.get(b":status", b"")
    if _STATUS.fullmatch(status) is None:
        raise ProtocolError("malformed status")
    return ResponseHead(int(status), headers, old=False)


def parse_http2_trailers(fields: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Trailers, which must not say anything about framing or routing (RFC 9110 6.5.1). Raises `ProtocolError`."""
    _, headers = _split(fields, frozenset())
    if len(headers) > MAX_FIELDS or any(name in _NO_TRAILERS for name, _ in headers):
        raise ProtocolError("malformed trailers")
    return headers


def http2_fields(pseudo: Headers, headers: Headers) -> Headers:
    """A header list ready to send. Raises `ValueError` on a field that could be taken for something else."""
    for name, value in headers:
        if _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None or name in _OF_CONNECTIONS:
            raise ValueError("a header field cannot be sent by HTTP/2")
    return [*pseudo, *headers]


def is_grpc(headers: Headers) -> bool:
    """Whether a request is one of gRPC, which needs HTTP/2 to the end (gRPC-Web does not)."""
    return any(name == b"content-type" and _GRPC.match(value) is not None for name, value in headers)


def _split(
    fields: Iterable[tuple[bytes, bytes]], known: frozenset[bytes]
) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes]]]:
    """Pseudo fields and fields. Each of the former comes at most once, and before the latter (RFC 9113 8.3)."""
    pseudo: dict[bytes, bytes] = {}
    headers: Headers = []
    for name, value in fields:
        if name.startswith(b":"):
            if name not in known or name in pseudo or headers:
                raise ProtocolError("malformed pseudo field")
            pseudo[name] = value
            continue
        if _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
            raise ProtocolError("malformed header field")
        if name in _OF_CONNECTIONS or (name == b"te" and value.lower() != b"trailers"):
            raise ProtocolError("a header field that HTTP/2 does not have")
        headers.append((name, value))
    return pseudo, headers


def _request_head(pseudo: dict[bytes, bytes], headers: Headers, *, ended: bool) -> RequestHead:
    method = pseudo.get(b":method", b"")
    if _METHOD.fullmatch(method) is None:
        raise RequestError(400, "malformed method")
    if method == b"CONNECT":
        raise RequestError(501, "CONNECT is not supported")  # RFC 8441 included: it was not offered
    if b":protocol" in pseudo or pseudo.get(b":scheme") != b"https":
        raise RequestError(400, "malformed pseudo field")
    target = pseudo.get(b":path", b"")
    parts = split_target(method.decode("ascii"), target) if _TARGET.fullmatch(target) else None
    if parts is None:
        raise RequestError(400, "malformed request target")
    host = _host(pseudo, headers)
    headers = [(b"host", host), *(field for field in _with_one_cookie(headers) if field[0] != b"host")]
    head = RequestHead(method.decode("ascii"), *parts, headers, old=False)
    head.host = host.decode("latin-1")
    if ended and head.framing.content_length:
        raise RequestError(400, "a body was announced and did not come")
    head.framing.chunked = head.framing.content_length is None and not ended
    judge_expectation(head)
    return head


def _host(pseudo: dict[bytes, bytes], headers: Headers) -> bytes:
    """The one host that `:authority` and Host name (RFC 9113 8.3.1); either may be missing."""
    named = [pseudo[b":authority"]] if b":authority" in pseudo else []
    named += [value for name, value in headers if name == b"host"]
    hosts = {host.lower() for host in named}
    if len(hosts) != 1 or len(named) > 2 or _AUTHORITY.fullmatch(named[0]) is None:
        raise RequestError(400, "a request needs exactly one host")
    return named[0]


def _with_one_cookie(headers: Headers) -> Headers:
    """HTTP/2 may split the field; elsewhere it must be one (RFC 9113 8.2.3)."""
    cookies = [value for name, value in headers if name == b"cookie"]
    if len(cookies) < 2:
        return headers
    return [*(field for field in headers if field[0] != b"cookie"), (b"cookie", b"; ".join(cookies))]
