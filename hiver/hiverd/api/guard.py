"""Keeps web pages from driving the API through the user's browser.

Two ways in are closed. A page may post to http://localhost:10000 directly: its requests carry an `Origin` or
`Sec-Fetch-Site` header, which no other client sends. A page may have its own name resolve to 127.0.0.1 (DNS
rebinding): its requests carry a foreign `Host`. Proxied ports are not guarded, they exist for browsers; but what they
serve shares our origin, so our own origin is no excuse either.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from litestar.types import Scope

from hiverd.contracts.errors import ForbiddenError

LOCAL_NAMES: Final = frozenset({"localhost", "host.docker.internal"})
_NOT_A_PAGE: Final = frozenset({"none"})


class BrowserGuard:
    """`allowed_hosts`: names under which the server is known besides IP addresses and localhost; `allowed_origins`:
    web origins (`https://console.example`) whose pages may use the API."""

    def __init__(self, allowed_hosts: Iterable[str], allowed_origins: Iterable[str]) -> None:
        self._hosts = LOCAL_NAMES | {name.lower() for name in allowed_hosts}
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)

    def check(self, scope: Scope) -> None:
        """Raises `ForbiddenError` with the remedy."""
        host = origin = site = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
        self._check_host(host)
        if origin is not None:
            self._check_origin(origin.decode("latin-1"))
        elif site is not None and site.decode("latin-1").lower() not in _NOT_A_PAGE:
            raise ForbiddenError("requests of web pages are refused; list the page's origin in server.allowed_origins")

    def _check_host(self, host: bytes | None) -> None:
        if host is None:
            return
        name = _host_name(host.decode("latin-1"))
        if name not in self._hosts and not _is_address(name):
            raise ForbiddenError(f'this server does not answer to the host "{name}"; list it in server.allowed_hosts')

    def _check_origin(self, origin: str) -> None:
        if origin.lower().rstrip("/") not in self._origins:
            raise ForbiddenError(f'requests of pages from "{origin}" are refused; list it in server.allowed_origins')


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _is_address(name: str) -> bool:
    # A literal address cannot be rebound: the browser went where the page's author wrote, and then sends an Origin.
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
