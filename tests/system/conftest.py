"""What several system tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.gateway import network_namespace


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """The nsfs path of a network namespace, one per module."""
    with network_namespace() as path:
        yield path
