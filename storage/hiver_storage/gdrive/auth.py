"""Credentials of Drive: PyDrive2's `GoogleAuth`, with refreshing that many threads can share.

Refreshed tokens are kept in memory alone.
"""

from __future__ import annotations

import errno
import http.client
import json
import threading
from collections.abc import Mapping
from typing import Any, Final

import httplib2
from oauth2client.client import AccessTokenRefreshError, OAuth2Credentials
from oauth2client.service_account import ServiceAccountCredentials
from pydrive2.auth import GoogleAuth

from hiver_storage.retrying import TransientError
from hiverd.contracts.errors import InvalidError

_SCOPE: Final = "https://www.googleapis.com/auth/drive"
_TIMEOUT_SECONDS: Final = 60


class Auth(GoogleAuth):  # type: ignore[misc]  # the library has no types
    """Made of a mount's configuration. Raises `InvalidError` naming the member."""

    def __init__(self, config: Mapping[str, Any], token_url: str) -> None:
        super().__init__(settings_file=None, http_timeout=_TIMEOUT_SECONDS)  # no file of the working directory
        self._renewing = threading.Lock()
        account = text(config, "gdrive_service_account_json")
        self.credentials = _service_account(account, token_url) if account else _user(config, token_url)
        self._can_renew = bool(account or self.credentials.refresh_token)

    def __repr__(self) -> str:
        return "<Auth>"

    def Get_Http_Object(self) -> AuthorizedHttp:  # noqa: N802 -- the library's name
        """A connection for one thread: httplib2's are not to be shared."""
        return AuthorizedHttp(self, self._build_http())

    def token(self, http: httplib2.Http) -> str:
        """One that has not expired as far as is known."""
        token = self.credentials.access_token
        if not token or self.credentials.access_token_expired:
            return self.renewed(token, http)
        return str(token)

    def renewed(self, refused: str | None, http: httplib2.Http) -> str:
        """Another token than `refused`: of all threads that ask, one fetches it. Raises `PermissionError`."""
        with self._renewing:
            if self.credentials.access_token == refused or not self.credentials.access_token:
                self._renew(http)
            return str(self.credentials.access_token)

    def _renew(self, http: httplib2.Http) -> None:
        if not self._can_renew:
            raise PermissionError(errno.EACCES, "Drive refuses the access token, and there is none to refresh it with")
        try:
            self.credentials.refresh(http)
        except AccessTokenRefreshError as error:
            status = int(getattr(error, "status", None) or 400)
            if status == 429 or status >= 500:
                raise TransientError(errno.EAGAIN, f"Google's token service answers {status}", done=False) from None
            raise PermissionError(errno.EACCES, "Google refuses to refresh the access token") from None
        except (KeyError, ValueError):
            raise TransientError(errno.EIO, "Google's token service gave no token", done=False) from None
        except (OSError, httplib2.HttpLib2Error, http_client_error):
            raise TransientError(errno.EHOSTUNREACH, "Google's token service cannot be reached", done=False) from None


http_client_error: Final = http.client.HTTPException


class AuthorizedHttp:
    """What googleapiclient sends requests with: one of httplib2, with a token, that asks again once after a 401."""

    def __init__(self, auth: Auth, http: httplib2.Http) -> None:
        self._auth = auth
        self._http = http

    def request(
        self, uri: str, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None, **options: Any
    ) -> tuple[httplib2.Response, bytes]:
        token = self._auth.token(self._http)
        response, content = self._send(token, uri, method, body, headers, options)
        if response.status == 401:
            token = self._auth.renewed(token, self._http)
            response, content = self._send(token, uri, method, body, headers, options)
        return response, content

    def _send(
        self, token: str, uri: str, method: str, body: Any, headers: Mapping[str, str] | None, options: dict[str, Any]
    ) -> tuple[httplib2.Response, bytes]:
        sent = {**(headers or {}), "Authorization": f"Bearer {token}"}
        response, content = self._http.request(uri, method=method, body=body, headers=sent, **options)
        return response, content

    def close(self) -> None:
        self._http.close()


def text(config: Mapping[str, Any], member: str) -> str:
    """A member that is a string or absent; absent and empty are the same (PROTOCOL 4.2)."""
    value = config.get(member)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidError(f"{member} must be a string", field=member)
    return value


def _user(config: Mapping[str, Any], token_url: str) -> OAuth2Credentials:
    access, refresh, client, secret = (
        text(config, f"gdrive_{name}") for name in ("access_token", "refresh_token", "client_id", "client_secret")
    )
    if refresh and not client:
        raise InvalidError(
            "backend gdrive: gdrive_client_id is required with gdrive_refresh_token", field="gdrive_client_id"
        )
    if not access and not refresh:
        raise InvalidError(
            "backend gdrive: gdrive_access_token or gdrive_service_account_json is required",
            field="gdrive_access_token",
        )
    for member in ("gdrive_access_token", "gdrive_refresh_token"):
        if not text(config, member).isascii() or not text(config, member).isprintable():
            raise InvalidError(f"{member} is no token", field=member)
    return OAuth2Credentials(access or None, client, secret, refresh or None, None, token_url, "hiver")


def _service_account(document: str, token_url: str) -> ServiceAccountCredentials:
    """`token_url` and not the document's: a caller does not choose where this server sends requests."""
    try:
        key = json.loads(document)
        if not isinstance(key, dict):
            raise TypeError
        return ServiceAccountCredentials.from_json_keyfile_dict(key, scopes=[_SCOPE], token_uri=token_url)
    except Exception:  # noqa: BLE001 -- what a bad key raises depends on the installed cryptography; it may quote it
        raise InvalidError(
            "gdrive_service_account_json must be a service account's key, a JSON object as Google gives it",
            field="gdrive_service_account_json",
        ) from None
