"""A trial sandbox at the start: does all of this really work here, and does the runtime withstand a known escape?"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from pathlib import Path
from typing import Final

from hiver_backends.linux import bundle
from hiverd.contracts.errors import HiverError, UnavailableError
from hiverd.contracts.isolation import ExecSpec, Isolation, Workload, WorkloadSpec

from . import confinement
from .documents import PASSING_PREFIX

_MEMORY_BYTES: Final = 64 << 20
_LEAK_CANDIDATES: Final = range(3, 12)


async def run(isolation: Isolation, folder: Path, *, seccomp: bool) -> None:
    """`folder` is for the trial's volume; `seccomp`: the Engine filters system calls. Raises `UnavailableError` saying
    what does not work."""
    image = await isolation.resolve_image("host", lambda _: None)
    sandbox_id = f"{PASSING_PREFIX}{secrets.token_hex(4)}"
    volume = folder / sandbox_id
    await asyncio.to_thread(lambda: volume.mkdir(mode=0o700, parents=True))
    spec = WorkloadSpec(
        sandbox_id=sandbox_id, key="probe", slot=0, image=image, volume=volume, hostname="probe", cpu=1.0,
        memory_bytes=_MEMORY_BYTES, pids_max=64, argv=(), tty=False, cwd="/", env={},
    )  # fmt: skip
    try:
        workload = await isolation.create(spec)
        try:
            await workload.begin()
            await _check(workload)
            await _check_confinement(int(workload.state["pid"]), seccomp=seccomp)
        finally:
            await workload.close()
    except HiverError as error:
        raise UnavailableError(f"the isolation plug-in docker does not work here: {error.message}") from error
    finally:
        await isolation.destroy(sandbox_id, None)
        await asyncio.to_thread(shutil.rmtree, volume, ignore_errors=True)


async def _check(workload: Workload) -> None:
    code = await _execute(workload, "/")
    if code != 0:
        raise UnavailableError(f"a command ends with exit code {code}")
    # CVE-2024-21626: a working directory behind a descriptor that the runtime forgot to close is the host's.
    codes = await asyncio.gather(*(_execute(workload, f"/proc/self/fd/{number}") for number in _LEAK_CANDIDATES))
    if 0 in codes:
        raise UnavailableError(
            "the runtime below Docker lets a sandbox's working directory be a folder of the host (CVE-2024-21626):"
            " upgrade it (apt-get install --only-upgrade runc containerd.io)"
        )


async def _check_confinement(pid: int, *, seccomp: bool) -> None:
    try:
        missing = await asyncio.to_thread(lambda: confinement.missing(pid, seccomp=seccomp))
    except OSError as error:
        raise UnavailableError(f"the trial sandbox has ended: {error}") from error
    if missing:
        raise UnavailableError(f"the engine does not confine a container as it is asked to: {', '.join(missing)}")


async def _execute(workload: Workload, cwd: str) -> int:
    spec = ExecSpec(exec_id=secrets.token_hex(4), argv=(bundle.INIT_PATH, "--version"), cwd=cwd)
    try:
        process = await workload.exec(spec)
    except HiverError:
        if cwd == "/":
            raise
        return -1  # refused, which is right
    try:
        async for _ in process.output():
            pass
        return await process.wait()
    finally:
        await process.close()
