"""The register of scenarios. Importing this costs nothing; `load` imports every scenario module."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from contract.scenarios.context import Context

Body = Callable[["Context"], Awaitable[None]]

MODULES: Final = (
    "lifecycle",
    "executing",
    "terminals",
    "files",
    "configuring",
    "watching",
    "proxying",
    "snapshots",
    "documented",
)
FIRST: Final = (0, 1, 15)
LAST: Final = (0, 1, 9999)
DEFAULT_SECONDS: Final = 45.0


@dataclass(frozen=True)
class Scenario:
    """One thing users do. If it `waits` for most of its time, all releases run it at the same time."""

    name: str
    run: Body
    since: tuple[int, ...]
    until: tuple[int, ...]
    waits: bool
    seconds: float
    slow: bool

    def covers(self, version: tuple[int, ...]) -> bool:
        return self.since <= version <= self.until


_register: dict[str, Scenario] = {}


def scenario(
    *,
    since: tuple[int, ...] = FIRST,
    until: tuple[int, ...] = LAST,
    waits: bool = False,
    seconds: float = DEFAULT_SECONDS,
    slow: bool = False,
) -> Callable[[Body], Body]:
    """Registers a coroutine function under its module's and its own name, as in `files.round_trip`."""

    def register(body: Body) -> Body:
        name = f"{body.__module__.rpartition('.')[2]}.{body.__name__}"
        _register[name] = Scenario(name, body, since, until, waits, seconds, slow)
        return body

    return register


@cache
def load() -> Mapping[str, Scenario]:
    """Every scenario by name."""
    for module in MODULES:
        importlib.import_module(f"contract.scenarios.{module}")
    return dict(_register)
