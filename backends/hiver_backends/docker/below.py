"""The OCI runtime below the Engine: which program it is, and where it keeps its containers. Blocking calls.

A command through the Engine passes dockerd, containerd, a shim and the runtime; the runtime alone does the same in a
third of the time, and goes on doing so while the Engine restarts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from hiver_backends.linux import pids
from hiver_backends.linux.runtime import Runtime, kind_of
from hiver_backends.linux.tools import find_program, output_of
from hiverd.contracts.errors import BackendError

_DEFAULT_ROOT: Final = "/run/containerd/runc"
_CONMON: Final = "conmon"
_ELSEWHERE: Final = "is the engine on another host, or the server in a container?"


class Below(Struct, frozen=True, kw_only=True):
    """Where a container is known below the Engine."""

    program: str
    """Absolute path of the runtime."""
    state_dir: str
    """The runtime's `--root`."""
    bundle: str
    """The folder with the container's config.json (OCI runtime specification)."""


def find(pid: int, container_id: str) -> Below:
    """By the parent of the container's process 1, which outlives the Engine and knows the runtime: containerd's shim,
    or below Podman conmon. Raises `BackendError`."""
    stat = pids.read_stat(pid)
    parent = pids.read_stat(stat.parent) if stat is not None else None
    if stat is None or parent is None:
        raise BackendError("the container ended while it was made")
    process = Path("/proc", str(stat.parent))
    try:
        found = _of_conmon(process, container_id) if parent.name == _CONMON else _of_shim(process, container_id)
    except (OSError, ValueError, KeyError) as error:
        raise BackendError(f"the runtime below Docker cannot be found: {error}; {_ELSEWHERE}") from error
    program = find_program(found.program)
    if program is None or not (Path(found.state_dir) / container_id).is_dir():
        raise BackendError(
            f"the runtime below Docker cannot be used: {found.program} with {found.state_dir}; {_ELSEWHERE}"
        )
    return Below(program=program, state_dir=found.state_dir, bundle=found.bundle)


def _of_shim(process: Path, container_id: str) -> Below:
    """A shim runs in the container's bundle, where containerd leaves the runtime's options."""
    folder = Path(os.readlink(process / "cwd"))
    if folder.name != container_id:
        raise ValueError(f"the parent of its process 1 runs in {folder}")
    options = _options(folder)
    root = Path(str(options.get("root") or _DEFAULT_ROOT), folder.parent.name)
    return Below(program=str(options.get("binary_name") or "runc"), state_dir=str(root), bundle=str(folder))


def _of_conmon(process: Path, container_id: str) -> Below:
    """conmon has all in its arguments. Podman lets the runtime choose its folder: by the environment, which it sets."""
    words = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
    variables = os.fsdecode((process / "environ").read_bytes()).split("\0")
    environment = dict(variable.partition("=")[::2] for variable in variables)
    return from_conmon(words, environment, container_id)


def from_conmon(words: Sequence[str], environment: dict[str, str], container_id: str) -> Below:
    """What a conmon of Podman's is told by its command line. Raises `KeyError` or `ValueError`."""
    if "--exit-command" in words:
        words = words[: words.index("--exit-command")]  # what follows are another program's arguments
    options = dict(pairwise(words))
    if options["-c"] != container_id:
        raise ValueError(f"the parent of its process 1 is the monitor of {options['-c']}")
    program = options["-r"]
    root = _root_argument(words)
    if root is None:
        folder = environment.get("XDG_RUNTIME_DIR") if kind_of(program) == "crun" else None
        root = str(Path(folder or "/run", kind_of(program)))
    return Below(program=program, state_dir=root, bundle=options["-b"])


def _root_argument(words: Sequence[str]) -> str | None:
    """The value of the runtime's own `--root` among the arguments that conmon passes on."""
    passed = _values_of("--runtime-arg", words)
    return next(iter(_values_of("--root", passed)), None)


def _values_of(option: str, words: Sequence[str]) -> list[str]:
    """Written as `--option value` or `--option=value`."""
    values = []
    for word, after in pairwise([*words, ""]):
        if word == option:
            values.append(after)
        elif word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
    return values


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
        raise ValueError("odd options.json")
    if not options.get("binary_name"):
        with contextlib.suppress(FileNotFoundError):
            options["binary_name"] = (folder / "runtime").read_text().strip()
    return options


def root_folder(found: Below) -> Path:
    """Where the Engine has mounted a container's root file system on this host. Raises `BackendError`."""
    try:
        configuration = json.loads((Path(found.bundle) / "config.json").read_bytes())
        return Path(found.bundle, str(configuration["root"]["path"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"the container's root file system cannot be found: {error}") from error
