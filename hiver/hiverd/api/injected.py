"""What handlers ask for: the server's parts, given by name (see `hiverd.web.build_asgi`)."""

from __future__ import annotations

from typing import Any

from litestar import Request
from litestar.di import NamedDependency

from hiverd.api.parsers import ParserWatch
from hiverd.contracts.isolation import Isolation
from hiverd.files.access import FileAccess
from hiverd.sandboxes.apply import ConfigApplier
from hiverd.sandboxes.execs import Execs
from hiverd.sandboxes.manager import Manager
from hiverd.sandboxes.mounts import MountPlanner
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.snapshot_stores import SnapshotStores
from hiverd.sandboxes.snapshotting import Snapshots

AnyRequest = Request[Any, Any, Any]

TheApplier = NamedDependency[ConfigApplier]
TheExecs = NamedDependency[Execs]
TheFiles = NamedDependency[FileAccess]
TheIsolation = NamedDependency[Isolation]
TheKeepalive = NamedDependency[float]
"""`exec.keepalive_seconds`."""
TheManager = NamedDependency[Manager]
TheParsers = NamedDependency[ParserWatch]
ThePlanner = NamedDependency[MountPlanner]
TheSnapshots = NamedDependency[Snapshots]
TheSandbox = NamedDependency[Sandbox]
TheSnapshotStores = NamedDependency[SnapshotStores]
