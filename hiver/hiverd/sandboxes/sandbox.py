"""One live sandbox, as every other part of the server sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from hiverd.clock import Clock
from hiverd.contracts.errors import UnavailableError
from hiverd.contracts.isolation import Workload, WorkloadSpec
from hiverd.state.journal import SandboxEvents
from hiverd.state.records import Status
from hiverd.wire.config import SandboxConfig, effective_ttl_seconds

if TYPE_CHECKING:
    from hiverd.sandboxes.execs import RunningCommand
    from hiverd.sandboxes.terminals import TerminalHub

STUCK_PATIENCE_SECONDS: Final = 3.0
"""How long callers wait for a removal that did not get on: a little longer than it waits to try again."""


class Sandbox:
    """Identity, configuration in force, workload and event stream of one sandbox. Owned by the manager."""

    def __init__(
        self,
        *,
        sandbox_id: str,
        key: str,
        slot: int,
        config: SandboxConfig,
        events: SandboxEvents,
        clock: Clock,
        default_ttl_seconds: int,
    ) -> None:
        self.id = sandbox_id
        self.key = key
        self.slot = slot
        self.config = config
        self.events = events
        self.status: Status = "starting"
        self.spec: WorkloadSpec | None = None
        self.execs: dict[str, RunningCommand] = {}
        self.terminal: TerminalHub | None = None
        self.viewers: set[str] = set()
        """Ids of exec-streams that are attached to the entrypoint's terminal."""
        self.changing = asyncio.Lock()
        """Held while its mounts and its configuration are being changed."""
        self.created: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Resolved when the sandbox runs; fails with the error that creating it met."""
        self.created.add_done_callback(_retrieve)
        self.destroyed = asyncio.Event()
        """Set when nothing of it is left and its key is free."""
        self.stuck = asyncio.Event()
        """Set while its removal does not get on because an engine is away, or the disk is full. It is tried on."""
        self.stuck_reason = ""
        self.being_removed = False
        self.has_lived = False
        """Its workload has begun, and what it wrote has not been captured at its end yet."""
        self.end_error: str | None = None
        """What went wrong at its end, in words for whoever ended it."""
        self.isolation_state: Mapping[str, Any] = {}
        """The isolation plug-in's document, also when the workload has ended."""
        self._workload: Workload | None = None
        self._clock = clock
        self._default_ttl_seconds = default_ttl_seconds
        self._last_activity_wall = clock.wall()
        self._last_activity_monotonic = clock.monotonic()
        events.on_activity = self.touch

    @property
    def ready(self) -> bool:
        return self.status == "running" and self._workload is not None

    async def until_destroyed(self) -> None:
        """Raises `UnavailableError` where that may take as long as an engine is away."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.destroyed, self.stuck)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        try:
            async with asyncio.timeout(STUCK_PATIENCE_SECONDS):
                await self.destroyed.wait()
        except TimeoutError:
            raise UnavailableError(f'sandbox "{self.key}" cannot be removed yet: {self.stuck_reason}') from None

    @property
    def workload(self) -> Workload:
        """The running workload; `UnavailableError` while there is none."""
        if self._workload is None:
            raise UnavailableError(f'sandbox "{self.key}" is still {self.status}; try again in a moment')
        return self._workload

    def set_workload(self, workload: Workload | None) -> None:
        self._workload = workload
        if workload is not None:
            self.isolation_state = workload.state

    @property
    def has_workload(self) -> bool:
        return self._workload is not None

    @property
    def mounts(self) -> Sequence[tuple[str, str]]:
        """(mount path, backend) of everything configured that the agent can see."""
        return [(fs.mount, fs.backend) for fs in self.config.fs or () if not fs.internal]

    def touch(self) -> None:
        """A sign of life: the TTL counts anew."""
        self._last_activity_wall = self._clock.wall()
        self._last_activity_monotonic = self._clock.monotonic()

    def restore_activity(self, wall_seconds: float) -> None:
        """After a restart of the server: the TTL goes on from what was stored, and not from a time in the future."""
        idle_seconds = max(0.0, self._clock.wall() - wall_seconds)
        self._last_activity_wall = self._clock.wall() - idle_seconds
        self._last_activity_monotonic = self._clock.monotonic() - idle_seconds

    @property
    def last_activity_at(self) -> float:
        """Seconds since the epoch."""
        return self._last_activity_wall

    @property
    def expired(self) -> bool:
        ttl_seconds = effective_ttl_seconds(self.config, self._default_ttl_seconds)
        return ttl_seconds is not None and self._clock.monotonic() - self._last_activity_monotonic >= ttl_seconds


def event_filter(config: SandboxConfig) -> frozenset[str] | None:
    """The observed event types; None for all of them."""
    return None if config.events is None else frozenset(config.events)


def _retrieve(created: asyncio.Future[None]) -> None:
    # A failed creation is told to whoever waits for it; if nobody does any more, the log has it.
    if not created.cancelled():
        created.exception()
