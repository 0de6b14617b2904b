"""Which isolation plug-in runs the sandboxes, where the settings leave it open (`container_backend = "auto"`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from hiverd.contracts.errors import HiverError, UnavailableError
from hiverd.contracts.isolation import Isolation

AUTO: Final = ("oci", "docker")
"""In this order: `oci` needs no daemon, and is faster."""

log: Final = logging.getLogger(__name__)


async def started(name: str, build: Callable[[str], Isolation], *, memory: Path, occupied: bool) -> Isolation:
    """The plug-in of this name, started; for `auto` the first that starts.

    `memory` keeps what was chosen. While there are sandboxes (`occupied`), `auto` is what made them and nothing else:
    no other plug-in could take them over, and an Engine that is away for a moment must not cost them.
    `UnavailableError` with everybody's reasons if none starts.
    """
    candidates = _candidates(name, memory if occupied else None)
    reasons: list[str] = []
    for candidate in candidates:
        try:
            isolation = await _started(candidate, build)
        except HiverError as error:
            if len(candidates) == 1:
                raise
            reasons.append(f"{candidate}: {error.message}")
            continue
        if reasons:
            log.warning("isolation by %s, because others do not work here: %s", candidate, "; ".join(reasons))
        memory.write_text(candidate)  # noqa: ASYNC240 -- a word, once
        return isolation
    raise UnavailableError("no way of running containers works here\n  " + "\n  ".join(reasons))


def _candidates(name: str, memory: Path | None) -> tuple[str, ...]:
    if name != "auto":
        return (name,)
    if memory is not None:
        with suppress(OSError):
            remembered = memory.read_text().strip()
            if remembered in AUTO:
                return (remembered,)
    return AUTO


async def _started(name: str, build: Callable[[str], Isolation]) -> Isolation:
    isolation = build(name)
    try:
        await isolation.start()
    except BaseException:
        await isolation.close()
        raise
    return isolation
