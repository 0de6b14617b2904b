"""Starting a mount server: a process in a session of its own that outlives the server, and hears it on a socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hiverd.contracts.isolation import Finding

SUBCOMMAND: Final = "mount-server"
"""Of the command line, hidden: how a frozen binary starts a mount server from itself."""
SOCKET: Final = "control"
LOG: Final = "log"
PID: Final = "pid"
MOUNTPOINT: Final = "fs"
_BOOT: Final = "import sys; sys.path[:] = sys.argv[3:]; from hiverd.fuse.worker import main; main()"
_BACKLOG: Final = 4


def probe() -> Finding:
    """Whether this host can have governed mounts, for `hiver doctor`."""
    name = "governed mounts"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        detail = f"mounts with rules and remote ones are refused: /dev/fuse: {error.strerror}"
        return Finding(name, ok=False, detail=detail, required=False, remedy="modprobe fuse")
    return Finding(name, ok=True, detail="by FUSE: mounts with rules, and remote ones", required=False)


@contextmanager
def reachable(folder: Path) -> Iterator[str]:
    """A short name for a folder: a socket's path has 107 bytes at most (unix(7))."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Starts one whose socket, log and mount point are in `folder`, an existing private folder.

    The socket can be connected to when this returns. Nothing of the configuration is on the command line or in the
    environment. Raises `OSError`. Blocking.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        (folder / SOCKET).unlink(missing_ok=True)
        with reachable(folder) as short:
            listener.bind(f"{short}/{SOCKET}")
        listener.listen(_BACKLOG)
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            process = subprocess.Popen(
                [*_command(), str(folder), *_python_path()],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(log)
    (folder / PID).write_text(f"{process.pid} {start_ticks(process.pid)}", encoding="ascii")
    return process


def start_ticks(pid: int) -> int:
    """When a process started (proc_pid_stat(5), field 22), so that its number is not taken for another's; 0: it has
    ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in {b"Z", b"X"} else int(fields[19])


def living_pid(folder: Path) -> int | None:
    """The process of the mount server in `folder`, if it lives."""
    try:
        pid, ticks = (int(word) for word in (folder / PID).read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return None
    return pid if ticks and start_ticks(pid) == ticks else None


def _command() -> list[str]:
    if getattr(sys, "frozen", False):
        return [sys.executable, SUBCOMMAND]
    return [sys.executable, "-I", "-c", _BOOT, SUBCOMMAND]


def _python_path() -> list[str]:
    return [] if getattr(sys, "frozen", False) else [os.path.abspath(entry) for entry in sys.path]
