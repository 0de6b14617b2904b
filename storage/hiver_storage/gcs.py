"""The backend `gcs`: a bucket of Google Cloud Storage (PROTOCOL 4.2).

Versions are generations, conditions are `ifGenerationMatch`. What is asked for goes through the session that gcsfs
makes, in the JSON API's own terms: gcsfs has neither conditions nor listings by page. `STORAGE_EMULATOR_HOST` in the
environment of the server names another service, as it does for gcsfs.
"""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any, ClassVar, Final
from urllib.parse import quote, urlencode

import aiohttp
from gcsfs.core import GCSFileSystem
from yarl import URL

from hiverd.contracts.filesystem import ABSENT

from .failures import of_status, of_transport, quieten
from .gcs_tokens import Tokens, credentials_of
from .keys import decode_target, optional, prefix_of, required
from .names import UNDECODABLE, Names
from .object_files import PARALLEL, ObjectFileSystem
from .object_store import LINK, WRITE, Body, Page, Store, Stored, Upload

_PART_BYTES: Final = 8 << 20
"""A multiple of 256 KiB, as resumable uploads want it."""
_PIECE_BYTES: Final = 1 << 20
_NAMES: Final = Names(UNDECODABLE + "\r\n")
_MEMBERS: Final = "name,size,updated,generation,metadata"
_PLAIN: Final = {"Accept-Encoding": "identity"}
_AS_STORED: Final = {"Accept-Encoding": "gzip"}
"""An object that is stored with `Content-Encoding: gzip` is sent as it is, and not unpacked on the way."""
_LIMITED: Final = frozenset({"rateLimitExceeded", "userRateLimitExceeded"})


class GcsFileSystem(ObjectFileSystem):
    """`gcs_bucket` is required. Without `gcs_service_account_json` the host's own credentials are used."""

    backend: ClassVar[str] = "gcs"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, GcsStore(config), prefix_of(config, "gcs_prefix"), _NAMES)


