"""A Docker Engine that runs as an ordinary user, in a user namespace: `dockerd-rootless.sh` without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

from support.docker_api import PATH, START_SECONDS, EngineFailed, OwnEngine
from support.docker_leftovers import processes_naming
from support.waiting import until

_USER: Final = ("nobody", 65_534, 65_534)
"""Name, user id and group id of who has nothing on this host."""
_LENT: Final = (2_300_000, 65_536)
"""First id and number of the ids that it may use besides its own."""


class RootlessEngine(OwnEngine):
    """`start` returns when it answers; containers are not tried, as it may have no control groups."""

    def __init__(self, name: str) -> None:
        """`name` tells it from others on this host: `[a-z0-9-]`, short enough for UNIX sockets."""
        super().__init__(f"hiver-rootless-{name}")

    def start(self) -> None:
        """`EngineFailed` with the reason where it cannot run."""
        if os.geteuid() != 0:
            raise EngineFailed("an engine of another user needs root to start")
        if not all(shutil.which(program, path=PATH) for program in ("dockerd", "rootlesskit", "newuidmap")):
            raise EngineFailed("rootless docker is not installed: build/setup.sh --tests")
        self.clean()
        for folder in (self.run_dir, self.data_dir):
            folder.mkdir(mode=0o700)
            os.chown(folder, *_USER[1:])
        try:
            self._spawn()
            until(self._up, seconds=START_SECONDS, what="rootless dockerd answers")
        except (EngineFailed, TimeoutError, OSError, subprocess.SubprocessError) as error:
            reason = f"{error}\n{self.log_tail()}".strip()
            self.clean()
            raise EngineFailed(reason) from error

    def stop(self) -> None:
        """Ends everything, removes the folders."""
        self.clean()

    def _up(self) -> bool:
        if not processes_naming(f"{self.run_dir}/"):
            raise EngineFailed("rootless dockerd ended before it answered")
        return self.answers()

    def _spawn(self) -> None:
        """Ranges of ids are read from the system's files alone, so it gets a view of its own of them."""
        _, uid, gid = _USER
        first, count = _LENT
        (self.run_dir / "ids").write_text(f"{_USER[0]}:{first}:{count}\n")
        view = f'for f in subuid subgid; do mount --bind {self.run_dir}/ids /etc/$f || exit; done; exec "$@"'
        user = ("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups")
        kit = ("rootlesskit", f"--state-dir={self.run_dir}/kit", "--net=host", "--copy-up=/etc", "--copy-up=/run")
        # What --copy-up has linked there is the host's.
        own_run = ("sh", "-c", 'rm -f /run/docker /run/containerd && exec "$@"', "sh")
        daemon = ["dockerd", f"--host={self.host}", f"--data-root={self.data_dir}/data", "--rootless"]
        daemon += [f"--exec-root={self.run_dir}/exec", f"--pidfile={self.run_dir}/docker.pid", "--config-file="]
        daemon += [
            "--storage-driver=vfs",
            "--bridge=none",
            "--iptables=false",
            "--ip-forward=false",
            "--log-level=warn",
        ]
        variables = {"HOME": str(self.run_dir), "XDG_RUNTIME_DIR": str(self.run_dir), "USER": _USER[0]}
        self.spawn("unshare", "--mount", "sh", "-c", view, "sh", *user, *kit, *own_run, *daemon, variables=variables)
