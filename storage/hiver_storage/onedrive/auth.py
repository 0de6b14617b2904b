"""Tokens for Microsoft Graph. Those that are refreshed are kept in memory alone."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import httpx

from hiver_storage.retrying import TransientError
from hiver_storage.web import failure, transport_errors
from hiverd.contracts.errors import InvalidError


class Tokens:
    """Made of a mount's configuration. Raises `InvalidError` naming the member."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._access = _token(config, "onedrive_access_token")
        self._refresh = _token(config, "onedrive_refresh_token")
        self._client = text(config, "onedrive_client_id")
        self._secret = text(config, "onedrive_client_secret")
        tenant = text(config, "onedrive_tenant") or "common"
        if not re.fullmatch(r"[A-Za-z0-9.-]+", tenant):
            raise InvalidError("onedrive_tenant must be a name or an id", field="onedrive_tenant")
        if not self._access and not self._refresh:
            raise InvalidError("backend onedrive: onedrive_access_token is required", field="onedrive_access_token")
        if self._refresh and not self._client:
            raise InvalidError(
                "backend onedrive: onedrive_client_id is required with onedrive_refresh_token",
                field="onedrive_client_id",
            )
        base = os.environ.get("HIVE_ONEDRIVE_TOKEN_URL") or "https://login.microsoftonline.com"
        self._url = f"{base.rstrip('/')}/{tenant}/oauth2/v2.0/token"
        self._good_until_monotonic: float | None = None
        self._renewing = asyncio.Lock()

    def __repr__(self) -> str:
        return "<Tokens>"

    async def current(self, client: httpx.AsyncClient) -> str:
        """One that has not expired as far as is known."""
        expired = self._good_until_monotonic is not None and time.monotonic() > self._good_until_monotonic
        if not self._access or expired:
            return await self.renewed(self._access, client)
        return self._access

    async def renewed(self, refused: str, client: httpx.AsyncClient) -> str:
        """Another one than `refused`: of all that ask at once, one fetches it. Raises `PermissionError`."""
        async with self._renewing:
            if self._access == refused:
                await self._renew(client)
            return self._access

    async def _renew(self, client: httpx.AsyncClient) -> None:
        if not self._refresh:
            raise PermissionError(
                errno.EACCES, "OneDrive refuses the access token, and there is none to refresh it with"
            )
        form = {"grant_type": "refresh_token", "client_id": self._client, "refresh_token": self._refresh}
        if self._secret:
            form["client_secret"] = self._secret
        with transport_errors():
            response = await client.post(self._url, data=form)
        if response.status_code in (400, 401, 403):
            raise PermissionError(errno.EACCES, "Microsoft refuses to refresh the access token")
        if not response.is_success:
            raise failure(response, "")
        self._take(response)

    def _take(self, response: httpx.Response) -> None:
        try:
            answer = response.json()
            access = str(answer["access_token"])
            lifetime_seconds = float(answer.get("expires_in") or 0)
            self._refresh = str(answer.get("refresh_token") or self._refresh)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TransientError(errno.EIO, "Microsoft's token service gave no token", done=False) from None
        self._access = access
        self._good_until_monotonic = time.monotonic() + lifetime_seconds - 60 if lifetime_seconds > 120 else None


def text(config: Mapping[str, Any], member: str) -> str:
    """A member that is a string or absent; absent and empty are the same (PROTOCOL 4.2)."""
    value = config.get(member)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidError(f"{member} must be a string", field=member)
    return value


def _token(config: Mapping[str, Any], member: str) -> str:
    token = text(config, member)
    if not token.isascii() or not token.isprintable():
        raise InvalidError(f"{member} is no token", field=member)  # a header cannot hold it
    return token
