"""The upstream that egress is measured with: `python egress_upstream.py PLAIN_PORT TLS_PORT CERTIFICATE_FILE`.

`GET /bytes/N` is answered with N bytes, everything else with a few.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from typing import Final, cast

import uvloop

HELLO: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nHello, world!"
BYTES_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n"
BLOCK: Final = bytes(1 << 18)


class Upstream(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.pending = b""
        self.left = 0
        self.paused = False

    def data_received(self, data: bytes) -> None:
        *requests, self.pending = (self.pending + data).split(b"\r\n\r\n")
        for request in requests:
            target = request.split(b" ", 2)[1]
            if target.startswith(b"/bytes/"):
                self.left = int(target[7:])
                self.transport.write(BYTES_HEAD % self.left)
                self.send()
            else:
                self.transport.write(HELLO)

    def send(self) -> None:
        while self.left and not self.paused:
            block = BLOCK if self.left >= len(BLOCK) else BLOCK[: self.left]
            self.left -= len(block)
            self.transport.write(block)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.send()


async def main() -> None:
    plain_port, tls_port, certificate = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    await loop.create_server(Upstream, "127.0.0.1", plain_port, backlog=1024)
    await loop.create_server(Upstream, "127.0.0.1", tls_port, backlog=1024, ssl=context)
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
