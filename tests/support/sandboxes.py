"""A sandbox over plain HTTP, in few words, for system tests."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from support.waiting import until_async


class Box:
    """One sandbox. Made by `create`."""

    def __init__(self, http: httpx.AsyncClient, key: str, base: str) -> None:
        self.http = http
        self.key = key
        self.base = base

    @classmethod
    async def create(cls, http: httpx.AsyncClient, key: str, **config: Any) -> Box:
        answer = await http.post(f"/v1/sandboxes/{key}", json=config, headers={"x-hiver-key": key})
        assert answer.status_code in {200, 201}, answer.text
        return cls(http, key, f"/sandbox/{answer.json()['id']}/v1/{key}")

    @property
    def id(self) -> str:
        return self.base.split("/")[2]

    async def run(self, command: str) -> tuple[int, str]:
        """Exit code, and output and errors together."""
        answer = await self.http.post(f"{self.base}/exec", json={"command": f"exec 2>&1\n{command}"}, timeout=120)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        return int(body["exit_code"]), str(body["stdout"])

    async def out(self, command: str) -> str:
        """The output of a command that succeeds."""
        code, output = await self.run(command)
        assert code == 0, (command, code, output)
        return output

    async def fails(self, command: str, reason: str) -> None:
        """The command fails and says why."""
        code, output = await self.run(command)
        assert code != 0, (command, output)
        assert reason in output, (command, output)

    async def apply(self, **config: Any) -> dict[str, Any]:
        """The answer of a PUT of the configuration, whether it was applied or not."""
        answer = await self.http.put(f"{self.base}/config", json=config, timeout=60)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def applied(self, **config: Any) -> None:
        body = await self.apply(**config)
        assert body["applied"], body

    async def events(self) -> list[dict[str, Any]]:
        """All that are kept so far."""
        answer = await self.http.get(f"{self.base}/events", params={"follow": "false"}, timeout=30)
        lines = [line[5:] for line in answer.text.splitlines() if line.startswith("data:")]
        return [event for event in map(json.loads, lines) if "type" in event]

    async def accesses(self) -> set[tuple[str, str, str]]:
        """(access, operation, path) of all file accesses so far."""
        found = [event for event in await self.events() if event["type"] == "fs.request"]
        return {(event["access"], event["operation"], event["path"]) for event in found}

    async def until_accessed(self, *wanted: tuple[str, str, str]) -> None:
        """Waits until these are on record."""

        async def seen() -> bool:
            return set(wanted) <= await self.accesses()

        await until_async(seen, seconds=10, what=f"events {wanted}")

    async def remove(self) -> None:
        answer = await self.http.delete(self.base, timeout=60)
        assert answer.status_code in {200, 204, 404}, answer.text


def local(mount: str = "/workspace", *rules: tuple[str, str], **members: Any) -> dict[str, Any]:
    """A local entry of `fs`."""
    entry: dict[str, Any] = {"backend": "local", "mount": mount, **members}
    if rules:
        entry["acls"] = [{"path": path, "access": access} for path, access in rules]
    return entry


async def settled(box: Box) -> None:
    """Waits until the number of events stays the same for a moment."""
    before = -1
    while (now := len(await box.events())) != before:
        before = now
        await asyncio.sleep(0.3)


def mount_servers(sandbox_id: str) -> list[int]:
    """The processes that serve a sandbox's governed mounts, or upload what it left."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"mount-server" in command and sandbox_id.encode() in command:
                found.append(int(entry.name))
    return found
