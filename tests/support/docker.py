"""A Docker Engine for the tests alone: its own folders, sockets and containerd, and nothing of it stays.

One is shared by all processes of a test run: whoever comes first starts it, whoever leaves last stops it, both told by
file locks, which a crash cannot leave behind. A system's own Engine is not touched, nor its configuration read.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from support.docker_leftovers import kill_all, processes_naming, remove_cgroups, unmount_below
from support.server import REPOSITORY
from support.waiting import until

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 30.0
LOG_TAIL_BYTES: Final = 1500
API: Final = "v1.41"
IMAGE: Final = "hiver-test/busybox:latest"
"""A static busybox as /bin/sh and the usual programs; made where it is needed, from this host's own."""
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


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


class Engine:
    """A dockerd with its containerd. `start` returns when a container has run, `stop` when nothing is left."""

    def __init__(self, name: str, *, live_restore: bool = False) -> None:
        """`name` tells it from others on this host: `[a-z0-9-]`, short enough for UNIX sockets."""
        self.name = f"hiver-docker-{name}"
        self.run_dir = Path("/run", self.name)
        self.data_dir = Path("/var/tmp", self.name)
        self.socket = self.run_dir / "docker.sock"
        self.live_restore = live_restore

    @property
    def host(self) -> str:
        """For `DOCKER_HOST`."""
        return f"unix://{self.socket}"

    # Life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Removes what a crash left, then starts. `EngineFailed` with the reason where it cannot run."""
        if os.geteuid() != 0:
            raise EngineFailed("dockerd needs root")
        dockerd, containerd = (shutil.which(program, path=_PATH) for program in ("dockerd", "containerd"))
        if not dockerd or not containerd:
            raise EngineFailed("dockerd is not installed: build/setup.sh --tests")
        self.clean()
        self.run_dir.mkdir(mode=0o700)
        self.data_dir.mkdir(mode=0o711)
        try:
            self._configure()
            self._spawn(containerd, "--config", str(self.run_dir / "containerd.toml"))
            until((self.run_dir / "containerd.sock").exists, seconds=START_SECONDS, what="containerd listens")
            self.start_dockerd()
            self.import_image(IMAGE, _busybox())
            self._try_container()
        except (EngineFailed, TimeoutError, OSError) as error:
            reason = str(error) if isinstance(error, EngineFailed) else f"{error}\n{self.log_tail()}".strip()
            self.clean()
            raise EngineFailed(reason) from error

    def start_dockerd(self) -> None:
        """dockerd alone, as after `stop_dockerd`; returns when it answers."""
        program = shutil.which("dockerd", path=_PATH) or ""
        (self.run_dir / "docker.pid").unlink(missing_ok=True)  # one that was killed left it, and may be a zombie still
        self._spawn(program, "--config-file", str(self.run_dir / "daemon.json"))

        def up() -> bool:
            if not self.dockerd_pids():
                raise EngineFailed(f"dockerd ended before it answered\n{self.log_tail()}")
            return self.answers()

        until(lambda: bool(self.dockerd_pids()), seconds=5, what="dockerd runs")
        until(up, seconds=START_SECONDS, what="dockerd answers")

    def stop_dockerd(self, number: int = signal.SIGTERM) -> None:
        """Ends dockerd, not its containerd. What that does to containers is its own business (`live_restore`)."""
        for pid in self.dockerd_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        until(lambda: not self.dockerd_pids(), seconds=STOP_SECONDS, what="dockerd ended")

    def freeze(self) -> None:
        """Makes dockerd deaf: connections succeed, and nothing is answered."""
        for pid in self.dockerd_pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self.dockerd_pids():
            os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Removes all containers, ends everything, removes the folders."""
        self.thaw()
        with suppress(OSError, http.client.HTTPException, EngineFailed):
            for container in self.containers():
                self.call("DELETE", f"/containers/{container['Id']}?force=true&v=true")
        with suppress(TimeoutError):
            self.stop_dockerd()
        self.clean()

    def clean(self) -> None:
        """Kills and removes everything that bears this Engine's name, however it got there."""
        kill_all(f"{self.run_dir}/", seconds=STOP_SECONDS)
        for folder in (self.run_dir, self.data_dir):
            unmount_below(folder)
            shutil.rmtree(folder, ignore_errors=True)
        remove_cgroups(self.name)

    def dockerd_pids(self) -> list[int]:
        return processes_naming(str(self.run_dir / "daemon.json"))

    def _configure(self) -> None:
        daemon = {
            "data-root": str(self.data_dir / "data"),
            "exec-root": str(self.run_dir / "exec"),
            "pidfile": str(self.run_dir / "docker.pid"),
            "hosts": [self.host],
            "containerd": str(self.run_dir / "containerd.sock"),
            "storage-driver": _storage_driver(self.data_dir),
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": f"/{self.name}",
            "live-restore": self.live_restore,
            "shutdown-timeout": 5,
            "log-level": "warn",
            # The host's network is not its business.
            "bridge": "none",
            "iptables": False,
            "ip-forward": False,
            "userland-proxy": False,
        }
        (self.run_dir / "daemon.json").write_text(json.dumps(daemon))
        containerd = {"root": self.data_dir / "containerd", "state": self.run_dir / "containerd"}
        lines = ["version = 2", *(f'{key} = "{value}"' for key, value in containerd.items())]
        lines += ['disabled_plugins = ["io.containerd.grpc.v1.cri"]']
        lines += ["[grpc]", f'address = "{self.run_dir}/containerd.sock"']
        (self.run_dir / "containerd.toml").write_text("\n".join(lines) + "\n")

    def _spawn(self, *argv: str) -> None:
        """In a session of its own: it may outlive the process that started it."""
        with (self.run_dir / "log").open("ab") as log:
            argv = ("setsid", "--fork", *argv)
            environment = {"PATH": _PATH}
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def log_tail(self) -> str:
        with suppress(OSError):
            return (self.run_dir / "log").read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return ""

    # API ----------------------------------------------------------------------------------------------------------

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

    def run_detached(self, image: str, *argv: str) -> str:
        """A running container's id."""
        config = {"Image": image, "Cmd": list(argv), "HostConfig": {"NetworkMode": "none"}}
        container = str(self.call("POST", "/containers/create", config)["Id"])
        self.call("POST", f"/containers/{container}/start")
        return container

    def _try_container(self) -> None:
        """An Engine may start where its containers cannot: nested, without control groups, and the like."""
        container = self.run_detached(IMAGE, "/bin/true")
        code = self.call("POST", f"/containers/{container}/wait")["StatusCode"]
        self.call("DELETE", f"/containers/{container}?force=true")
        if code != 0:
            raise EngineFailed(f"a container that was to run `true` ended with {code}")


