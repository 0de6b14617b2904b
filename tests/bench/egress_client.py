"""The client that egress is measured with, inside a sandbox; prints seconds as JSON.

egress_client.py keep-alive ADDRESS PORT NAME COUNT      one connection, COUNT requests
egress_client.py connect    ADDRESS PORT NAME,... COUNT  COUNT connections with a request each, the names in turn
egress_client.py download   ADDRESS PORT NAME BYTES      one answer of that size

ADDRESS is a name or an address. With `tls` behind all that the connection is TLS, with `tls=FILE` trusting that
authority.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import time

REQUEST = "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n"


def connect(address: str, port: int, name: str, context: ssl.SSLContext | None) -> socket.socket:
    connection = socket.create_connection((address or name, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection if context is None else context.wrap_socket(connection, server_hostname=name)


def exchange(connection: socket.socket, request: bytes) -> None:
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"Hello, world!"):
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError(answer)
        answer += piece


def keep_alive(address: str, port: int, name: str, count: int, context: ssl.SSLContext | None) -> list[float]:
    connection = connect(address, port, name, context)
    request = (REQUEST % ("/", name)).encode()
    exchange(connection, request)
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        exchange(connection, request)
        seconds.append(time.perf_counter() - began)
    return seconds


def connections(address: str, port: int, names: list[str], count: int, context: ssl.SSLContext | None) -> list[float]:
    seconds = []
    for number in range(count):
        name = names[number % len(names)]
        request = (REQUEST % ("/", name)).encode()
        began = time.perf_counter()
        connection = connect(address, port, name, context)
        exchange(connection, request)
        seconds.append(time.perf_counter() - began)
        connection.close()
    return seconds


def download(address: str, port: int, name: str, size: int, context: ssl.SSLContext | None) -> list[float]:
    connection = connect(address, port, name, context)
    buffer = bytearray(1 << 18)
    began = time.perf_counter()
    connection.sendall((REQUEST % (f"/bytes/{size}", name)).encode())
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(4096)
    total = len(head.partition(b"\r\n\r\n")[2])
    while total < size:
        count = connection.recv_into(buffer)
        if not count:
            raise ConnectionError(f"{total} of {size} bytes")
        total += count
    return [time.perf_counter() - began]


def main() -> None:
    what, address, port, name, count = sys.argv[1:6]
    context = None
    if len(sys.argv) > 6:
        context = ssl.create_default_context(cafile=sys.argv[6].partition("=")[2] or None)
    address = "" if address == "-" else address
    if what == "keep-alive":
        seconds = keep_alive(address, int(port), name, int(count), context)
    elif what == "connect":
        seconds = connections(address, int(port), name.split(","), int(count), context)
    else:
        seconds = download(address, int(port), name, int(count), context)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
