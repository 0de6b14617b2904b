"""Engines that run as an ordinary user, in a user namespace. They answer; containers are not tried on them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import ClassVar, Final

from support.docker_api import PATH, START_SECONDS, EngineFailed, OwnEngine
from support.docker_leftovers import processes_naming
from support.waiting import until

USER_ID: Final = 65_534
_USER: Final = "nobody"
"""Who has nothing on this host."""
_FIRST_LENT: Final = 2_300_000
"""Of the ids that it may use besides its own."""


class RootlessEngine(OwnEngine, ABC):
    """`start` returns when it answers, `stop` when nothing is left."""

    programs: ClassVar[tuple[str, ...]]

    def __init__(self, name: str) -> None:
        """`name` tells it from others on this host: `[a-z0-9-]`, short enough for UNIX sockets."""
        super().__init__(f"hiver-rootless-{name}")

    @abstractmethod
    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """The engine's argv and what is special about its environment."""

    def start(self) -> None:
        """`EngineFailed` with the reason where it cannot run."""
        if os.geteuid() != 0:
            raise EngineFailed("an engine of another user needs root to start")
        if not all(shutil.which(program, path=PATH) for program in self.programs):
            raise EngineFailed(f"{' or '.join(self.programs)} is not installed: build/setup.sh --tests")
        self.clean()
        for folder in (self.run_dir, self.data_dir):
            folder.mkdir(mode=0o700)
            os.chown(folder, USER_ID, USER_ID)
        try:
            self._spawn()
            until(self._up, seconds=START_SECONDS, what="the engine without root answers")
        except (EngineFailed, TimeoutError, OSError, subprocess.SubprocessError) as error:
            reason = f"{error}\n{self.log_tail()}".strip()
            self.clean()
            raise EngineFailed(reason) from error

    def stop(self) -> None:
        """Ends everything, removes the folders."""
        self.clean()

    def _up(self) -> bool:
        if not processes_naming(f"{self.run_dir}/"):
            raise EngineFailed("the engine without root ended before it answered")
        return self.answers()

    def _spawn(self) -> None:
        """Ranges of ids are read from the system's files alone, so it gets a view of its own of them."""
        (self.run_dir / "ids").write_text(f"{_USER}:{_FIRST_LENT}:65536\n")
        view = f'for f in subuid subgid; do mount --bind {self.run_dir}/ids /etc/$f || exit; done; exec "$@"'
        user = ("setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups")
        argv, special = self.command()
        variables = {"HOME": str(self.run_dir), "XDG_RUNTIME_DIR": str(self.run_dir), "USER": _USER, **special}
        self.spawn("unshare", "--mount", "sh", "-c", view, "sh", *user, *argv, variables=variables)


class RootlessDocker(RootlessEngine):
    """As `dockerd-rootless.sh` starts it, but without a network of its own."""

    programs = ("dockerd", "rootlesskit", "newuidmap")

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        kit = ["rootlesskit", f"--state-dir={self.run_dir}/kit", "--net=host", "--copy-up=/etc", "--copy-up=/run"]
        # What --copy-up has linked there is the host's.
        own_run = ["sh", "-c", 'rm -f /run/docker /run/containerd && exec "$@"', "sh"]
        daemon = ["dockerd", f"--host={self.host}", f"--data-root={self.data_dir}/data", "--rootless"]
        daemon += [f"--exec-root={self.run_dir}/exec", f"--pidfile={self.run_dir}/docker.pid", "--config-file="]
        daemon += ["--storage-driver=vfs", "--bridge=none", "--iptables=false", "--ip-forward=false"]
        return [*kit, *own_run, *daemon, "--log-level=warn"], {}


class RootlessPodman(RootlessEngine):
    """An ordinary user's `podman system service`."""

    programs = ("podman", "newuidmap")

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        configuration = self.run_dir / "containers.conf"
        configuration.write_text(f'[engine]\nlock_type = "file"\nvolume_path = "{self.data_dir}/volumes"\n')
        argv = ["podman", "--root", f"{self.data_dir}/storage", "--runroot", f"{self.run_dir}/storage"]
        argv += ["--tmpdir", f"{self.run_dir}/tmp", "--storage-driver=vfs", "--cgroup-manager=cgroupfs"]
        argv += ["system", "service", "--time=0", self.host]
        return argv, {"CONTAINERS_CONF": str(configuration)}

    def clean(self) -> None:
        """The process that keeps Podman's namespaces names no folder."""
        for file in self.run_dir.rglob("pause.pid"):
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        super().clean()
