"""What a scenario is given: the client, a sandbox factory that cleans up, and the differences between releases."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

HTTP_SECONDS = 30.0


class Context:
    """One run of one scenario against one server. Sandboxes made through it are gone when it ends."""

    def __init__(self, *, version: str, gateway_url: str, scenario: str) -> None:
        self.hiver: Any = importlib.import_module("hiver")  # the release on the path
        self.controller: Any = importlib.import_module("hiver.controller")
        self.version = tuple(int(part) for part in version.split("."))
        self.gateway_url = gateway_url
        self._name = scenario.rpartition(".")[2].replace("_", "-")[:40]
        self._handles: list[Any] = []
        self._keys: list[str] = []

    # -- differences between releases (PROTOCOL 1.3, 1.4) --------------------------------------------------------

    @property
    def old_family(self) -> bool:
        """Releases that address sandboxes by key."""
        return self.version <= (0, 1, 18)

    @property
    def reads_system_events(self) -> bool:
        """Releases that know `system.start` and skip what they do not know."""
        return self.version >= (0, 1, 36)

    @property
    def marks_its_creates(self) -> bool:
        """Releases that send `x-hiver-key`; those before can be told apart from newer ones by its absence."""
        return self.version >= (0, 1, 26)

    async def shutdown(self, sandbox: Any) -> None:
        if self.old_family:
            await self.controller.shutdown(sandbox, gateway_url=self.gateway_url)
        else:
            await sandbox.shutdown()

    async def write(self, sandbox: Any, path: str, content: bytes | str) -> dict[str, Any]:
        """Uploads in this release's own way."""
        folder, _, name = path.rpartition("/")
        if self.old_family:
            answer = await sandbox.upload_file(folder or "/", name, content)
        elif self.version <= (0, 1, 23):
            answer = await sandbox.write_file(folder or "/", name, content)
        else:
            answer = await sandbox.write_file(path, content)
        assert isinstance(answer, dict)
        return answer

    async def read(self, sandbox: Any, path: str) -> bytes:
        """Downloads in this release's own way."""
        download = sandbox.download_file if self.old_family else sandbox.read_file
        content = await download(path)
        assert isinstance(content, bytes)
        return content

    # -- sandboxes -----------------------------------------------------------------------------------------------

    def new_key(self) -> str:
        return self.track(f"{self._name}-{uuid.uuid4().hex[:8]}")

    def track(self, key: str) -> str:
        """Has this sandbox removed when the scenario ends."""
        self._keys.append(key)
        return key

    async def create(self, key: str | None = None, **config: Any) -> Any:
        """A handle of a new (or the existing) sandbox, made by the client."""
        key = key or self.new_key()
        sandbox = await self.hiver.get_or_create_sandbox(
            key, self.hiver.SandboxConfig(**config), gateway_url=self.gateway_url
        )
        self._handles.append(sandbox)
        return sandbox

    async def listed(self, key: str) -> Any | None:
        """The handle of a sandbox in the client's list, if it is there."""
        sandboxes = await self.hiver.list_sandboxes(gateway_url=self.gateway_url)
        self._handles += sandboxes
        return next((sandbox for sandbox in sandboxes if sandbox.key == key), None)

    async def clean_up(self) -> None:
        """Removes this scenario's sandboxes whatever became of them, by raw HTTP. A dead server fails the scenario."""
        for handle in self._handles:
            await handle.aclose()
        with contextlib.suppress(httpx.HTTPError):
            await self._remove_sandboxes()

    async def _remove_sandboxes(self) -> None:
        async with self.http() as http:
            for key in self._keys:
                await http.post(f"/controller/v1/shutdown/{key}")

    def http(self) -> httpx.AsyncClient:
        """A plain HTTP client on the gateway, for what this release's client cannot say."""
        return httpx.AsyncClient(base_url=self.gateway_url, timeout=HTTP_SECONDS)

    def api(self, sandbox: Any, path: str = "") -> str:
        """A per-sandbox URL path in the new family's form."""
        return f"/sandbox/{sandbox.id}/v1/{sandbox.key}{path}"

    # -- events --------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def events(self, sandbox: Any, after: int | None = None) -> AsyncIterator[EventLog]:
        """Collects the client's event stream in the background while the block runs."""
        log = EventLog()

        async def collect() -> None:
            async for event in sandbox.get_events_stream(last_event_id=after):
                log.add(event)

        task = asyncio.create_task(collect(), name="collect-events")
        try:
            yield log
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def error_of(self, awaitable: Awaitable[Any]) -> Any:
        """The client's own error that this call must end with."""
        try:
            result = await awaitable
        except self.hiver.SandboxError as error:
            return error
        raise AssertionError(f"expected a SandboxError, got {result!r}")


class EventLog:
    """Events in the order in which the client yielded them."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._changed = asyncio.Event()

    def add(self, event: Any) -> None:
        self.events.append(event)
        self._changed.set()

    def of_type(self, *types: str) -> list[Any]:
        return [event for event in self.events if event.type in types]

    async def wait_for(self, match: Callable[[Any], bool], *, seconds: float = 15.0, what: str = "") -> Any:
        """The first event, seen already or still to come, that matches."""
        deadline_monotonic = time.monotonic() + seconds
        checked = 0
        while True:
            for event in self.events[checked:]:
                checked += 1
                if match(event):
                    return event
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline_monotonic - time.monotonic())
            except TimeoutError:
                seen = [event.type for event in self.events]
                raise AssertionError(f"no event {what} within {seconds:g} s; seen: {seen}") from None


async def eventually(probe: Callable[[], Awaitable[T]], *, seconds: float, what: str) -> T:
    """The first truthy answer of a probe that is awaited again and again until the deadline."""
    deadline_monotonic = time.monotonic() + seconds
    while True:
        answer = await probe()
        if answer:
            return answer
        assert time.monotonic() < deadline_monotonic, f"not within {seconds:g} s: {what}; last answer {answer!r}"
        await asyncio.sleep(0.05)


async def collect_output(process: Any) -> tuple[str, str, int]:
    """Everything that an exec stream printed, and its exit code."""
    stdout, stderr = [], []
    async for pipe in process.pipes:
        stdout.append(pipe.get("stdout", ""))
        stderr.append(pipe.get("stderr", ""))
    return "".join(stdout), "".join(stderr), await asyncio.wait_for(process.exit_code, 5)


async def read_until(process: Any, wanted: str, *, seconds: float = 20.0, so_far: str = "") -> str:
    """Reads a process's output until it holds `wanted`; returns all that was read."""
    text = so_far
    try:
        async with asyncio.timeout(seconds):
            while wanted not in text:
                pipe = await anext(process.pipes)
                text += pipe.get("stdout", "") + pipe.get("stderr", "")
    except (TimeoutError, StopAsyncIteration) as error:
        raise AssertionError(f"{wanted!r} did not appear ({type(error).__name__}); output so far: {text!r}") from None
    return text


def json_of(response: httpx.Response) -> Any:
    """The body of a successful answer."""
    assert response.is_success, (
        f"{response.request.method} {response.request.url}: {response.status_code} {response.text}"
    )
    return json.loads(response.text)
