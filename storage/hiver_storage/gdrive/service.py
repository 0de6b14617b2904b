"""Requests to Drive: googleapiclient in threads, repeated while that may help.

The environment variables HIVE_GDRIVE_API_URL and HIVE_GDRIVE_TOKEN_URL name other addresses than Google's, for tests
and for proxies of the operator's own.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

import httplib2
from googleapiclient.discovery import build_from_document
from googleapiclient.discovery_cache import get_static_doc
from googleapiclient.errors import Error as ApiError
from googleapiclient.errors import HttpError
from oauth2client import GOOGLE_TOKEN_URI

from hiver_storage.retrying import Patience, TransientError

from .auth import Auth, AuthorizedHttp

T = TypeVar("T")

THREADS: Final = 12
_BUSY: Final = frozenset({"rateLimitExceeded", "userRateLimitExceeded", "sharingRateLimitExceeded"})
_NUMBERS: Final = {400: errno.EINVAL, 404: errno.ENOENT, 409: errno.EEXIST, 410: errno.ENOENT}
_FULL: Final = frozenset({"storageQuotaExceeded", "teamDriveFileLimitExceeded", "numChildrenInNonRootLimitExceeded"})

# They log addresses of upload sessions, which are credentials, and what the service says.
for _name in ("googleapiclient", "googleapiclient.http", "googleapiclient.discovery", "oauth2client"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def token_url() -> str:
    return os.environ.get("HIVE_GDRIVE_TOKEN_URL") or str(GOOGLE_TOKEN_URI)


def _document() -> dict[str, Any]:
    """Drive's description of itself, as it comes with the library."""
    document: dict[str, Any] = json.loads(get_static_doc("drive", "v3"))
    url = os.environ.get("HIVE_GDRIVE_API_URL")
    if url:
        document["rootUrl"] = url.rstrip("/") + "/"
        document["baseUrl"] = document["rootUrl"] + document["servicePath"]
        document.pop("mtlsRootUrl", None)
    return document


class Service:
    """A bounded pool of threads, each with a connection."""

    def __init__(self, auth: Auth) -> None:
        self.patience = Patience()
        self._auth = auth
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="gdrive")
        self._local = threading.local()
        self._connections: set[AuthorizedHttp] = set()
        self._building = threading.Lock()
        self._api: Any = None

    def __repr__(self) -> str:
        return "<Service>"

    async def call(self, make: Callable[[Any], Any], *, headers: dict[str, str] | None = None) -> Any:
        """The answer to the request that `make` builds of the API's root. Raises `OSError`, `HttpError` never."""
        return await self.patience.repeat(lambda: self.once(make, headers=headers))

    async def once(self, make: Callable[[Any], Any], *, headers: dict[str, str] | None = None) -> Any:
        """One attempt; raises `TransientError` too."""

        def work(connection: AuthorizedHttp) -> Any:
            request = make(self.api())
            request.headers.update(headers or {})
            return request.execute(http=connection)

        return await self.run(work)

    async def run(self, work: Callable[[AuthorizedHttp], T]) -> T:
        """In a thread, with its connection."""

        def in_thread() -> T:
            try:
                with _api_errors():
                    return work(self._connection())
            except BaseException:
                self._drop_connection()  # what is left of an answer must not be taken for the next one
                raise

        return await asyncio.get_running_loop().run_in_executor(self._pool, in_thread)

    def api(self) -> Any:
        """The root of the API. In a thread: making it takes a moment."""
        with self._building:
            if self._api is None:
                self._api = build_from_document(_document(), http=httplib2.Http())
                self._auth.service = self._api
            return self._api

    def _connection(self) -> AuthorizedHttp:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._auth.Get_Http_Object()
            self._connections.add(connection)
        return connection

    def _drop_connection(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            self._local.connection = None
            self._connections.discard(connection)
            with suppress(OSError):
                connection.close()

    async def close(self) -> None:
        """Waits for what is under way, at most as long as one request may take."""
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
        for connection in self._connections:
            connection.close()
        if self._api is not None:
            self._api.close()


@contextmanager
def _api_errors() -> Iterator[None]:
    """Errors of the libraries as ours, without their texts: those hold addresses and answers."""
    try:
        yield
    except TransientError:
        raise
    except HttpError as error:
        raise _meaning(error) from None
    except TimeoutError:
        raise TransientError(errno.ETIMEDOUT, "Drive does not answer in time") from None
    except (ConnectionRefusedError, httplib2.ServerNotFoundError):
        raise TransientError(errno.EHOSTUNREACH, "Drive cannot be reached", done=False) from None
    except PermissionError:
        raise
    except (ConnectionError, http.client.HTTPException, httplib2.HttpLib2Error):
        raise TransientError(errno.ECONNRESET, "the connection to Drive was cut") from None
    except OSError:
        raise TransientError(errno.EIO, "the connection to Drive failed") from None
    except (ApiError, ValueError):
        raise TransientError(errno.EIO, "Drive's answer is not understood") from None


class RangeError(OSError):
    """There is nothing in the asked range."""


def _meaning(error: HttpError) -> Exception:
    status, reason = int(error.resp.status), _reason(error)
    text = f"Drive answers {status}" + (f" ({reason})" if reason else "")
    if status == 429 or (status == 403 and reason in _BUSY):
        return TransientError(errno.EAGAIN, text, retry_after_seconds=_retry_after(error), done=False)
    if status in (408, 500, 502, 503, 504):
        return TransientError(errno.EIO, text, retry_after_seconds=_retry_after(error))
    if status == 403 and reason in _FULL:
        return OSError(errno.ENOSPC, text)
    if status in (401, 403):
        return PermissionError(errno.EACCES, text)
    if status == 416:
        return RangeError(errno.EINVAL, text)
    return OSError(_NUMBERS.get(status, errno.EIO), text)


def _reason(error: HttpError) -> str:
    """The first of `error.errors[].reason`, a word; the rest is not repeated."""
    try:
        reason = json.loads(error.content)["error"]["errors"][0]["reason"]
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return reason if isinstance(reason, str) and reason.isalnum() else ""


def _retry_after(error: HttpError) -> float | None:
    with suppress(ValueError):
        return max(0.0, float(error.resp.get("retry-after", "")))
    return None
