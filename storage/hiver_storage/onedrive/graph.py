"""Requests to Microsoft Graph, repeated while that may help.

The environment variables HIVE_ONEDRIVE_API_URL and HIVE_ONEDRIVE_TOKEN_URL name other addresses than Microsoft's, for
tests and for proxies of the operator's own.

Addresses that Graph gives for downloads and uploads are credentials, of other hosts: the token is never sent there, and
they are in no message.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, Final

import httpx

from hiver_storage.retrying import Patience, TransientError
from hiver_storage.web import CONNECTIONS, failure, make_client, transport_errors
from hiverd.contracts.errors import InvalidError

from .auth import Tokens, text
from .naming import SELECT, Item, parse, quoted

_PAGE: Final = 999


class Graph:
    """A drive, by OneDrive's own names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.patience = Patience()
        self._tokens = Tokens(config)
        self._base = (os.environ.get("HIVE_ONEDRIVE_API_URL") or "https://graph.microsoft.com/v1.0").rstrip("/")
        drive_id = text(config, "onedrive_drive_id")
        if drive_id and not re.fullmatch(r"[A-Za-z0-9!_.-]+", drive_id):
            raise InvalidError("onedrive_drive_id must be the id of a drive", field="onedrive_drive_id")
        self._drive = f"{self._base}/drives/{drive_id}" if drive_id else f"{self._base}/me/drive"

    def __repr__(self) -> str:
        return "<Graph>"

    def open(self) -> None:
        self._client = make_client()
        self.transfers = make_client()
        self._gate = asyncio.Semaphore(CONNECTIONS)

    async def close(self) -> None:
        await self._client.aclose()
        await self.transfers.aclose()

    # -- items --------------------------------------------------------------------------------------------------------

    def url(self, names: Sequence[str], relation: str = "") -> str:
        """Of an item by its path, or of something of it (`children`, `content`)."""
        if not names:
            return f"{self._drive}/root" + (f"/{relation}" if relation else "")
        return f"{self._drive}/root:/{quoted(names)}" + (f":/{relation}" if relation else "")

    async def item(self, names: Sequence[str], *, to_read: bool = False) -> Item | None:
        """What is there, or None."""
        select = f"{SELECT},@microsoft.graph.downloadUrl" if to_read else SELECT
        response = await self.ask("GET", self.url(names), params={"$select": select}, also=(404,))
        return None if response.status_code == 404 else parse(body(response))

    async def children(self, names: Sequence[str], *, at_most: int = _PAGE) -> AsyncIterator[Item]:
        """Page by page. Raises FileNotFoundError."""
        url: str | None = self.url(names, "children")
        params: dict[str, Any] | None = {"$top": at_most, "$select": SELECT}
        while url:
            page = body(await self.ask("GET", url, params=params))
            for resource in page.get("value", ()):
                yield parse(resource)
            url, params = page.get("@odata.nextLink"), None
            if url and not self._is_ours(url):
                raise OSError(errno.EIO, "OneDrive named an address for the next page that is not its own")

    def _is_ours(self, url: str) -> bool:
        return url.startswith(f"{self._base}/")

    async def remove(self, names: Sequence[str]) -> None:
        """Into the recycle bin. What is not there is a success."""
        await self.ask("DELETE", self.url(names), also=(404,))

    async def change(self, item: Item, changes: Mapping[str, Any], *, also: Collection[int] = ()) -> httpx.Response:
        """By id, so that a repeated request finds it where the first has put it."""
        return await self.ask("PATCH", f"{self._drive}/items/{item.id}", json=changes, also=also)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def ask(self, method: str, url: str, *, also: Collection[int] = (), **options: Any) -> httpx.Response:
        """Repeated where another attempt may help. Any 2xx, or a status of `also`; `OSError` for the rest."""
        return await self.patience.repeat(lambda: self.once(method, url, also=also, **options))

    async def once(self, method: str, url: str, *, also: Collection[int] = (), **options: Any) -> httpx.Response:
        """One attempt; raises `TransientError` too. A token that is refused is refreshed once."""
        async with self._gate:
            token = await self._tokens.current(self._client)
            response = await self._send(token, method, url, options)
            if response.status_code == 401:
                token = await self._tokens.renewed(token, self._client)
                response = await self._send(token, method, url, options)
        if response.is_success or response.status_code in also:
            return response
        raise failure(response, "")

    async def _send(self, token: str, method: str, url: str, options: dict[str, Any]) -> httpx.Response:
        headers = {**options.get("headers", {}), "Authorization": f"Bearer {token}"}
        with transport_errors():
            return await self._client.request(method, url, **{**options, "headers": headers})

    async def transfer(self, method: str, url: str, **options: Any) -> httpx.Response:
        """One attempt at an address that Graph gave, without the token."""
        with transport_errors():
            return await self.transfers.request(method, url, **options)


def body(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise TransientError(errno.EIO, "OneDrive's answer is no JSON object").error
    return answer
