"""Sockets that are born in another network namespace (DESIGN 3).

A socket belongs for its whole life to the network namespace in which it was made, whoever holds it. So a thread of
this process enters the sandbox's namespace and makes the socket there; afterwards the event loop connects it or accepts
on it like any other. No bridge, no veth and no rule on the host is needed.

`setns(2)` changes the calling *thread* only, which is why this never happens on the event loop's thread.
"""

from __future__ import annotations

import _thread
import abc
import asyncio
import ctypes
import os
import socket
from typing import Final

from msgspec import Struct

CLONE_NEWNET: Final = 0x40000000  # <sched.h>

_libc = ctypes.CDLL(None, use_errno=True)


class SocketRequest(Struct, frozen=True, kw_only=True):
    """What kind of socket to make. Plain data, so that it can be sent to a helper process."""

    family: int = socket.AF_INET
    kind: int = socket.SOCK_STREAM
    options: tuple[tuple[int, int, int], ...] = ()
    """(level, option, value) for `setsockopt`, applied before binding."""
    bind: tuple[str, int] | None = None
    backlog: int | None = None
    """Listens with this backlog; None does not listen."""


class SocketFactory(abc.ABC):
    """Makes sockets in network namespaces. All sockets are non-blocking and close-on-exec; the caller owns them."""

    @abc.abstractmethod
    async def make(self, namespace: str, request: SocketRequest) -> socket.socket:
        """A socket in the namespace whose nsfs file is at `namespace`.

        Raises `OSError`: FileNotFoundError if the namespace is gone, PermissionError, EADDRINUSE and so on.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Waits for what is under way and frees what this object holds. Sockets that were handed out stay usable."""

    async def for_connect(self, namespace: str, address: str) -> socket.socket:
        """An unconnected TCP socket for reaching `address` (an IPv4 or IPv6 literal)."""
        return await self.make(
            namespace,
            SocketRequest(family=family_of(address), options=((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)),
        )

    async def listen_tcp(
        self,
        namespace: str,
        address: str,
        port: int,
        *,
        backlog: int = 256,
        options: tuple[tuple[int, int, int], ...] = (),
    ) -> socket.socket:
        """A TCP listener; port 0 lets the kernel choose. An IPv6 listener does not take IPv4 as well."""
        return await self.make(
            namespace,
            SocketRequest(
                family=family_of(address),
                options=(*_server_options(address), *options),
                bind=(address, port),
                backlog=backlog,
            ),
        )

    async def bind_udp(
        self, namespace: str, address: str, port: int, *, options: tuple[tuple[int, int, int], ...] = ()
    ) -> socket.socket:
        """A bound UDP socket; port 0 lets the kernel choose."""
        return await self.make(
            namespace,
            SocketRequest(
                family=family_of(address),
                kind=socket.SOCK_DGRAM,
                options=(*_server_options(address), *options),
                bind=(address, port),
            ),
        )


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6 of an address literal."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _server_options(address: str) -> tuple[tuple[int, int, int], ...]:
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family_of(address) == socket.AF_INET6:
        return (reuse, (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1))
    return (reuse,)


def open_socket(request: SocketRequest) -> socket.socket:
    """Makes the described socket in the calling thread's namespace. Raises `OSError`; nothing leaks then."""
    sock = socket.socket(request.family, request.kind)
    try:
        sock.setblocking(False)
        for level, option, value in request.options:
            sock.setsockopt(level, option, value)
        if request.bind is not None:
            sock.bind(request.bind)
        if request.backlog is not None:
            sock.listen(request.backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def enter_network_namespace(descriptor: int) -> None:
    """Moves the calling thread. Raises `OSError` and changes nothing if the kernel refuses."""
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def leave_network_namespace() -> None:
    """Moves the calling thread into a new, empty namespace. Raises `OSError`."""
    if _libc.unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")


class ThreadSocketFactory(SocketFactory):
    """Needs CAP_SYS_ADMIN over the namespaces (root, outside of rootless mode).

    Every socket is made by a thread of its own that enters the namespace and ends there. So there is no way back that
    could fail and leave a thread of ours inside a sandbox, and nothing is kept between calls.
    """

    def __init__(self) -> None:
        self._under_way: set[asyncio.Future[socket.socket]] = set()

    async def make(self, namespace: str, request: SocketRequest) -> socket.socket:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[socket.socket] = loop.create_future()
        self._under_way.add(made)
        made.add_done_callback(self._under_way.discard)
        # The low-level call does not wait for the thread to come up, so the loop is not held.
        _thread.start_new_thread(_make_in_thread, (namespace, request, loop, made))
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:
            made.add_done_callback(_discard)
            raise

    async def close(self) -> None:
        while self._under_way:
            await asyncio.wait(tuple(self._under_way))


def _make_in_thread(
    namespace: str,
    request: SocketRequest,
    loop: asyncio.AbstractEventLoop,
    made: asyncio.Future[socket.socket],
) -> None:
    outcome: socket.socket | Exception
    try:
        outcome = _make_inside(namespace, request)
    except Exception as error:  # noqa: BLE001 -- handed to the caller
        outcome = error
    try:
        loop.call_soon_threadsafe(_deliver, made, outcome)
    except RuntimeError:  # the loop was closed meanwhile
        if isinstance(outcome, socket.socket):
            outcome.close()


def _make_inside(namespace: str, request: SocketRequest) -> socket.socket:
    """Leaves the calling thread inside the namespace."""
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_network_namespace(descriptor)
    finally:
        os.close(descriptor)
    return open_socket(request)


def _deliver(made: asyncio.Future[socket.socket], outcome: socket.socket | Exception) -> None:
    if isinstance(outcome, Exception):
        made.set_exception(outcome)
    else:
        made.set_result(outcome)


def _discard(made: asyncio.Future[socket.socket]) -> None:
    """Closes a socket whose taker was cancelled."""
    if made.exception() is None:
        made.result().close()
