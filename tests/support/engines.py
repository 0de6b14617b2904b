"""Real engines for tests that have one of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from support import leaks
from support.docker import Engine
from support.docker_api import EngineFailed
from support.docker_podman import Podman
from support.docker_rootless import RootlessEngine

AnEngine = TypeVar("AnEngine", bound=Engine | Podman | RootlessEngine)


@contextmanager
def running_or_skipped(engine: AnEngine) -> Iterator[AnEngine]:
    """Starts an engine and stops it; the test is skipped, and said so at the end, where it does not start."""
    try:
        engine.start()
    except EngineFailed as error:
        pytest.skip(f"docker cannot be tested here: {error}")
    leaks.engines.append(engine)
    try:
        yield engine
    finally:
        leaks.engines.remove(engine)
        engine.stop()
