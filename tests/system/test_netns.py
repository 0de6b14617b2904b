"""Sockets that are born in another network namespace."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading

import pytest
import uvloop

from hiverd import netns
from hiverd.netns import SocketFactory, ThreadSocketFactory
from support.gateway import eventually, open_descriptors

pytestmark = pytest.mark.system


@pytest.fixture
def factory() -> SocketFactory:
    return ThreadSocketFactory()


async def converse(factory: SocketFactory, namespace: str, address: str) -> None:
    """A listener and a connection, both made inside, talk to each other."""
    listener = await factory.listen_tcp(namespace, address, 0)
    port = listener.getsockname()[1]
    assert port not in _host_ports(), "the listener is visible on the host"

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"inside")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, sock=listener)
    client = await factory.for_connect(namespace, address)
    assert not client.get_inheritable()
    await asyncio.get_running_loop().sock_connect(client, (address, port))
    reader, writer = await asyncio.open_connection(sock=client)
    assert await reader.read() == b"inside"
    writer.close()
    await writer.wait_closed()
    server.close()


def _host_ports() -> set[int]:
    ports = set()
    for table in ("/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"):
        with open(table) as lines:
            ports |= {int(line.split()[1].rpartition(":")[2], 16) for line in list(lines)[1:]}
    return ports


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_both_ends_inside(factory: SocketFactory, namespace: str, address: str) -> None:
    await converse(factory, namespace, address)


def test_under_uvloop(factory: SocketFactory, namespace: str) -> None:
    uvloop.run(converse(factory, namespace, "127.0.0.1"))


async def test_no_thread_of_ours_changes_its_namespace(factory: SocketFactory, namespace: str) -> None:
    home = os.stat("/proc/self/ns/net").st_ino
    sockets = await asyncio.gather(*[factory.for_connect(namespace, "127.0.0.1") for _ in range(50)])
    assert os.stat("/proc/thread-self/ns/net").st_ino == home
    assert await asyncio.to_thread(lambda: os.stat("/proc/thread-self/ns/net").st_ino) == home
    await eventually(lambda: _namespaces_of_threads() == {home}, "every thread is at home")
    for sock in sockets:
        sock.close()


def _namespaces_of_threads() -> set[int]:
    found = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            found.add(os.stat(f"/proc/self/task/{thread}/ns/net").st_ino)
        except FileNotFoundError:  # it has ended
            continue
    return found


async def test_a_socket_from_inside_does_not_reach_the_host(factory: SocketFactory, namespace: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as outside,
        await factory.for_connect(namespace, "127.0.0.1") as sock,
        pytest.raises(ConnectionRefusedError),
    ):
        await asyncio.get_running_loop().sock_connect(sock, outside.getsockname())


async def test_udp(factory: SocketFactory, namespace: str) -> None:
    loop = asyncio.get_running_loop()
    with (
        await factory.bind_udp(namespace, "127.0.0.1", 0) as one,
        await factory.bind_udp(namespace, "127.0.0.1", 0) as two,
    ):
        await loop.sock_sendto(one, b"hello", two.getsockname())
        assert await loop.sock_recvfrom(two, 100) == (b"hello", one.getsockname())


async def test_errors_leave_nothing(factory: SocketFactory, namespace: str, tmp_path: os.PathLike[str]) -> None:
    plain = os.path.join(tmp_path, "file")
    with open(plain, "w"):
        pass
    taken = await factory.listen_tcp(namespace, "127.0.0.1", 0)
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        await factory.for_connect("/run/netns/none-such", "127.0.0.1")
    with pytest.raises(OSError, match="setns") as refused:
        await factory.for_connect(plain, "127.0.0.1")
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="setns"):
        await factory.for_connect("/proc/self/ns/uts", "127.0.0.1")
    with pytest.raises(OSError) as busy:  # noqa: PT011
        await factory.listen_tcp(namespace, "127.0.0.1", taken.getsockname()[1])
    assert busy.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError) as foreign:  # noqa: PT011
        await factory.listen_tcp(namespace, "192.0.2.1", 0)
    assert foreign.value.errno == errno.EADDRNOTAVAIL
    assert open_descriptors() == before
    taken.close()


async def test_a_cancelled_caller_leaves_no_socket(factory: SocketFactory, namespace: str) -> None:
    before = open_descriptors()
    for _ in range(50):
        task = asyncio.create_task(factory.for_connect(namespace, "127.0.0.1"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await factory.close()
    await asyncio.sleep(0)  # the callbacks of the last one
    assert open_descriptors() == before


def test_a_loop_that_is_closed_meanwhile_leaves_no_socket(namespace: str) -> None:
    before = open_descriptors()
    loop = asyncio.new_event_loop()
    made: asyncio.Future[socket.socket] = loop.create_future()
    loop.close()
    worker = threading.Thread(
        target=netns._make_in_thread, args=(namespace, netns.SocketRequest(), loop, made), name="maker"
    )
    worker.start()
    worker.join(10)
    assert open_descriptors() == before
