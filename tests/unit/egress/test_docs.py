"""docs/egress.md tells the limits as they are, and docs/egress-bypasses.md names tests that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

UNITS = {"": 1.0, "s": 1.0, "KiB": 1024.0, "MiB": 1024.0 * 1024}
LIMIT_ROW = re.compile(r"^\| [^|]+ \| ([0-9.]+) ?(s|KiB|MiB|) \| [^|]+ \| `([\w.]+)\.([A-Z_]+)` \|$", re.MULTILINE)
MODULES = (
    *("agent", "dialer", "exchange", "first_bytes", "guard", "hello", "openings", "overrides", "recorder"),
    *("resolver", "stream", "uplinks", "upload", "websocket"),
)
CONSTANT = re.compile(r"^((?:MAX_|(?=[A-Z][A-Z_]*SECONDS))[A-Z_]+): Final", re.MULTILINE)
INTERNAL = {"RECORD_SECONDS"}
"""How long something takes to be recorded; ends nothing."""


@pytest.fixture
def root(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.rootpath


@pytest.fixture
def limits(root: Path) -> dict[tuple[str, str], float]:
    found = LIMIT_ROW.findall((root / "docs/egress.md").read_text())
    return {(module, name): float(number) * UNITS[unit] for number, unit, module, name in found}


def test_the_limits_are_the_constants(limits: dict[tuple[str, str], float]) -> None:
    assert limits
    constants = {(module, name): getattr(importlib.import_module(f"hiverd.{module}"), name) for module, name in limits}
    assert limits == constants


def test_every_limit_is_told(root: Path, limits: dict[tuple[str, str], float]) -> None:
    for module in MODULES:
        text = (root / f"hiver/hiverd/egress/{module}.py").read_text()
        names = set(CONSTANT.findall(text)) - INTERNAL
        assert names == {name for where, name in limits if where == f"egress.{module}"} & names, module


def test_the_bypass_list_names_every_attack_and_no_other(root: Path) -> None:
    listed = set(re.findall(r"`(test_\w+)`", (root / "docs/egress-bypasses.md").read_text()))
    folder = root / "tests/system/egress"
    files = [*folder.glob("test_bypass_*.py"), folder / "test_gate.py"]
    attacks = {name for file in files for name in re.findall(r"^async def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert listed == attacks
