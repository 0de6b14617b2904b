"""What the plug-ins that speak HTTP through httpx share: clients, errors, and reads that survive a cut connection."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Final

import httpx

from .retrying import PIECE_BYTES, TransientError, pause_seconds

# Their messages hold whole URLs; those of a download or an upload are credentials.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

CONNECTIONS: Final = 16
_RESUMES: Final = 6
"""How often one read goes on after its connection was cut."""


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all: to read the authorities takes tens of milliseconds, in which a process serves nobody."""
    return httpx.create_ssl_context()


def make_client(auth: httpx.Auth | None = None) -> httpx.AsyncClient:
    """A pool of connections of its own. Redirects are not followed: each caller knows which it expects."""
    return httpx.AsyncClient(
        auth=auth,
        verify=_tls(),
        timeout=httpx.Timeout(60, connect=10),
        limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
        follow_redirects=False,
        headers={"User-Agent": "hiver"},
    )


@contextlib.contextmanager
def transport_errors() -> Iterator[None]:
    """Makes a `TransientError` of what httpx raises, without its text: that may hold a URL."""
    try:
        yield
    except httpx.TimeoutException:
        raise TransientError(errno.ETIMEDOUT, "the service does not answer in time") from None
    except httpx.ConnectError:
        raise TransientError(errno.EHOSTUNREACH, "the service cannot be reached", done=False) from None
    except (httpx.TransportError, httpx.DecodingError, httpx.StreamError):
        raise TransientError(errno.ECONNRESET, "the connection to the service was cut") from None
    except httpx.InvalidURL:
        raise OSError(errno.EIO, "the service named an address that is none") from None


def failure(response: httpx.Response, path: str) -> Exception:
    """What a status means, of those that mean the same everywhere."""
    status = response.status_code
    text = f"the service answers {status}"
    if status == 429:
        return TransientError(errno.EAGAIN, text, retry_after_seconds=retry_after_seconds(response), done=False)
    if status == 507:
        return OSError(errno.ENOSPC, text, path)
    if status in (408, 423) or status >= 500:
        return TransientError(
            errno.EAGAIN if status == 503 else errno.EIO, text, retry_after_seconds=retry_after_seconds(response)
        )
    known = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT, 413: errno.EFBIG}
    return OSError(known.get(status, errno.EINVAL if status == 400 else errno.EIO), text, path)


def retry_after_seconds(response: httpx.Response) -> float | None:
    """Of the header, where it is a number (RFC 9110, 10.2.3)."""
    try:
        return max(0.0, float(response.headers.get("retry-after", "")))
    except ValueError:
        return None


def range_header(offset: int, size: int | None) -> dict[str, str]:
    """The headers that ask for a part (RFC 9110, 14.2), of the bytes as they are."""
    headers = {"Accept-Encoding": "identity"}
    if offset or size is not None:
        headers["Range"] = f"bytes={offset}-{'' if size is None else offset + size - 1}"
    return headers


async def ranged_body(response: httpx.Response, offset: int, size: int | None) -> AsyncGenerator[bytes, None]:
    """The wanted part of an answer, whether the service gave just that (206) or everything (200)."""
    if response.status_code == 416:
        return
    skip = 0 if response.status_code == 206 else offset
    left = size
    with transport_errors():
        async for data in response.aiter_bytes(PIECE_BYTES):
            piece = data[skip:]
            skip -= len(data) - len(piece)
            if left is not None:
                piece = piece[:left]
                left -= len(piece)
            if piece:
                yield piece
            if left == 0:
                return


async def read_on(
    part: Callable[[int, int | None], AsyncGenerator[bytes, None]],
    still: Callable[[], Awaitable[None]],
    offset: int,
    size: int | None,
) -> AsyncGenerator[bytes, None]:
    """A range, over cut connections. `part(offset, size)` makes one attempt and raises `TransientError`; `still` raises
    if the content is not certainly the one that the read began with. It is asked before and after each part but the
    first, so that what is given is never of two versions."""
    position, cuts, torn = offset, 0, False
    while True:
        left = None if size is None else offset + size - position
        if left == 0:
            break
        try:
            async with aclosing(part(position, left)) as pieces:
                async for piece in pieces:
                    position += len(piece)
                    yield piece
            break
        except TransientError as cut:
            cuts += 1
            if cuts > _RESUMES:
                raise cut.error from None
            await asyncio.sleep(pause_seconds(cuts - 1, cut.retry_after_seconds))
            torn = position > offset
            if torn:
                await still()
    if torn:
        await still()
