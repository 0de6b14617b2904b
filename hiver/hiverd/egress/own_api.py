"""This server's own API as sandboxes reach it: by the names `gateway` and `gateway.hiver`, on any port (PROTOCOL 4.5).

The names are known to the proxy alone, and the API never sees them: a request comes to it with the Host of a program on
this machine. So the API need not answer to a name that somebody else's resolver could give to a page in a browser.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final, NamedTuple

GATEWAY_NAME: Final = "gateway"
GATEWAY_NAMES: Final = frozenset((GATEWAY_NAME, "gateway.hiver"))


class OwnApi(NamedTuple):
    """Where the API is dialled, and what the Host field says."""

    host: str
    port: int

    @property
    def authority(self) -> str:
        return f"localhost:{self.port}"


def own_api(listen_host: str, port: int) -> OwnApi:
    """From what the server listens on: every address means loopback."""
    try:
        address = ip_address(listen_host)
    except ValueError:
        return OwnApi(listen_host, port)
    if not address.is_unspecified:
        return OwnApi(listen_host, port)
    return OwnApi("127.0.0.1" if address.version == 4 else "::1", port)
