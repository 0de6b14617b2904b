"""Governed mounts for tests; each is gone when its test ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hiverd.files.acl import Access
from support.fuse_mount import FuseFixture, RuleList

MakeMount = Callable[..., FuseFixture]
RULES: list[tuple[str, Access]] = [("/**", "rw"), ("/docs/**", "ro"), ("/secret/**", "deny"), ("**/.env", "deny")]


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for directory in ("src", "docs", "secret/deep", "src/app"):
        (folder / directory).mkdir(parents=True)
    for name in ("src/a", "docs/b", "secret/c", "secret/deep/d", "src/app/.env", ".env"):
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.fixture
def governed(mount: MakeMount, folder: Path) -> FuseFixture:
    return mount(RULES, folder=folder)
