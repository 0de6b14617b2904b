"""A client with little cost of its own: one blocking keep-alive connection."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import re
import socket
import uuid
from io import FileIO
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from support.server import Server

BLOCK_BYTES: Final = 1 << 20
F_SETPIPE_SZ: Final = 1031


class _Frame(msgspec.Struct):
    type: str
    text: str = ""
    code: int = -1


class Caller:
    """Not safe for use by several threads."""

    def __init__(self, server: Server) -> None:
        self._port = server.port
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)

    def __enter__(self) -> Self:
        self._connection.connect()
        assert isinstance(self._connection.sock, socket.socket)
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, JSON document or None)."""
        answer = self._send(method, path, body)
        text = answer.read()
        return answer.status, json.loads(text) if text.strip() else None

    def _send(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        content = json.dumps(body).encode() if body is not None else None
        try:
            self._connection.request(method, path, body=content)
            return self._connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError):
            # The server closes connections that were idle for a while; nothing of this request was answered.
            self._connection.close()
            self._connection.request(method, path, body=content)
            return self._connection.getresponse()

    def create(self, key: str | None = None) -> str:
        """Creates a sandbox; its API path."""
        key = key or f"bench-{uuid.uuid4().hex[:12]}"
        status, document = self.call("POST", f"/v1/sandboxes/{key}", {"ttl": 0})
        if status != 201:
            raise RuntimeError(f"create answered {status}: {document}")
        return f"/sandbox/{document['id']}/v1/{key}"

    def exec(self, sandbox: str, command: str | list[str]) -> dict[str, Any]:
        status, document = self.call("POST", f"{sandbox}/exec", {"command": command})
        if status != 200 or document.get("exit_code") != 0:
            raise RuntimeError(f"exec answered {status}: {document}")
        assert isinstance(document, dict)
        return document

    def settle(self, sandbox: str) -> None:
        """Waits until everything that has happened in the sandbox is on record."""
        self._send("GET", f"{sandbox}/events?follow=false&lastEventId={10**15}").read()

    def remove(self, sandbox: str) -> None:
        self.call("DELETE", sandbox)

    def upload(self, sandbox: str, path: str, source: Path) -> None:
        """Sends a file with the kernel's help."""
        size = source.stat().st_size
        with socket.create_connection(("127.0.0.1", self._port)) as raw, source.open("rb") as file:
            head = f"POST {sandbox}/file{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n"
            raw.sendall(f"{head}Content-Type: application/octet-stream\r\nConnection: close\r\n\r\n".encode())
            raw.sendfile(file)
            answer = raw.makefile("rb").read()
        if b" 200 " not in answer.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"upload: {answer[:500]!r}")

    def download(self, sandbox: str, path: str, target: Path) -> int:
        """Receives a file with the kernel's help; its size in bytes."""
        with socket.create_connection(("127.0.0.1", self._port)) as raw, target.open("wb", buffering=0) as file:
            raw.sendall(f"GET {sandbox}/file{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head = b""
            while b"\r\n\r\n" not in head:
                head += raw.recv(1)
            match = re.search(rb"HTTP/1.1 200 .*\r\ncontent-length: ([0-9]+)\r\n", head, re.DOTALL)
            if match is None:
                raise RuntimeError(f"download: {head!r}")
            return _splice(raw, file, int(match[1]))

    def stream_output(self, sandbox: str, command: str) -> int:
        """Runs a command through exec-stream and decodes every frame; bytes of text received."""
        answer = self._send("POST", f"{sandbox}/exec-stream/{uuid.uuid4()}", {"command": command})
        decoder = msgspec.json.Decoder(_Frame)
        total, pending, code = 0, b"", None
        while piece := answer.read1(BLOCK_BYTES):
            *blocks, pending = (pending + piece).split(b"\n\n")
            for block in blocks:
                at = block.find(b"data: ")
                if at >= 0:
                    frame = decoder.decode(block[at + 6 :])
                    total += len(frame.text)
                    code = frame.code if frame.type == "exit" else code
        if code != 0:
            raise RuntimeError(f"exec-stream ended with {code}")
        return total


def _splice(source: socket.socket, target: FileIO, size: int) -> int:
    """Moves `size` bytes from a socket to a file without copying them through this process; how many there were."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, F_SETPIPE_SZ, BLOCK_BYTES)
    total = 0
    while total < size and (count := os.splice(source.fileno(), write_end, min(BLOCK_BYTES, size - total))):
        total += count
        while count:
            count -= os.splice(read_end, target.fileno(), count)
    os.close(read_end)
    os.close(write_end)
    return total


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
