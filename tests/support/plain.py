"""HTTP clients that never speak TLS. They are spared from reading the world's authorities, which takes each client of
httpx some 40 ms of a core: longer than most of what the tests do with it."""

from __future__ import annotations

import ssl
from typing import Any, Final

import httpx

NOBODY: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts no authority."""


def plain_client(**options: Any) -> httpx.AsyncClient:
    """`httpx.AsyncClient` for `http://` alone."""
    return httpx.AsyncClient(verify=NOBODY, **options)
