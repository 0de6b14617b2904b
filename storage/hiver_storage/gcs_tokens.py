"""Access tokens for Google Cloud Storage."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import google.auth
import requests
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.auth.transport.requests import Request
from google.oauth2 import service_account

from hiverd.contracts.errors import InvalidError

_SCOPES: Final = ("https://www.googleapis.com/auth/devstorage.read_write",)
_SECONDS: Final = 10
_MEMBER: Final = "gcs_service_account_json"


def credentials_of(text: str | None) -> Any:
    """Of a service account's key file; None if there is no text. Other kinds of credentials, which can name programs to
    run and files to read, are refused. Raises InvalidError, without repeating any of the text."""
    if text is None:
        return None
    try:
        document = json.loads(text)
    except ValueError:
        raise InvalidError(f"{_MEMBER} is not JSON", field=_MEMBER) from None
    if not isinstance(document, dict) or document.get("type") != "service_account":
        raise InvalidError(f"{_MEMBER} is not the key of a service account", field=_MEMBER)
    try:
        return service_account.Credentials.from_service_account_info(document, scopes=_SCOPES)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, AttributeError, GoogleAuthError):
        raise InvalidError(f"{_MEMBER} holds no usable key", field=_MEMBER) from None


class Tokens:
    """One token at a time, fetched in a thread: the library's way of doing it blocks."""

    def __init__(self, credentials: Any, *, anonymous: bool) -> None:
        """Without credentials the host's own are used (application default credentials), or none if `anonymous`."""
        self._credentials = AnonymousCredentials() if credentials is None and anonymous else credentials  # type: ignore[no-untyped-call]
        self._lock = asyncio.Lock()
        self._refused: str | None = None

    async def header(self) -> Mapping[str, str]:
        """With a token that is good for some minutes. Raises OSError."""
        async with self._lock:
            credentials = self._credentials
            if credentials is None or not credentials.valid or credentials.token == self._refused:
                credentials = await asyncio.to_thread(_refreshed, credentials)
            self._credentials = credentials
        return {"Authorization": f"Bearer {credentials.token}"} if credentials.token else {}

    def refuse(self, header: Mapping[str, str]) -> bool:
        """The service did not accept this token. True if asking for another makes sense."""
        token = header.get("Authorization", "").removeprefix("Bearer ")
        self._refused = token
        return bool(token)


def _refreshed(credentials: Any) -> Any:
    with requests.Session() as session:
        request: Any = partial(Request(session), timeout=_SECONDS)
        try:
            if credentials is None:
                credentials, _ = google.auth.default(scopes=_SCOPES, request=request)
            credentials.refresh(request)
        except DefaultCredentialsError:
            raise PermissionError(
                errno.EACCES, f"{_MEMBER} is not given, and this host has no credentials of its own"
            ) from None
        except TransportError:
            raise ConnectionResetError(errno.ECONNRESET, "no token could be fetched: the connection failed") from None
        except GoogleAuthError as error:
            if error.retryable:
                raise OSError(errno.EAGAIN, "no token could be fetched now") from None
            raise PermissionError(errno.EACCES, "no token was given for these credentials") from None
    return credentials
