"""The bound of the cache: content that was not used for longest goes first. It can always be fetched again."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Final

from hiverd.remote.shared import Shared
from hiverd.remote.state import Row

LOW_SHARE: Final = 0.9
"""Down to this share of the bound, so that not every new byte means work."""


def victims(rows: Iterable[Row], busy: Container[str], excess_bytes: int) -> list[str]:
    """Paths in the order of `rows` until so much is freed; pure. What is busy stays."""
    chosen = []
    for row in rows:
        if excess_bytes <= 0:
            break
        if row.path not in busy:
            chosen.append(row.path)
            excess_bytes -= row.cached
    return chosen


def trim(shared: Shared) -> None:
    """Frees what exceeds the bound. May be called from any thread."""
    table, bound = shared.table, shared.settings.cache_bytes
    if table.cached_bytes <= bound:
        return
    with table.lock:
        excess = table.cached_bytes - int(bound * LOW_SHARE)
        rows = table.state.least_used(200 + len(table.nodes))
        chosen = victims(rows, table.nodes.keys(), excess)
    for path in chosen:
        with table.lock:
            if path in table.nodes:
                continue
            node = table.find(path)
            if node is not None:
                table.reset(node, node.size, node.mtime_ns)
                table.rest(node)
