"""A harness for the real `docker` plug-in, on the tests' own Engine (the fixture `docker_engine`)."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hiver_backends.docker import DockerIsolation
from hiverd.contracts.isolation import BackendContext
from hiverd.testing.isolation import Harness


def missing() -> str:
    """Why the tests cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "the docker plug-in's system tests need root"
    absent = [name for name in ("conmon", "catatonit", "docker") if shutil.which(name) is None]
    return f"the docker plug-in's system tests need {' and '.join(absent)}" if absent else ""


needs_docker = pytest.mark.skipif(bool(missing()), reason=missing() or "all there")


class DockerHarness(Harness):
    """Folders below `folder`."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder)
        self.options = options
        self.aliases: dict[str, str] = {}
        self.instance = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        self.run_dir = Path("/run", f"hd-{self.instance}")

    @property
    def context(self) -> BackendContext:
        return BackendContext(
            instance=self.instance,
            data_dir=self.folder / "data",
            run_dir=self.run_dir,
            options=self.options,
            image_aliases=self.aliases,
        )

    def build(self) -> DockerIsolation:
        self.context.data_dir.mkdir(mode=0o700, exist_ok=True)
        self.context.run_dir.mkdir(mode=0o700, exist_ok=True)
        return DockerIsolation(self.context)

    def remove(self) -> None:
        """Once no sandbox is left."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
