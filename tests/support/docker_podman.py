"""Podman's service, which speaks Docker's API: with folders, configuration and locks of its own. Nothing of it stays.

Podman has no daemon that keeps containers: each has a conmon, and the service may come and go.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
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
)
from support.docker_leftovers import processes_naming, remove_cgroups
from support.waiting import until

_GROUP: Final = "libpod_parent"
"""Control group of all containers of all Podmans of a host; goes when it is empty."""
_CACHE: Final = Path("/var/lib/containers/cache")
"""Where Podman notes which blobs it has seen, whatever its configuration says. It may go at any time."""
_FILES: Final = {
    "CONTAINERS_CONF": "containers.conf",
    "CONTAINERS_STORAGE_CONF": "storage.conf",
    "CONTAINERS_REGISTRIES_CONF": "registries.conf",
}

_ULIMITS: Final = tuple({"Name": name, "Soft": 1024, "Hard": 1024} for name in ("nofile", "nproc"))
"""Unasked it takes more than root without CAP_SYS_RESOURCE may have."""


class Podman(OwnEngine):
    """`podman system service` as root. `start` returns when a container has run, `stop` when nothing is left."""

    def __init__(self, name: str) -> None:
        """`name` tells it from others on this host: `[a-z0-9-]`, short enough for UNIX sockets."""
        super().__init__(f"hiver-podman-{name}")

    def start(self) -> None:
        """`EngineFailed` with the reason where it cannot run."""
        if os.geteuid() != 0:
            raise EngineFailed("podman needs root here")
        if not all(shutil.which(program, path=PATH) for program in ("podman", "conmon", "runc")):
            raise EngineFailed("podman is not installed: build/setup.sh --tests")
        self.clean()
        self.run_dir.mkdir(mode=0o700)
        self.data_dir.mkdir(mode=0o711)
        try:
            self._configure()
            self.start_service()
            self.import_image(IMAGE, busybox())
            self.try_container(Ulimits=list(_ULIMITS))
        except (EngineFailed, TimeoutError, OSError) as error:
            reason = str(error) if isinstance(error, EngineFailed) else f"{error}\n{self.log_tail()}".strip()
            self.clean()
            raise EngineFailed(reason) from error

    def start_service(self) -> None:
        """Returns when it answers."""
        program = shutil.which("podman", path=PATH) or ""
        variables = {name: str(self.run_dir / file) for name, file in _FILES.items()}
        self.spawn(program, "system", "service", "--time=0", self.host, variables=variables)
        until(self.answers, seconds=START_SECONDS, what="podman answers")

    def stop_service(self) -> None:
        """Its containers go on."""
        for pid in self.service_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        until(lambda: not self.service_pids(), seconds=STOP_SECONDS, what="podman's service ended")

    def stop(self) -> None:
        """Removes all containers, ends everything, removes the folders."""
        self.remove_containers()
        self.clean()

    def clean(self) -> None:
        super().clean()
        remove_cgroups(_GROUP)
        # A Podman of the system's has its images there, too.
        if _CACHE.exists() and os.listdir(_CACHE.parent) == [_CACHE.name]:
            shutil.rmtree(_CACHE.parent, ignore_errors=True)

    def service_pids(self) -> list[int]:
        return processes_naming(self.host)

    def _configure(self) -> None:
        """Nothing of the system's own configuration is read."""
        driver = storage_driver(self.data_dir).removesuffix("2")  # Docker counts its drivers of this name
        engine = {
            "cgroup_manager": "cgroupfs",
            "events_logger": "file",
            "image_copy_tmp_dir": f"{self.data_dir}/copies",
            "lock_type": "file",
            "runtime": "runc",
            "static_dir": f"{self.data_dir}/static",
            "tmp_dir": f"{self.run_dir}/tmp",
            "volume_path": f"{self.data_dir}/volumes",
        }
        tables = {
            "containers.conf": {"engine": engine, "network": {"network_config_dir": f"{self.run_dir}/networks"}},
            "storage.conf": {
                "storage": {
                    "driver": driver,
                    "graphroot": f"{self.data_dir}/storage",
                    "runroot": f"{self.run_dir}/storage",
                },
            },
            "registries.conf": {},
        }
        for name, content in tables.items():
            lines = [line for table, members in content.items() for line in _toml(table, members)]
            (self.run_dir / name).write_text("\n".join(lines) + "\n")
        (self.data_dir / "copies").mkdir()


def _toml(table: str, members: Mapping[str, str]) -> list[str]:
    return [f"[{table}]", *(f'{key} = "{value}"' for key, value in members.items())]
