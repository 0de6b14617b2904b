"""What an earlier process has left: the folder follows the database where that had gone ahead."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from hiverd.remote.node import Node
from hiverd.remote.nodes import Table

log = logging.getLogger(__name__)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def recover(table: Table) -> list[Node]:
    """Files to be uploaded. All is as if the last process had come to rest."""
    with table.lock:
        _distrust_after_reboot(table)
        _finish(table)
        nodes = [node for node in (_pending(row.path, table) for row in table.state.pending()) if node is not None]
        table.state.commit()
    if nodes:
        log.warning("%d files wait for their upload since an earlier run", len(nodes))
    return nodes


def _distrust_after_reboot(table: Table) -> None:
    """A commit survives a killed process with all that was written before it. When the machine stops, that order is
    not kept: content may be missing where it is recorded."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    if table.state.fact("boot_id") not in {None, boot_id}:
        table.state.forget_content()
        table.cached_bytes = 0
    table.state.set_fact("boot_id", boot_id)


def _finish(table: Table) -> None:
    intents = table.state.intents()
    for intent in intents:
        table.finish(intent)
    table.state.drop_intents(intent.id for intent in intents)


def _pending(path: str, table: Table) -> Node | None:
    found = table.tree.status(path)
    node = table.find(path)
    if node is None:
        return None
    if found is None:
        log.error("%s: is recorded as pending and not in the folder", path)
        table.remove(node)
        return None
    node.size = found.st_size
    table.save(node)
    return node
