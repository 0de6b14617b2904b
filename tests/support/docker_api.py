"""What speaks Docker's API on a UNIX socket, as the tests use it: an Engine of their own, whichever kind it is."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from support.docker_leftovers import kill_all, remove_cgroups, unmount_below
from support.waiting import until

STOP_SECONDS: Final = 30.0
START_SECONDS: Final = 30.0
LOG_TAIL_BYTES: Final = 1500
API: Final = "v1.41"
IMAGE: Final = "hiver-test/busybox:latest"
"""A static busybox as /bin/sh and the usual programs; made where it is needed, from this host's own."""
PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class EngineFailed(Exception):  # noqa: N818 -- the name says what happened
    """The Engine did not start, or refuses containers here; the message has the reason."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class OwnEngine:
    """Its folders, its socket and its API. Whatever of it runs names the first of the folders."""

    def __init__(self, name: str) -> None:
        """`[a-z0-9-]`, short enough for UNIX sockets."""
        self.name = name
        self.run_dir = Path("/run", name)
        self.data_dir = Path("/var/tmp", name)
        self.socket = self.run_dir / "engine.sock"

    @property
    def host(self) -> str:
        """For `DOCKER_HOST`."""
        return f"unix://{self.socket}"

    def clean(self) -> None:
        """Kills and removes everything that bears this Engine's name, however it got there."""
        kill_all(f"{self.run_dir}/", seconds=STOP_SECONDS)
        for folder in (self.run_dir, self.data_dir):
            unmount_below(folder)
            shutil.rmtree(folder, ignore_errors=True)
        remove_cgroups(self.name)

    def own_view(self, mounts: Mapping[str, str]) -> tuple[str, ...]:
        """Before an argv: its program sees something else than the rest of the host at some places, which are given
        with the arguments of the mount there. What it mounts below our folders is everybody's all the same."""
        for folder in (self.run_dir, self.data_dir):
            if not folder.is_mount():
                subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
                subprocess.run(["mount", "--make-shared", str(folder)], check=True)
        lines = ["set -e"]
        for place, arguments in mounts.items():
            lines.append(f'mount --make-private "$(findmnt --noheadings --output TARGET --target {place})"')
            lines.append(f"mount {arguments} {place}")
        script = self.run_dir / "view.sh"
        script.write_text("\n".join([*lines, 'exec "$@"']) + "\n")
        return ("unshare", "--mount", "--propagation", "unchanged", "sh", str(script))

    def spawn(self, *argv: str, variables: Mapping[str, str] | None = None) -> None:
        """In a session of its own: it may outlive the process that started it."""
        with (self.run_dir / "log").open("ab") as log:
            argv = ("setsid", "--fork", *argv)
            environment = {"PATH": PATH, **(variables or {})}
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def log_tail(self) -> str:
        with suppress(OSError):
            return (self.run_dir / "log").read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return ""

    def call(self, method: str, path: str, body: Any = None, *, seconds: float = 30.0) -> Any:
        """The decoded answer, None if it is empty; bytes are sent as a tar archive. `EngineFailed` for a refusal."""
        connection = _UnixConnection(self.socket, seconds)
        try:
            raw = isinstance(body, bytes)
            content = body if raw else json.dumps(body).encode() if body is not None else None
            kind = "application/x-tar" if raw else "application/json"
            connection.request(method, f"/{API}{path}", content, {"Content-Type": kind})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise EngineFailed(f"{method} {path}: {answer.status} {text.decode(errors='replace').strip()}")
        return json.loads(text.splitlines()[-1]) if text.strip().startswith((b"{", b"[")) else text or None

    def answers(self) -> bool:
        try:
            return bool(self.call("GET", "/_ping", seconds=2) == b"OK")
        except (OSError, http.client.HTTPException, EngineFailed):
            return False

    def containers(self) -> list[dict[str, Any]]:
        """All, running or not, as `GET /containers/json` has them."""
        found: list[dict[str, Any]] = self.call("GET", "/containers/json?all=true")
        return found

    def import_image(self, reference: str, archive: bytes) -> None:
        """A root file system as an image."""
        name, _, tag = reference.rpartition(":")
        self.call("POST", f"/images/create?{urlencode({'fromSrc': '-', 'repo': name, 'tag': tag})}", archive)

    def run_detached(self, image: str, *argv: str, **host_config: Any) -> str:
        """A running container's id."""
        config = {"Image": image, "Cmd": list(argv), "HostConfig": {"NetworkMode": "none", **host_config}}
        container = str(self.call("POST", "/containers/create", config)["Id"])
        self.call("POST", f"/containers/{container}/start")
        return container

    def remove_containers(self) -> None:
        """All of them, as far as the Engine still answers."""
        with suppress(OSError, http.client.HTTPException, EngineFailed):
            for container in self.containers():
                self.call("DELETE", f"/containers/{container['Id']}?force=true&v=true")

    def try_container(self, **host_config: Any) -> None:
        """An Engine may start where its containers cannot: nested, without control groups, and the like."""
        container = self.run_detached(IMAGE, "/bin/true", **host_config)

        # Not by /wait: where the container has ended already, Podman 4.3 thinks about it for 20 seconds.
        def code() -> str:
            state = self.call("GET", f"/containers/{container}/json")["State"]
            return "" if state["Running"] else str(state["ExitCode"])

        ended = until(code, seconds=START_SECONDS, what="a container that runs `true` has ended")
        self.call("DELETE", f"/containers/{container}?force=true")
        if ended != "0":
            raise EngineFailed(f"a container that was to run `true` ended with {ended}")


def storage_driver(folder: Path) -> str:
    """overlay2 where this disk can be below and above an overlay; else vfs, which copies and always works."""
    parts = [folder / f"probe-{name}" for name in ("lower", "upper", "work", "merged")]
    for part in parts:
        part.mkdir()
    lower, upper, work, merged = parts
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    done = subprocess.run(
        ["mount", "-t", "overlay", "-o", options, "overlay", str(merged)], check=False, capture_output=True
    )
    if done.returncode == 0:
        subprocess.run(["umount", str(merged)], check=True)
    for part in parts:
        shutil.rmtree(part)
    return "overlay2" if done.returncode == 0 else "vfs"


def busybox() -> bytes:
    """A tar archive of a root that holds a static busybox under all its names."""
    program = shutil.which("busybox", path=PATH)
    if program is None:
        raise EngineFailed("busybox-static is not installed: build/setup.sh --tests")
    names = subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in ("bin", "etc", "tmp", "root", "proc", "sys", "dev"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            archive.addfile(entry)
        archive.add(Path(program).resolve(), "bin/busybox")
        for name in names:
            if name != "busybox":
                link = tarfile.TarInfo(f"bin/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                archive.addfile(link)
    return buffer.getvalue()


def traces_in(engine: OwnEngine, marks: Iterable[str]) -> Iterator[str]:
    """Containers and volumes of the Engine that bear a mark, one line each."""
    wanted = tuple(marks)
    for container in engine.containers():
        if any(mark in json.dumps(container) for mark in wanted):
            yield f"container {container['Id'][:12]} {container['Names']}: {container['Status']}"
    for volume in engine.call("GET", "/volumes").get("Volumes") or ():
        if any(mark in json.dumps(volume) for mark in wanted):
            yield f"volume {volume['Name']}"
