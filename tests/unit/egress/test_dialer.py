"""What is judged of an address before it is dialled."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from hiverd.egress import dialer
from hiverd.egress.dialer import Dialer, ForbiddenAddressError
from hiverd.egress.names import Address
from hiverd.egress.own_api import OwnApi

PORT = 10000


@pytest.mark.parametrize("address", ["192.0.2.7", "::ffff:192.0.2.7", "2001:db8::7"])
async def test_this_server_is_known_at_every_address_of_the_host_in_every_form(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {ip_address("192.0.2.7"), ip_address("2001:db8::7")}
    monkeypatch.setattr(dialer, "is_local", lambda asked: asked in own)
    judged: list[Address] = []

    def judge(candidate: Address) -> bool:
        judged.append(candidate)
        return True

    dialling = Dialer(OwnApi("127.0.0.1", PORT), {}).socket_to(
        "own.test", PORT, exact=False, judge=judge, hosts={"own.test": address}
    )
    with pytest.raises(ForbiddenAddressError, match="this server itself"):
        await dialling
    assert judged == []
