"""Every event of a sandbox's stream (PROTOCOL 7). The journal adds `id` and `timestamp` when it records one."""

from __future__ import annotations

from typing import Any, Final, Literal, Protocol

from msgspec import Struct

Access = Literal["allowed", "denied"]
FileOperation = Literal["read", "write", "delete"]


class Event(Struct, frozen=True, omit_defaults=True, tag_field="type"):
    """Base of all events. The struct's tag is the wire's `type`; absent optionals are left out, never null."""


class ConfigApplyEvent(Event, frozen=True, omit_defaults=True, tag="config.apply"):
    success: bool
    changes: dict[str, Any]
    errorMessage: str | None = None  # noqa: N815 -- the wire's spelling


class EgressRequestEvent(Event, frozen=True, omit_defaults=True, tag="egress.request"):
    access: Access
    host: str
    method: str
    path: str
    query: str | None = None
    headers: dict[str, str] | None = None
    body: str | None = None
    upstream: str | None = None


class EgressResponseEvent(Event, frozen=True, omit_defaults=True, tag="egress.response"):
    request_id: int
    status: int
    duration_ms: int
    headers: dict[str, str] | None = None


class EgressChunkEvent(Event, frozen=True, omit_defaults=True, tag="egress.chunk"):
    request_id: int
    body: str
    label: Literal["up", "down"] | None = None


class FsRequestEvent(Event, frozen=True, omit_defaults=True, tag="fs.request"):
    access: Access
    mount: str
    path: str
    operation: FileOperation


class FsResponseEvent(Event, frozen=True, omit_defaults=True, tag="fs.response"):
    backend: str
    request_id: int
    duration_ms: int
    error: str | None = None


class StdioEvent(Event, frozen=True, omit_defaults=True, tag="stdio"):
    stdout: str | None = None
    stderr: str | None = None


class ExecRequestEvent(Event, frozen=True, omit_defaults=True, tag="exec.request"):
    cwd: str
    command: str


class ExecResponseEvent(Event, frozen=True, omit_defaults=True, tag="exec.response"):
    request_id: int


class IngressRequestEvent(Event, frozen=True, omit_defaults=True, tag="ingress.request"):
    port: str
    method: str
    path: str
    query: str | None = None
    headers: dict[str, str] | None = None
    body: str | None = None


class IngressResponseEvent(Event, frozen=True, omit_defaults=True, tag="ingress.response"):
    request_id: int
    status: int
    duration_ms: int
    headers: dict[str, str] | None = None


class IngressChunkEvent(Event, frozen=True, omit_defaults=True, tag="ingress.chunk"):
    request_id: int
    body: str
    label: Literal["up", "down"] | None = None


class ResourceUsageEvent(Event, frozen=True, omit_defaults=True, tag="resource.usage"):
    cpu_percent: float
    memory_bytes: int


class SystemStartEvent(Event, frozen=True, omit_defaults=True, tag="system.start"):
    pass


class SystemVmResumedEvent(Event, frozen=True, omit_defaults=True, tag="system.vm-resumed"):
    pass


class SystemConfigChangedEvent(Event, frozen=True, omit_defaults=True, tag="system.config-changed"):
    config: dict[str, Any]


class SystemShutdownEvent(Event, frozen=True, omit_defaults=True, tag="system.shutdown"):
    pass


class SystemFsSyncRequestEvent(Event, frozen=True, omit_defaults=True, tag="system.fs-sync-request"):
    backend: str
    operation: Literal["list", "list-dir", "stat", "get", "put", "delete", "move"]
    path: str


class SystemFsSyncResponseEvent(Event, frozen=True, omit_defaults=True, tag="system.fs-sync-response"):
    request_id: int
    duration_ms: int
    error: str | None = None


EVENT_CLASSES: Final[tuple[type[Event], ...]] = (
    ConfigApplyEvent,
    EgressRequestEvent,
    EgressResponseEvent,
    EgressChunkEvent,
    FsRequestEvent,
    FsResponseEvent,
    StdioEvent,
    ResourceUsageEvent,
    ExecRequestEvent,
    ExecResponseEvent,
    IngressRequestEvent,
    IngressResponseEvent,
    IngressChunkEvent,
    SystemStartEvent,
    SystemConfigChangedEvent,
    SystemVmResumedEvent,
    SystemShutdownEvent,
    SystemFsSyncRequestEvent,
    SystemFsSyncResponseEvent,
)


def type_of(event: Event | type[Event]) -> str:
    """The wire's `type` of an event or of an event class."""
    tag = event.__struct_config__.tag
    assert isinstance(tag, str)  # noqa: S101 -- every class above has one
    return tag


EVENT_TYPES: Final[frozenset[str]] = frozenset(type_of(event) for event in EVENT_CLASSES)

SILENT_TYPES: Final[frozenset[str]] = frozenset(
    {"resource.usage", "system.start", "system.vm-resumed", "system.shutdown"}
)
"""Events that are no sign of life: they do not reset the TTL (PROTOCOL 8)."""


class EventSink(Protocol):
    """Where parts of the server record what happens in one sandbox."""

    def wants(self, event_type: type[Event]) -> bool:
        """False when the sandbox's `events` filter excludes this type: then skip the work of capturing it."""

    def emit(self, event: Event) -> int:
        """Records the event and returns its id. Excluded types consume an id too (PROTOCOL 7). Never blocks."""

    async def room(self) -> None:
        """Waits while too much is queued to be stored: for producers that a workload can drive."""
