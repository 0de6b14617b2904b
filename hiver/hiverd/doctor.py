"""What `hiver doctor` prints: every isolation plug-in's findings about this host."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from hiverd import plugins
from hiverd.contracts.errors import HiverError
from hiverd.contracts.isolation import BackendContext, Finding, Isolation
from hiverd.egress import gate
from hiverd.fuse import launch
from hiverd.sandboxes import file_events
from hiverd.settings import Settings

_GROUP: plugins.Group = "hiver.isolation"


class Report(Struct, frozen=True):
    text: str
    healthy: bool
    """The configured way of running containers works; with `auto`: at least one does."""


def examine(settings: Settings) -> Report:
    """Probes every isolation plug-in that is installed. Changes nothing that stays."""
    findings = {name: _probe(name, settings) for name in plugins.names(_GROUP)}
    egress = _probe_gate()
    chosen = settings.server.container_backend
    candidates = {name: found for name, found in findings.items() if chosen in {"auto", name}}
    healthy = egress.ok and any(works(found) for found in candidates.values())
    parts = [
        f"{name}{' (not chosen)' if name not in candidates else ''}\n{table(found)}" for name, found in findings.items()
    ]
    parts.append(f"egress\n{table([egress])}")
    parts.append(f"files\n{table(_probe_files(settings))}")
    if not candidates:
        parts.append(
            f"No isolation plug-in named {chosen} is installed." if findings else "No isolation plug-in is installed."
        )
    parts.append("Ready: hiver serve" if healthy else "Not ready: see the remedies above.")
    return Report("\n\n".join(parts), healthy)


def works(findings: Sequence[Finding]) -> bool:
    """True if nothing required is missing."""
    return all(finding.ok for finding in findings if finding.required)


def _probe(name: str, settings: Settings) -> list[Finding]:
    try:
        plugin = plugins.isolation_class(name)
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=_scratch(settings.server.data_dir)) as folder:
            return asyncio.run(_examine_one(plugins.build(plugin, _context(name, settings, Path(folder)))))
    except HiverError as error:
        return [Finding(name=name, ok=False, detail=error.message)]


def _probe_gate() -> Finding:
    """What every sandbox needs, whoever isolates it."""
    try:
        asyncio.run(gate.probe())
    except HiverError as error:
        remedy = "start as root, on a kernel with nftables (nft_chain_nat, nft_socket, nft_log, nft_reject)"
        return Finding(name="packet filter", ok=False, detail=error.message, remedy=remedy)
    return Finding(name="packet filter", ok=True, detail="refuses and records what the proxy does not take")


def _probe_files(settings: Settings) -> list[Finding]:
    return [launch.probe(), file_events.probe(_scratch(settings.server.data_dir) or Path(tempfile.gettempdir()))]


async def _examine_one(plugin: Isolation) -> list[Finding]:
    try:
        return await plugin.probe()
    finally:
        await plugin.close()


def _scratch(data_dir: Path) -> Path | None:
    """The data folder if there is one, as it may lie on a disk with other abilities; otherwise the usual place."""
    return data_dir if os.access(data_dir, os.W_OK | os.X_OK) else None


def _context(name: str, settings: Settings, folder: Path) -> BackendContext:
    data_dir, run_dir = folder / "data", folder / "run"
    data_dir.mkdir(mode=0o700)
    run_dir.mkdir(mode=0o700)
    return BackendContext(
        instance="doctor00",
        data_dir=data_dir,
        run_dir=run_dir,
        options=settings.options_of(name),
        image_aliases=settings.image_aliases,
    )


def table(findings: Sequence[Finding]) -> str:
    """Findings as aligned lines, each remedy below what it mends."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        mark = "ok" if finding.ok else "MISSING" if finding.required else "optional"
        lines.append(f"  {mark:<8}  {finding.name:<{width}}  {finding.detail}".rstrip())
        if finding.remedy and not finding.ok:
            lines.append(f"  {'':<8}  {'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines)
