"""What sandboxes reach in tests: HTTP(S) servers on this host's loopback, and an authority that signs for any name.

A rule leads a name there with `override: {"host": upstream.address}`; `[egress] upstream_ca_files` makes the server
trust the authority.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_CHUNK = b"x" * 65536


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.path = folder / "upstream-ca.pem"
        self._ca.cert_pem.write_to_path(str(self.path))

    @property
    def settings(self) -> str:
        """A configuration file's part that makes the server trust it."""
        return f'[egress]\nupstream_ca_files = ["{self.path}"]\n'

    def context(self, *names: str, protocols: tuple[str, ...] = (), **options: Any) -> ssl.SSLContext:
        """A server's context with a certificate for these names; `options` as for `trustme.CA.issue_cert`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*names, **options).configure_cert(context)
        if protocols:
            context.set_alpn_protocols(protocols)
        return context

    def pem(self, *names: str) -> tuple[bytes, bytes]:
        """A private key and a certificate for these names."""
        made = self._ca.issue_cert(*names)
        return made.private_key_pem.bytes(), b"".join(blob.bytes() for blob in made.cert_chain_pems)

    def strange_context(self, *names: str, days: tuple[int, int] = (-1, 30), issuer: str = "this") -> ssl.SSLContext:
        """The same with something wrong. `days`: from when until when it is valid, from now; `issuer`: `this`, an
        `unknown` one, or `itself`."""
        now = datetime.now(UTC)
        since, until = (now + timedelta(days=day) for day in days)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if issuer == "itself":
            key, certificate = _self_signed(names[0], since, until)
            with tempfile.NamedTemporaryFile() as file:
                file.write(key + certificate)
                file.flush()
                context.load_cert_chain(file.name)
        else:
            authority = self._ca if issuer == "this" else trustme.CA(key_type=trustme.KeyType.ECDSA)
            authority.issue_cert(*names, not_before=since, not_after=until).configure_cert(context)
        return context


def _self_signed(name: str, not_before: datetime, not_after: datetime) -> tuple[bytes, bytes]:
    """Key and certificate as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)


class Seen(NamedTuple):
    """A request as it arrived."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first field of that name."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


class SocketUpstream:
    """A TCP server on loopback; `serve` gets each accepted connection in a thread of its own."""

    def __init__(self, serve: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> None:
        self._serve = serve
        self._context = context
        self.connections = 0
        upstream = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                upstream._handle(self.request)

        class Listener(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            allow_reuse_address = True
            request_queue_size = 512

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that leaves is part of many tests

        self._server = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def address(self) -> str:
        """For `override.host`."""
        return f"127.0.0.1:{self.port}"

    def _handle(self, connection: socket.socket) -> None:
        self.connections += 1
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            if self._context is None:
                self._serve(connection)
                return
            with self._context.wrap_socket(connection, server_side=True) as secured:
                self._serve(secured)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class HttpUpstream(SocketUpstream):
    """HTTP/1.1 with keep-alive. Every request is kept in `seen`.

    `/bytes/N` and `/chunked/N`: N bytes; `/text/N`: the same as text; `/sse/N`: N events; `/slow/S`: an answer after S
    seconds; `/status/N`; `/redirect?to=URL`; `/close`: no answer; `/cut`: half an answer; `/trailers`. Anything else
    is answered with the request as JSON.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.seen: list[Seen] = []
        super().__init__(lambda connection: _Requests.serve(connection, self.seen), context)


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[Seen]]

    @classmethod
    def serve(cls, connection: socket.socket, seen: list[Seen]) -> None:
        handler = type("Handler", (cls,), {"seen": seen})
        handler(connection, ("127.0.0.1", 0), None)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        name, _, argument = url.path.strip("/").partition("/")
        if name == "discard":
            self._json({"bytes": self._discard()})
            return
        body = read_body(self)
        self.seen.append(Seen(self.command, self.path, list(self.headers.items()), body))
        answer = getattr(self, f"_answer_{name}", None)
        if answer is not None:
            answer(argument, parse_qs(url.query))
            return
        headers = [list(item) for item in self.headers.items()]
        document = {"method": self.command, "path": self.path, "headers": headers, "body": body.decode("latin-1")}
        self._json(document)

    def __getattr__(self, name: str) -> Any:
        """Every method is served alike: the base class looks for `do_GET` and the like."""
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _discard(self) -> int:
        left = total = int(self.headers.get("Content-Length") or 0)
        while left:
            left -= len(self.rfile.read(min(left, 1 << 20)))
        return total

    def _json(self, document: object) -> None:
        self._whole(200, json.dumps(document).encode(), "application/json")

    def _whole(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer_bytes(self, argument: str, _: object) -> None:
        self._counted(int(argument), "application/octet-stream")

    def _answer_text(self, argument: str, _: object) -> None:
        self._counted(int(argument), "text/plain")

    def _counted(self, size: int, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        for piece in _pieces(size if self.command != "HEAD" else 0):
            self.wfile.write(piece)

    def _answer_chunked(self, argument: str, _: object) -> None:
        self._begin_chunks("application/octet-stream")
        for piece in _pieces(int(argument)):
            self._chunk(piece)
        self.wfile.write(b"0\r\n\r\n")

    def _answer_trailers(self, _: str, __: object) -> None:
        self._begin_chunks("text/plain")
        self._chunk(b"body\n")
        self.wfile.write(b"0\r\nX-Trailer: here\r\n\r\n")

    def _answer_sse(self, argument: str, query: dict[str, list[str]]) -> None:
        pause_seconds = float(query.get("pause", ["0"])[0])
        self._begin_chunks("text/event-stream")
        for number in range(int(argument)):
            self._chunk(b"data: %d\n\n" % number)
            time.sleep(pause_seconds)
        self.wfile.write(b"0\r\n\r\n")

    def _answer_slow(self, argument: str, _: object) -> None:
        time.sleep(float(argument))
        self._json({"slow": argument})

    def _answer_status(self, argument: str, _: object) -> None:
        self._whole(int(argument), b"", "text/plain")

    def _answer_redirect(self, _: str, query: dict[str, list[str]]) -> None:
        self.send_response(302)
        self.send_header("Location", query["to"][0])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer_close(self, _: str, __: object) -> None:
        self.close_connection = True

    def _answer_cut(self, _: str, __: object) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"half")
        self.close_connection = True

    def _begin_chunks(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


def read_body(request: BaseHTTPRequestHandler) -> bytes:
    """The body of a request, counted or in chunks; trailers are read and forgotten."""
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    pieces = []
    while size := int(request.rfile.readline().partition(b";")[0], 16):
        pieces.append(request.rfile.read(size))
        request.rfile.readline()
    while request.rfile.readline().strip():
        pass
    return b"".join(pieces)


def _pieces(size: int) -> Iterator[bytes]:
    while size > 0:
        yield _CHUNK[:size]
        size -= len(_CHUNK)


def lead(name: str, upstream: SocketUpstream, **rule: Any) -> dict[str, Any]:
    """An allow rule that leads this name to the upstream."""
    override = {"host": upstream.address, **rule.pop("override", {})}
    return {"access": "allow", "host": name, "override": override, **rule}
