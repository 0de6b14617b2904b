"""The OCI runtime below the Engine: which program it is, and where it keeps its containers. Blocking calls.

A command through the Engine passes dockerd, containerd, a shim and the runtime; the runtime alone does the same in a
third of the time, and goes on doing so while the Engine restarts.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from hiver_backends.linux import pids
from hiver_backends.linux.runtime import Runtime, kind_of
from hiver_backends.linux.tools import find_program, output_of
from hiverd.contracts.errors import BackendError

_DEFAULT_ROOT: Final = "/run/containerd/runc"


class Below(Struct, frozen=True, kw_only=True):
    """Where a container is known below the Engine."""

    program: str
    """Absolute path of the runtime."""
    state_dir: str
    """The runtime's `--root`."""


def find(pid: int, container_id: str) -> Below:
    """By the container's shim, the parent of its process 1: it runs in the container's bundle, where containerd leaves
    the runtime's options. Raises `BackendError`."""
    stat = pids.read_stat(pid)
    if stat is None:
        raise BackendError("the container ended while it was made")
    try:
        folder = Path(os.readlink(f"/proc/{stat.parent}/cwd"))
        options = _options(folder)
    except (OSError, ValueError) as error:
        raise BackendError(f"the runtime below Docker cannot be found: {error}") from error
    name = str(options.get("binary_name") or "runc")
    program = find_program(name)
    state_dir = Path(str(options.get("root") or _DEFAULT_ROOT), folder.parent.name)
    if program is None or folder.name != container_id or not (state_dir / container_id).is_dir():
        raise BackendError(
            f"the runtime below Docker cannot be used: {name} with {state_dir}; is the server in another container?"
        )
    return Below(program=program, state_dir=str(state_dir))


def root_id(pid: int) -> int | None:
    """Host id of a container's root, where the Engine maps user ids (user_namespaces(7)); None where it does not."""
    for line in Path("/proc", str(pid), "uid_map").read_text().splitlines():
        first, host, _ = map(int, line.split())
        if first == 0:
            return host or None
    return None


def runtime(program: str) -> Runtime:
    """As `RuntimeCalls` takes it."""
    version = output_of(program, "--version").partition("\n")[0]
    return Runtime(path=program, kind=kind_of(program), version=version, userns=False)


def _options(folder: Path) -> dict[str, Any]:
    try:
        options = json.loads((folder / "options.json").read_bytes())
    except FileNotFoundError:
        options = {}
    if not isinstance(options, dict):
        raise TypeError("odd options.json")
    if not options.get("binary_name"):
        with contextlib.suppress(FileNotFoundError):
            options["binary_name"] = (folder / "runtime").read_text().strip()
    return options


def root_folder(found: Below, container_id: str) -> Path:
    """Where the Engine has mounted a container's root file system on this host. Raises `BackendError`."""
    try:
        state = json.loads((Path(found.state_dir) / container_id / "state.json").read_bytes())
        return Path(str(state["config"]["rootfs"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"the container's root file system cannot be found: {error}") from error
