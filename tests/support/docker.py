"""A Docker Engine for the tests alone: its own folders, sockets and containerd, and nothing of it stays.

One is shared by all processes of a test run: whoever comes first starts it, whoever leaves last stops it, both told by
file locks, which a crash cannot leave behind. A system's own Engine is not touched, nor its configuration read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from support.docker_api import (
    IMAGE,
    PATH,
    START_SECONDS,
    STOP_SECONDS,
    EngineFailed,
    OwnEngine,
    busybox,
    storage_driver,
    traces_in,
)
from support.docker_leftovers import processes_naming
from support.server import REPOSITORY
from support.waiting import until

__all__ = ["FIRST_MAPPED_ID", "IMAGE", "Engine", "EngineFailed", "SharedEngine", "traces_in"]

FIRST_MAPPED_ID: Final = 2_200_000
"""Of the host: what root of a container is where the Engine maps user ids."""
_LENDERS: Final = ("nobody", "nogroup")
"""User and group of the system that lend their names to the range of ids."""


class Engine(OwnEngine):
    """A dockerd with its containerd. `start` returns when a container has run, `stop` when nothing is left."""

    def __init__(self, name: str, *, live_restore: bool = False, userns_remap: bool = False, tcp_port: int = 0) -> None:
        """`name` tells it from others on this host: `[a-z0-9-]`, short enough for UNIX sockets. `userns_remap`: root of
        its containers is another user of the host. `tcp_port`: it listens on 127.0.0.1 as well."""
        super().__init__(f"hiver-docker-{name}")
        self.live_restore = live_restore
        self.userns_remap = userns_remap
        self.tcp_port = tcp_port

    # Life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Removes what a crash left, then starts. `EngineFailed` with the reason where it cannot run."""
        if os.geteuid() != 0:
            raise EngineFailed("dockerd needs root")
        dockerd, containerd = (shutil.which(program, path=PATH) for program in ("dockerd", "containerd"))
        if not dockerd or not containerd:
            raise EngineFailed("dockerd is not installed: build/setup.sh --tests")
        self.clean()
        self.run_dir.mkdir(mode=0o711 if self.userns_remap else 0o700)
        self.data_dir.mkdir(mode=0o711)
        try:
            self._configure()
            self.spawn(containerd, "--config", str(self.run_dir / "containerd.toml"))
            until((self.run_dir / "containerd.sock").exists, seconds=START_SECONDS, what="containerd listens")
            self.start_dockerd()
            self.import_image(IMAGE, busybox())
            self.try_container()
        except (EngineFailed, TimeoutError, OSError) as error:
            reason = str(error) if isinstance(error, EngineFailed) else f"{error}\n{self.log_tail()}".strip()
            self.clean()
            raise EngineFailed(reason) from error

    def start_dockerd(self) -> None:
        """dockerd alone, as after `stop_dockerd`; returns when it answers."""
        program = shutil.which("dockerd", path=PATH) or ""
        (self.run_dir / "docker.pid").unlink(missing_ok=True)  # one that was killed left it, and may be a zombie still
        self.spawn(*self._seeing_ids(), program, "--config-file", str(self.run_dir / "daemon.json"))

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
        self.remove_containers()
        with suppress(TimeoutError):
            self.stop_dockerd()
        self.clean()

    def _seeing_ids(self) -> tuple[str, ...]:
        """dockerd reads ranges of ids from the system's files alone."""
        if not self.userns_remap:
            return ()
        ids = self.run_dir / "ids"
        ids.write_text(f"{_LENDERS[0]}:{FIRST_MAPPED_ID}:65536\n")
        return self.own_view(dict.fromkeys(("/etc/subuid", "/etc/subgid"), f"--bind {ids}"))

    def dockerd_pids(self) -> list[int]:
        return processes_naming(str(self.run_dir / "daemon.json"))

    def _configure(self) -> None:
        daemon = {
            "data-root": str(self.data_dir / "data"),
            "exec-root": str(self.run_dir / "exec"),
            "pidfile": str(self.run_dir / "docker.pid"),
            "hosts": [self.host, *([f"tcp://127.0.0.1:{self.tcp_port}"] if self.tcp_port else [])],
            "containerd": str(self.run_dir / "containerd.sock"),
            "storage-driver": storage_driver(self.data_dir),
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
        if self.userns_remap:
            daemon["userns-remap"] = ":".join(_LENDERS)
        (self.run_dir / "daemon.json").write_text(json.dumps(daemon))
        containerd = {"root": self.data_dir / "containerd", "state": self.run_dir / "containerd"}
        lines = ["version = 2", *(f'{key} = "{value}"' for key, value in containerd.items())]
        lines += ['disabled_plugins = ["io.containerd.grpc.v1.cri"]']
        lines += ["[grpc]", f'address = "{self.run_dir}/containerd.sock"']
        (self.run_dir / "containerd.toml").write_text("\n".join(lines) + "\n")


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
