"""Requests of the `external` contract (PROTOCOL 6.4): one server, repeated while that may help."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx

from hiverd.contracts.errors import InvalidError
from hiverd.contracts.filesystem import Info

from .names import split
from .retrying import Patience, error
from .web import failure, make_client, transport_errors


class Service:
    """`host` is the base URL. Raises `InvalidError` naming the member."""

    def __init__(self, host: object) -> None:
        self._base, self._auth = _parse_host(host)
        self.patience = Patience()

    def __repr__(self) -> str:
        return "<Service>"

    def open(self) -> None:
        self.client = make_client(self._auth)
        self.transfers = make_client(self._auth)

    async def close(self) -> None:
        await self.client.aclose()
        await self.transfers.aclose()

    def request(
        self, method: str, call: str, path: str | None = None, *, client: httpx.AsyncClient, **options: Any
    ) -> httpx.Request:
        query = "" if path is None else f"?path={quote(path, safe='/')}"
        return client.build_request(method, f"{self._base}/v1/{call}{query}", **options)

    async def ask(self, method: str, call: str, path: str | None = None, **options: Any) -> httpx.Response:
        """Repeated where another attempt may help. Any 2xx, or 404; `OSError` for the rest."""

        async def attempt() -> httpx.Response:
            request = self.request(method, call, path, client=self.client, **options)
            with transport_errors():
                response = await self.client.send(request)
            if response.is_success or response.status_code == 404:
                return response
            raise failure(response, path or "")

        return await self.patience.repeat(attempt)

    async def change(
        self, method: str, call: str, path: str | None = None, *, missing_ok: bool = False, **options: Any
    ) -> httpx.Response:
        response = await self.ask(method, call, path, **options)
        if response.status_code == 404 and method != "DELETE" and not missing_ok:
            raise error(errno.ENOENT, path or "")
        return response


def _parse_host(host: object) -> tuple[str, httpx.BasicAuth | None]:
    """The base URL without credentials, and those."""
    if not isinstance(host, str) or not host:
        raise InvalidError("backend external: host is required", field="host")
    try:
        parts = urlsplit(host)
        netloc = parts.netloc.rpartition("@")[2]
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
        _ = parts.port
        base = httpx.URL(f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}") if usable else None
    except (ValueError, httpx.InvalidURL):
        base = None
    if base is None:
        # The text is not repeated: it may hold a password.
        raise InvalidError("host must be a URL like https://host/path", field="host")
    auth = None
    if parts.username is not None or parts.password is not None:
        auth = httpx.BasicAuth(unquote(parts.username or ""), unquote(parts.password or ""))
    return str(base).rstrip("/"), auth


def json_of(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise OSError(errno.EIO, "the service's answer is no JSON object")
    return body


def info_of(entry: Mapping[str, Any], path: str | None = None) -> Info:
    """`OSError` EIO for what is not as PROTOCOL 6.4 says. `path` is the one that was asked for."""
    try:
        shown = path or "/" + "/".join(split(str(entry["path"])))
        size, changed = int(entry.get("size") or 0), str(entry["mtime"])
        mtime = datetime.fromisoformat(changed)
        mtime = mtime if mtime.tzinfo else mtime.replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError, OSError):
        raise OSError(errno.EIO, "the service described an entry in a way that is not understood") from None
    if entry.get("is_dir"):
        return Info(shown, 0, mtime, is_dir=True)
    target = entry.get("link_target")
    if target is None and not entry.get("symlink"):
        return Info(shown, size, mtime, is_dir=False, version=f"{changed}-{size}")
    target = str(target or "")
    return Info(shown, 0, mtime, is_dir=False, link_target=target, version=f"{changed}-link-{target}")
