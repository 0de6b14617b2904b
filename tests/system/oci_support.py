"""A harness for the real `oci` plug-in."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hiver_backends.oci import OciIsolation
from hiverd.contracts.isolation import BackendContext
from hiverd.testing.isolation import Harness


def missing() -> str:
    """Why the tests cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "the oci plug-in's system tests need root"
    if not any(map(shutil.which, ("runc", "crun"))):
        return "the oci plug-in's system tests need runc or crun"
    absent = [name for name in ("conmon", "catatonit") if shutil.which(name) is None]
    return f"the oci plug-in's system tests need {' and '.join(absent)}" if absent else ""


needs_oci = pytest.mark.skipif(bool(missing()), reason=missing() or "all there")


class OciHarness(Harness):
    """Folders below `folder`; the probing run's answer is shared by all tests of one run of pytest."""

    _remembered: ClassVar[bytes] = b""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder)
        self.options = options
        self.aliases: dict[str, str] = {}
        self.instance = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        self.run_dir = Path("/run", f"ht-{self.instance}")

    @property
    def context(self) -> BackendContext:
        return BackendContext(
            instance=self.instance,
            data_dir=self.folder / "data",
            run_dir=self.run_dir,
            options=self.options,
            image_aliases=self.aliases,
        )

    def build(self) -> OciIsolation:
        self.context.data_dir.mkdir(mode=0o700, exist_ok=True)
        memory = self.context.data_dir / "probe.json"
        if OciHarness._remembered and not memory.exists():
            memory.write_bytes(OciHarness._remembered)
        self.context.run_dir.mkdir(mode=0o700, exist_ok=True)
        return OciIsolation(self.context)

    def remove(self) -> None:
        """Once no sandbox is left."""
        memory = self.context.data_dir / "probe.json"
        if memory.exists():
            OciHarness._remembered = memory.read_bytes()
        shutil.rmtree(self.run_dir, ignore_errors=True)
