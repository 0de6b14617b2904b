"""Governed mounts for tests; each is gone when its test ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.fuse_mount import FuseFixture, RuleList

MakeMount = Callable[..., FuseFixture]


@pytest.fixture(autouse=True)
def _needs_fuse() -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and /dev/fuse")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MakeMount]:
    """Mounts a new folder, or the one that is given."""
    tmp_path.chmod(0o755)
    with ExitStack() as stack:

        def make(rules: RuleList = (), *, folder: Path | None = None, **options: Any) -> FuseFixture:
            number = len(os.listdir(tmp_path))
            at = folder or tmp_path / f"folder{number}"
            return stack.enter_context(FuseFixture(at, tmp_path / f"mount{number}", rules, **options))

        yield make
    left = [line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {tmp_path}/" in line]
    assert not left
