"""What goes wrong at a service, as the contract's errors, and what is tried again.

Texts are made here of a status and a service's short code alone: neither a URL nor a header nor a library's own text,
any of which can hold a credential, is ever repeated.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, TypeVar

import aiohttp

from hiverd.contracts.filesystem import VersionConflictError

T = TypeVar("T")

log: Final = logging.getLogger(__name__)

TRANSIENT: Final = frozenset({errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EIO})
"""A later attempt may succeed (contract `FileSystem`)."""

_NUMBERS: Final = {
    400: errno.EINVAL,
    401: errno.EACCES,
    403: errno.EACCES,
    404: errno.ENOENT,
    408: errno.ETIMEDOUT,
    409: errno.EAGAIN,
    413: errno.EFBIG,
    429: errno.EAGAIN,
    503: errno.EAGAIN,
    504: errno.ETIMEDOUT,
}


class Patience(NamedTuple):
    """How often a request is repeated that failed in a way that may pass."""

    attempts: int = 5
    first_seconds: float = 0.25
    """The first pause; each is twice the one before, and a random part of it less."""
    deadline_seconds: float = 10.0
    """After that, nothing is begun again."""
    request_seconds: float = 60.0
    """For one attempt, whatever its library waits for."""


def of_status(status: int, code: str = "") -> OSError:
    """An answer that is no success. `code` is the service's own word for it, as `SlowDown`."""
    word = re.sub(r"[^A-Za-z0-9_.-]", "", code)[:64]
    text = f"the service answered {status} {word}".rstrip()
    if status == 412:
        return VersionConflictError(errno.EEXIST, text)
    default = errno.EIO if status >= 500 else errno.EINVAL
    return OSError(_NUMBERS.get(status, default), text)


def of_connection(error: BaseException) -> OSError:
    """No answer, or not all of it. What kind of error it was is told, its text is not."""
    if isinstance(error, TimeoutError):
        return OSError(errno.ETIMEDOUT, "the service did not answer in time")
    number = error.errno if isinstance(error, OSError) and error.errno in TRANSIENT else errno.ECONNRESET
    return OSError(number, f"the connection to the service failed ({type(error).__name__})")


def of_transport(error: Exception) -> OSError | None:
    """What all the libraries let through: errors of aiohttp and the system, and the contract's own."""
    if isinstance(error, aiohttp.ClientError):
        return of_connection(error)
    if isinstance(error, TimeoutError | ConnectionError) and error.errno not in TRANSIENT:
        return of_connection(error)
    return error if isinstance(error, OSError) and error.errno is not None else None


def quieten(*libraries: str) -> None:
    """Keeps libraries from logging requests: they show headers and URLs."""
    for library in libraries:
        logging.getLogger(library).setLevel(logging.WARNING)


async def persist(
    patience: Patience, translate: Callable[[Exception], OSError | None], call: Callable[[], Awaitable[T]]
) -> T:
    """Awaits `call()`, again and again while it fails in a way that may pass.

    `translate` makes an error of a library the contract's, or None if it is not about the service. What is raised in
    the end has no cause: a library's error shows URLs and headers.
    """
    began_monotonic = time.monotonic()
    for attempt in itertools.count(1):
        try:
            async with asyncio.timeout(patience.request_seconds):
                return await call()
        except Exception as error:
            failure = translate(error)
            if failure is None:
                raise
        pause = patience.first_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1)  # noqa: S311 -- not a secret
        late = time.monotonic() + pause - began_monotonic > patience.deadline_seconds
        if failure.errno not in TRANSIENT or late or attempt >= patience.attempts:
            raise failure
        log.debug("attempt %d: %s", attempt, failure)
        await asyncio.sleep(pause)
    raise AssertionError("unreachable")