class GcsError(Exception):
    """An answer that is no success; `reason` is the service's word."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


class GcsStore(Store):
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._bucket = quote(required(config, "gcs_bucket"), safe="")
        credentials = credentials_of(optional(config, "gcs_service_account_json"))
        self._tokens = Tokens(credentials, anonymous=bool(os.environ.get("STORAGE_EMULATOR_HOST")))
        self._files: Any = None
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        quieten("gcsfs", "google", "requests", "urllib3", "fsspec")
        # Not what gcsfs has registered: that asks by gRPC, past STORAGE_EMULATOR_HOST, which kind of bucket it is.
        self._files = GCSFileSystem(
            token="anon",  # noqa: S106 -- not a password: our tokens are added to each request
            asynchronous=True,
            skip_instance_cache=True,
            use_listings_cache=False,
            session_kwargs={
                "auto_decompress": False,
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=30),
                "connector": aiohttp.TCPConnector(limit=2 * PARALLEL),
            },
        )
        self._session = await self._files._set_session()

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def translate(self, error: Exception) -> OSError | None:
        if isinstance(error, GcsError):
            limited = error.status == 403 and error.reason in _LIMITED
            return of_status(429 if limited else error.status, error.reason)
        if isinstance(error, json.JSONDecodeError):
            return of_transport(ConnectionResetError(errno.ECONNRESET, ""))
        return of_transport(error)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _url(self, path: str, *, upload: bool = False, **query: str | None) -> str:
        base = f"{self._files._location}/{'upload/' if upload else ''}storage/v1/b/{self._bucket}/o{path}"
        given = {name: value for name, value in query.items() if value is not None}
        return f"{base}?{urlencode(given, quote_via=quote)}" if given else base

    async def send(
        self,
        method: str,
        url: str,
        *,
        data: bytes = b"",
        headers: Mapping[str, str] = _PLAIN,
        allowed: tuple[int, ...] = (),
    ) -> aiohttp.ClientResponse:
        """An answer whose status is 2xx or allowed; the caller releases it. A token that is not accepted is replaced
        once."""
        assert self._session is not None  # noqa: S101 -- it is open
        for fresh in (False, True):
            token = await self._tokens.header()
            answer = await self._session.request(
                method,
                URL(url, encoded=True),
                data=io.BytesIO(data),
                headers={**_PLAIN, **headers, **token},
                allow_redirects=False,
            )
            if 200 <= answer.status < 300 or answer.status in allowed:
                return answer
            async with answer:
                reason = _reason(await answer.read())
            if answer.status != 401 or fresh or not self._tokens.refuse(token):
                break
        raise GcsError(answer.status, reason)

    async def _ask(
        self, method: str, url: str, *, data: bytes = b"", headers: Mapping[str, str] = _PLAIN
    ) -> dict[str, Any]:
        async with await self.send(method, url, data=data, headers=headers) as answer:
            body = await answer.read()
        document: dict[str, Any] = json.loads(body) if body else {}
        return document

    # -- the store ----------------------------------------------------------------------------------------------------

    def part_bytes(self, size: int) -> int:
        return _PART_BYTES

    async def head(self, key: str) -> Stored:
        return _stored(await self._ask("GET", self._url(_name(key), fields=_MEMBERS)))

    async def page(self, prefix: str, *, flat: bool, after: str | None = None, limit: int | None = None) -> Page:
        answer = await self._ask(
            "GET",
            self._url(
                "",
                prefix=prefix,
                delimiter="/" if flat else None,
                maxResults=str(limit or self.page_keys),
                pageToken=after,
                fields=f"items({_MEMBERS}),prefixes,nextPageToken",
            ),
        )
        objects = [_stored(found) for found in answer.get("items", ())]
        return Page(objects, list(answer.get("prefixes", ())), answer.get("nextPageToken"))

    async def fetch(self, key: str, offset: int, size: int | None, version: str | None) -> Body | None:
        headers = dict(_AS_STORED)
        if offset or size is not None:
            headers["Range"] = f"bytes={offset}-" if size is None else f"bytes={offset}-{offset + size - 1}"
        answer = await self.send(
            "GET", self._url(_name(key), alt="media", generation=version), allowed=(416,), headers=headers
        )
        if answer.status == 416:
            answer.close()
            return None
        return GcsBody(answer)

    async def put(self, key: str, data: bytes, condition: str | None, metadata: Mapping[str, str]) -> Stored:
        boundary = f"hiver-{secrets.token_hex(16)}"
        resource = json.dumps({"name": key, "metadata": dict(metadata)})
        body = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{resource}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode()
        url = self._url("", upload=True, uploadType="multipart", **_condition(condition), fields=_MEMBERS)
        return _stored(
            await self._into_bucket(
                url,
                b"".join([body, data, f"\r\n--{boundary}--".encode()]),
                {"Content-Type": f"multipart/related; boundary={boundary}"},
            )
        )

    async def _into_bucket(self, url: str, data: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        try:
            return await self._ask("POST", url, data=data, headers=headers)
        except GcsError as error:
            raise _without_bucket(error) from None

    async def begin(self, key: str, size: int, condition: str | None, metadata: Mapping[str, str]) -> Upload:
        url = self._url("", upload=True, uploadType="resumable", **_condition(condition), fields=_MEMBERS)
        resource = json.dumps({"name": key, "metadata": dict(metadata)}).encode()
        headers = {"Content-Type": "application/json; charset=UTF-8", "X-Upload-Content-Length": str(size)}
        try:
            answer = await self.send("POST", url, data=resource, headers=headers)
        except GcsError as error:
            raise _without_bucket(error) from None
        async with answer:
            return GcsUpload(self, answer.headers["Location"], size)

    async def copy(self, source: Stored, key: str) -> None:
        path = f"{_name(source.key)}/rewriteTo/b/{self._bucket}/o{_name(key)}"
        token: str | None = None
        while True:
            answer = await self._ask("POST", self._url(path, rewriteToken=token))
            if answer["done"]:
                return
            token = answer["rewriteToken"]

    async def remove(self, key: str) -> None:
        async with await self.send("DELETE", self._url(_name(key)), allowed=(404,)):
            pass


class GcsBody(Body):
    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.version = answer.headers["x-goog-generation"]
        self.size = int(answer.headers["Content-Length"])
        self._answer = answer

    async def pieces(self) -> AsyncIterator[bytes]:
        async for piece in self._answer.content.iter_chunked(_PIECE_BYTES):
            yield piece

    async def close(self) -> None:
        self._answer.close()


class GcsUpload(Upload):
    """A resumable upload. After a part whose fate is not known, the service is asked how much it has."""

    def __init__(self, store: GcsStore, url: str, size: int) -> None:
        self._store = store
        self._url = url
        self._size = size
        self._received = 0
        """By the service, for certain."""
        self._begun: int | None = None
        """Where the part began that is under way."""
        self._stored: Stored | None = None

    async def add(self, data: bytes) -> None:
        if self._begun is None:
            self._begun = self._received
        else:
            await self._send("*", b"")
        done = self._received - self._begun
        while done < len(data) and self._stored is None:
            rest = memoryview(data)[done:]
            await self._send(f"{self._received}-{self._received + len(rest) - 1}", bytes(rest))
            done = self._received - self._begun
        self._begun = None

    async def _send(self, span: str, data: bytes) -> None:
        headers = {"Content-Range": f"bytes {span}/{self._size}"}
        async with await self._store.send("PUT", self._url, data=data, allowed=(308,), headers=headers) as answer:
            body = await answer.read()
        if answer.status == 308:
            self._received = int(answer.headers.get("Range", "bytes=0--1").removeprefix("bytes=0-")) + 1
        else:
            self._stored = _stored(json.loads(body))
            self._received = self._size

    async def finish(self) -> Stored:
        if self._stored is None:
            await self._send("*", b"")
        if self._stored is None:
            raise GcsError(503, "unfinished")
        return self._stored

    async def abort(self) -> None:
        if self._stored is None:
            async with await self._store.send("DELETE", self._url, allowed=(404, 499)):
                pass


def _name(key: str) -> str:
    return "/" + quote(key, safe="")


def _condition(condition: str | None) -> dict[str, str | None]:
    return {"ifGenerationMatch": "0" if condition == ABSENT else condition}


def _stored(found: Mapping[str, Any]) -> Stored:
    metadata = found.get("metadata", {})
    return Stored(
        found["name"],
        int(found["size"]),
        datetime.fromisoformat(found["updated"]),
        str(found["generation"]),
        link_target=decode_target(metadata.get(LINK)),
        write=metadata.get(WRITE),
    )


def _without_bucket(error: GcsError) -> Exception:
    """Nothing but the bucket can be missing when an object is made."""
    return OSError(errno.EIO, "the bucket does not exist") if error.status == 404 else error


def _reason(body: bytes) -> str:
    """The first reason in an error's document."""
    try:
        return str(json.loads(body)["error"]["errors"][0]["reason"])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
