"""An Engine that maps user ids (`userns-remap`): root of a sandbox is nobody on the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hiverd.testing.isolation import IsolationSuite
from support import leaks
from support.docker import Engine, EngineFailed
from system.docker_support import DockerHarness, needs_docker

pytestmark = [pytest.mark.system, needs_docker]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(f"remap-{os.getpid()}", userns_remap=True)
    try:
        engine.start()
    except EngineFailed as error:
        pytest.skip(f"docker cannot be tested here: {error}")
    leaks.engines.append(engine)
    yield engine
    leaks.engines.remove(engine)
    engine.stop()


class TestRemapped(IsolationSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path, engine: Engine) -> Iterator[DockerHarness]:
        harness = DockerHarness(tmp_path, host=engine.host)
        yield harness
        harness.remove()
