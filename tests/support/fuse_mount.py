"""A governed mount served by a process of its own, as in life: a process that used its own mount would wait for itself.

`FuseFixture` is the test's side. The other one runs when this file is the program: one JSON object per line, each way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from hiverd.files.acl import Access, Rules
from hiverd.fuse.attributes import FolderOwner
from hiverd.fuse.descriptors import MAX_OPEN_DIRECTORIES
from hiverd.fuse.judge import FsAccess, ServerProcess
from hiverd.fuse.mount import FuseMount
from hiverd.wire.model import AclRule
from support.server import REPOSITORY

RuleList = Sequence[tuple[str, Access]]


class FuseFixture:
    """A mount at `path` over `folder`. Rules are relative to the mount."""

    def __init__(self, folder: Path, path: Path, rules: RuleList = (), **options: Any) -> None:
        self.folder = folder
        self.path = path
        path.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        settings = {"folder": str(folder), "path": str(path), "rules": list(rules), **options}
        roots = os.pathsep.join(str(REPOSITORY / root) for root in ("hiver", "tests"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.fuse_mount", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": roots},
            text=True,
        )
        self.pid = self._process.pid
        self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the mount's process has ended"
        return json.loads(line)

    def ask(self, command: str, argument: Any = None) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, argument]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def set_rules(self, *rules: tuple[str, Access]) -> None:
        self.ask("rules", rules)

    def events(self) -> list[tuple[str, str, str]]:
        """(access, path, operation) of what was told since the last time."""
        return [(one[0], one[1], one[2]) for one in self.ask("events")]

    def errors(self) -> list[tuple[str, str, str | None]]:
        """(path, operation, error) since the last time."""
        return [(one[1], one[2], one[4]) for one in self.ask("events")]

    def server_is(self, pid: int | None) -> None:
        self.ask("server", pid)

    def close(self) -> None:
        if self._process.poll() is None:
            self.ask("stop")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(20) == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        subprocess.run(["umount", "-l", str(self.path)], check=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        except BaseException:
            self.kill()
            raise


class _Served:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._lock = threading.Lock()
        self._events: list[FsAccess] = []
        self.server = ServerProcess()
        self._case_sensitive = settings.get("case_sensitive", True)
        folder = Path(settings["folder"])
        status = folder.stat()
        self.mount = FuseMount(
            folder,
            rules=self.rules(settings["rules"]),
            record=self._events.append if settings.get("events", True) else None,
            exempt=self.server,
            owners=FolderOwner(status.st_uid, status.st_gid) if settings.get("folder_owner") else None,
            shared=settings.get("shared", False),
            threads=settings.get("threads"),
        )
        self.mount._directories._bound = settings.get("descriptors", MAX_OPEN_DIRECTORIES)
        self.mount.start(Path(settings["path"]))

    def rules(self, pairs: RuleList) -> Rules:
        rules = [AclRule(path=path, access=access) for path, access in pairs]
        return Rules(rules, "/the/mount", case_sensitive=self._case_sensitive)

    def do(self, command: str, argument: Any) -> object:
        match command:
            case "rules":
                self.mount.set_rules(self.rules(argument))
            case "events":
                events, self._events[:] = list(self._events), []
                return [(e.access, e.path, e.operation, e.duration_seconds, e.error) for e in events]
            case "server":
                self.server.pid = argument
            case "invalidate":
                self.mount.invalidate(argument)
            case "abort":
                self.mount.abort()
                return self.mount.wait(10)
            case "threads":
                return sum(thread.is_alive() for thread in self.mount._threads)
            case "nodes":
                return len(self.mount._tree)
            case "descriptors":
                return len(os.listdir("/proc/self/fd"))
            case "stop":
                self.mount.unmount(lazy=True)
                self.mount.close()
        return None


def main() -> None:
    served = _Served(json.loads(sys.argv[1]))
    print("{}", flush=True)
    for line in sys.stdin:
        command, argument = json.loads(line)
        print(json.dumps(served.do(command, argument)), flush=True)
        if command == "stop":
            break
    else:
        served.do("stop", None)


if __name__ == "__main__":
    main()
