"""A small HTTP, SSE and WebSocket server of the standard library only: it runs inside sandboxes under test."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
MORE = threading.Semaphore(0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent: standard output is for the test."""

    def answer(self) -> None:
        body = self.read_body()
        path = self.path.partition("?")[0]
        if path == "/redirect":
            self.reply(302, b"", {"Location": "/elsewhere"})
        elif path == "/more":
            MORE.release()
            self.reply(204, b"")
        elif path == "/sse":
            self.send_events()
        elif path == "/mirror":
            self.reply(200, body)
        elif path == "/ws":
            self.serve_websocket()
        else:
            seen = {
                "method": self.command,
                "path": self.path,
                "body": body.hex(),
                "headers": {name.lower(): value for name, value in self.headers.items()},
            }
            self.reply(207, json.dumps(seen).encode(), {"X-Inner": "present", "Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer  # noqa: N815

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(3):
            self.wfile.write(f"data: {number}\n\n".encode())
            self.wfile.flush()
            MORE.acquire()

    def serve_websocket(self) -> None:
        accept = base64.b64encode(hashlib.sha1(self.headers["Sec-WebSocket-Key"].encode() + GUID).digest())  # noqa: S324
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept.decode())
        self.end_headers()
        while self.echo_frame():
            pass
        self.close_connection = True

    def echo_frame(self) -> bool:
        """Sends one frame back, unmasked; False after a close frame."""
        head = self.rfile.read(2)
        if len(head) < 2:
            return False
        size = head[1] & 0x7F
        if size >= 126:
            size = int.from_bytes(self.rfile.read(2 if size == 126 else 8), "big")
        mask = self.rfile.read(4)
        payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(self.rfile.read(size)))
        self.wfile.write(bytes([head[0]]) + _length(size) + payload)
        return head[0] & 0x0F != 8


def _length(size: int) -> bytes:
    if size < 126:
        return bytes([size])
    if size < 1 << 16:
        return b"\x7e" + size.to_bytes(2, "big")
    return b"\x7f" + size.to_bytes(8, "big")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    address_family = socket.AF_INET


if __name__ == "__main__":
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    print("listening")
    server.serve_forever()
