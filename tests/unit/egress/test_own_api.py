"""Where the server's own API is dialled for sandboxes."""

from __future__ import annotations

import pytest

from hiverd.egress.own_api import own_api


@pytest.mark.parametrize(
    ("listens_on", "dialled"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "::1"),
        ("192.0.2.7", "192.0.2.7"),
        ("localhost", "localhost"),
    ],
)
def test_every_address_means_loopback(listens_on: str, dialled: str) -> None:
    api = own_api(listens_on, 10000)
    assert (api.host, api.port, api.authority) == (dialled, 10000, "localhost:10000")
