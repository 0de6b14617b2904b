"""The conformance suite, on the real plug-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hiverd.testing.isolation import IsolationSuite
from support.docker import Engine
from system.docker_support import DockerHarness, needs_docker

pytestmark = [pytest.mark.system, needs_docker]


class TestDocker(IsolationSuite):
    @pytest.fixture
    def harness(
        self, tmp_path: Path, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[DockerHarness]:
        monkeypatch.setenv("DOCKER_HOST", docker_engine.host)
        harness = DockerHarness(tmp_path)
        yield harness
        harness.remove()
