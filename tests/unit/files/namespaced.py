"""A hostile root in user, mount and pid namespaces of its own, and code that runs inside it.

    with NamespacedRoot(tmp_path) as inside:
        inside.run("os.symlink('/etc/passwd', '/hiver-workspace/link')")
        root_fd = inside.open_root()

Runs as its own program too: that is the process inside.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

FIRST_ID = 200000
IDS = 65536

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWIPC, CLONE_NEWNET = (
    0x20000,
    0x10000000,
    0x20000000,
    0x8000000,
    1 << 30,
)
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
RENAME_EXCHANGE = 2


class NamespacedRoot:
    """Root: a tmpfs of its own user namespace, with `/proc`, `/sys`, and a folder of the host at `/hiver-data`."""

    root_ids = (FIRST_ID, FIRST_ID)

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "namespaced"
        self.shared = folder / "shared"
        """On the host's file system, seen as `/hiver-data` inside, owned by the sandbox's root."""

    def __enter__(self) -> Self:
        self.folder.mkdir()
        self.shared.mkdir()
        os.chown(self.shared, FIRST_ID, FIRST_ID)
        parent = self.folder.parent
        while parent != Path("/"):  # pytest's folders are private
            if parent.stat().st_mode & 0o111 != 0o111:
                parent.chmod(parent.stat().st_mode | 0o111)
            parent = parent.parent
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.folder), str(self.shared)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "unshared"
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{self._process.pid}/{name}").write_text(f"0 {FIRST_ID} {IDS}")
        self._pid = int(self._ask("mapped"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.kill()  # the pid namespace goes with it
        self._process.wait()

    def run(self, code: str) -> Any:
        """Runs Python code inside and gives the value it assigned to `result`."""
        outcome = self._ask(code)
        assert "error" not in outcome, outcome
        return outcome["result"]

    def open_root(self) -> int:
        return os.open(f"/proc/{self._pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _ask(self, request: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process inside has ended"
        return json.loads(line)


def exchange(first: str | Path, second: str | Path) -> None:
    """`renameat2(2)` with RENAME_EXCHANGE."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(first), -100, os.fsencode(second), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")


def exchange_forever(first: str, second: str) -> None:
    libc = ctypes.CDLL(None)
    one, other = os.fsencode(first), os.fsencode(second)
    while True:
        libc.renameat2(-100, one, -100, other, RENAME_EXCHANGE)


# -- inside -----------------------------------------------------------------------------------------------------------


def _inside(folder: str, shared: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int, what: str) -> None:
        if result:
            number = ctypes.get_errno()
            raise OSError(number, f"{what}: {os.strerror(number)}")

    def mount(source: str, target: str, kind: str, flags: int = 0) -> None:
        check(
            libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), b""), f"mount {target}"
        )

    flags = CLONE_NEWNS | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWNET
    check(libc.unshare(flags), "unshare")
    _say("unshared")
    sys.stdin.readline()
    os.setgid(0)
    os.setuid(0)
    child = os.fork()
    if child:
        _say(child)
        check(libc.prctl(1, 9), "prctl")
        os.waitpid(child, 0)
        return
    check(libc.prctl(1, 9), "prctl")  # PR_SET_PDEATHSIG
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs")
    for name in ("proc", "sys", "hiver-data", "hiver-workspace", "old"):
        os.mkdir(f"{folder}/{name}")
    mount("proc", f"{folder}/proc", "proc")
    mount("sysfs", f"{folder}/sys", "sysfs")
    mount(shared, f"{folder}/hiver-data", "", MS_BIND)
    check(libc.pivot_root(folder.encode(), f"{folder}/old".encode()), "pivot_root")
    os.chdir("/")
    check(libc.umount2(b"/old", 2), "umount")
    os.rmdir("/old")
    names: dict[str, Any] = {"exchange_forever": exchange_forever, "libc": libc, "mount": mount}
    names |= {"fcntl": fcntl, "os": os, "signal": signal, "socket": socket}
    for line in sys.stdin:
        try:
            names["result"] = None
            exec(json.loads(line), names)  # noqa: S102 -- the attacker of the tests
            _say({"result": names["result"]})
        except Exception as error:  # noqa: BLE001 -- told to the test
            _say({"error": repr(error)})


def _say(value: object, stream: IO[str] = sys.stdout) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    _inside(sys.argv[1], sys.argv[2])
