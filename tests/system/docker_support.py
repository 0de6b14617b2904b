"""A harness for the real `docker` plug-in, on the tests' own Engine (the fixture `docker_engine`)."""

from __future__ import annotations

from typing import ClassVar, Final

import pytest

from hiver_backends.docker import DockerIsolation
from system.backend_harness import BackendHarness, missing

_MISSING: Final = missing("docker", ("conmon", "catatonit", "docker"))
needs_docker = pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "all there")


class DockerHarness(BackendHarness):
    mark: ClassVar[str] = "hd"

    def build(self) -> DockerIsolation:
        self.make_folders()
        return DockerIsolation(self.context)