class SharedEngine:
    """The Engine of this checkout's test runs. Each process that uses it holds a shared lock while it does."""

    def __init__(self) -> None:
        mark = hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:6]
        self.engine = Engine(mark)
        self._folder = REPOSITORY / ".build"

    def __enter__(self) -> Engine:
        self._folder.mkdir(exist_ok=True)
        self._users = (self._folder / "docker.users").open("w")
        with self._gate():
            try:
                if self._alone() or not self.engine.answers():
                    self.engine.start()
            except BaseException:
                self._users.close()
                raise
            fcntl.flock(self._users, fcntl.LOCK_SH)
        return self.engine

    def __exit__(self, *_: object) -> None:
        with self._gate():
            try:
                if self._alone():
                    self.engine.stop()
            finally:
                self._users.close()

    def _alone(self) -> bool:
        """Nobody else uses it. Asked behind the gate, so that it stays true there."""
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def _gate(self) -> Iterator[None]:
        with (self._folder / "docker.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _storage_driver(folder: Path) -> str:
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


def _busybox() -> bytes:
    """A tar archive of a root that holds a static busybox under all its names."""
    program = shutil.which("busybox", path=_PATH)
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


def traces_in(engine: Engine, marks: Iterable[str]) -> Iterator[str]:
    """Containers and volumes of the Engine that bear a mark, one line each."""
    wanted = tuple(marks)
    for container in engine.containers():
        if any(mark in json.dumps(container) for mark in wanted):
            yield f"container {container['Id'][:12]} {container['Names']}: {container['Status']}"
    for volume in engine.call("GET", "/volumes").get("Volumes") or ():
        if any(mark in json.dumps(volume) for mark in wanted):
            yield f"volume {volume['Name']}"
