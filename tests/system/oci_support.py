"""A harness for the real `oci` plug-in."""

from __future__ import annotations

import shutil
from typing import ClassVar, Final

import pytest

from hiver_backends.oci import OciIsolation
from system.backend_harness import BackendHarness, missing

_RUNTIME: Final = next(filter(shutil.which, ("crun", "runc")), "runc")
_MISSING: Final = missing("oci", (_RUNTIME, "conmon", "catatonit"))
needs_oci = pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "all there")


class OciHarness(BackendHarness):
    """The probing run's answer is shared by all tests of one run of pytest."""

    mark: ClassVar[str] = "ht"
    _remembered: ClassVar[bytes] = b""

    def build(self) -> OciIsolation:
        self.make_folders()
        memory = self.context.data_dir / "probe.json"
        if OciHarness._remembered and not memory.exists():
            memory.write_bytes(OciHarness._remembered)
        return OciIsolation(self.context)

    def remove(self) -> None:
        memory = self.context.data_dir / "probe.json"
        if memory.exists():
            OciHarness._remembered = memory.read_bytes()
        super().remove()
