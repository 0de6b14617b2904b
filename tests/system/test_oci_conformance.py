"""The conformance suite, on the real plug-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hiverd.testing.isolation import IsolationSuite
from system.oci_support import OciHarness, needs_oci

pytestmark = [pytest.mark.system, needs_oci]


class TestOci(IsolationSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[OciHarness]:
        harness = OciHarness(tmp_path)
        yield harness
        harness.remove()
