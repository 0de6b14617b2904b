"""A probing run: does a runtime really work here, with our configuration, and does it withstand a known escape?

The trial sandbox is made with the same code as every other; its only program is the static init. Blocking calls.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from hiverd.contracts.isolation import Image, WorkloadSpec

from . import bundle
from .cgroups import Cgroups
from .rootfs import RootFs, unmount_below
from .runtime import ENVIRONMENT, Runtime, last_error

PREFIX: Final = "probe-"
"""Of the ids of trial sandboxes."""
_RUN_SECONDS: Final = 30.0
_LEAK_CANDIDATES: Final = range(3, 12)
_AT_ONCE: Final = 3


class TrialError(Exception):
    """The runtime does not work here; the text says why, for the operator."""


class Trial:
    """Runs trials in `folder`, which is removed afterwards. `host_id` is the first id of the range to try."""

    def __init__(
        self, folder: Path, init: str, cgroups: Cgroups, rootfs: RootFs, seccomp: Mapping[str, Any] | None, host_id: int
    ) -> None:
        self._folder = folder
        self._init = init
        self._cgroups = cgroups
        self._rootfs = rootfs
        self._seccomp = seccomp
        self._host_id = host_id

    def run(self, runtime: Runtime) -> None:
        """Raises `TrialError`."""
        sandbox_id = f"{PREFIX}{secrets.token_hex(4)}"
        folder = self._folder / sandbox_id
        try:
            self._build(folder, sandbox_id, runtime)
            self._call(runtime, folder, "run", "--detach", "--bundle", str(folder), sandbox_id)
            self._execute(runtime, folder, sandbox_id, "/")
            self._check_leaked_descriptors(runtime, folder, sandbox_id)
        except (OSError, subprocess.SubprocessError) as error:
            raise TrialError(str(error)) from error
        finally:
            self._remove(folder, sandbox_id, runtime)

    def sweep(self) -> None:
        """Removes the trials of killed servers. Not while a trial of the same instance runs."""
        names = {path.name for path in self._folder.glob(f"{PREFIX}*")}
        names |= {name for name in self._cgroups.owned() if name.startswith(PREFIX)}
        for name in names:
            with contextlib.suppress(TimeoutError):
                self._cgroups.remove(name, timeout_seconds=5)
            unmount_below(self._folder / name)
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _build(self, folder: Path, sandbox_id: str, runtime: Runtime) -> None:
        folder.mkdir(mode=0o711)
        for name in ("image", "volume", "state"):
            (folder / name).mkdir(mode=0o755)
        host_id = self._host_id if runtime.userns else None
        self._rootfs.mount(((folder / "image", ""),), folder / "volume", folder / "rootfs", host_id, {})
        spec = WorkloadSpec(
            sandbox_id=sandbox_id, key="probe", slot=0, image=Image(reference="probe", handle=""),
            volume=folder / "volume", hostname="probe", cpu=1.0, memory_bytes=64 << 20, pids_max=64, argv=(), tty=False,
            cwd="/", env={},
        )  # fmt: skip
        layout = bundle.Layout(
            rootfs=str(folder / "rootfs"),
            init=self._init,
            cgroups_path=self._cgroups.path(sandbox_id),
            host_id=host_id,
            unified_cgroups=self._cgroups.unified,
            swap_limit=self._cgroups.has_swap_limit(),
            seccomp=self._seccomp,
            tty_session=False,
        )
        (folder / "config.json").write_text(json.dumps(bundle.configuration(spec, layout)))

    def _execute(self, runtime: Runtime, folder: Path, sandbox_id: str, cwd: str) -> None:
        process = bundle.process([bundle.INIT_PATH, "--version"], {}, cwd, terminal=False)
        document = folder / f"process-{secrets.token_hex(4)}.json"
        document.write_text(json.dumps(process))
        self._call(runtime, folder, "exec", "--process", str(document), sandbox_id)

    def _check_leaked_descriptors(self, runtime: Runtime, folder: Path, sandbox_id: str) -> None:
        """CVE-2024-21626: a working directory behind a descriptor that the runtime forgot to close is the host's."""

        def refuses(number: int) -> bool:
            try:
                self._execute(runtime, folder, sandbox_id, f"/proc/self/fd/{number}")
            except TrialError:
                return True
            return False

        # At once, since the first answer of a fresh server waits for it.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            if not all(pool.map(refuses, _LEAK_CANDIDATES)):
                raise VulnerableRuntimeError

    def _call(self, runtime: Runtime, folder: Path, *arguments: str) -> None:
        log = folder / f"runtime-{secrets.token_hex(4)}.log"
        argv = [runtime.path, *runtime.global_arguments(folder / "state", log), *arguments]
        null = subprocess.DEVNULL
        result = subprocess.run(
            argv, env=ENVIRONMENT, stdin=null, stdout=null, stderr=null, timeout=_RUN_SECONDS, check=False, cwd="/"
        )
        if result.returncode != 0:
            raise TrialError(last_error(log) or f"{arguments[0]}: exit code {result.returncode}")

    def _remove(self, folder: Path, sandbox_id: str, runtime: Runtime) -> None:
        with contextlib.suppress(TrialError, OSError, subprocess.SubprocessError):
            self._call(runtime, folder, "delete", "--force", sandbox_id)
        with contextlib.suppress(TimeoutError):
            self._cgroups.remove(sandbox_id, timeout_seconds=5)
        unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)


class VulnerableRuntimeError(Exception):
    """The runtime lets a sandbox's working directory be a folder of the host (CVE-2024-21626)."""
