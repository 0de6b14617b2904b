"""An entrypoint that is run in a container beside its process 1, under a monitor that outlives the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any, Final

from hiverd.contracts.errors import BackendError

from .children import UNKNOWN_EXIT
from .conmon import Conmon, Monitor
from .inotify import Inotify
from .runtime import start_failure
from .terminal import record_failure

_EXIT_FILE_SECONDS: Final = 10.0


async def begin(conmon: Conmon, container_id: str, monitor: Monitor, process: Mapping[str, Any]) -> None:
    """Starts `process` (an OCI process document). That it cannot run is not an error: it is in its output, with an
    exit code, as a shell would have it (PROTOCOL 0.8)."""
    for folder in (monitor.folder, monitor.exit_dir):
        folder.mkdir(mode=0o700, exist_ok=True)
    document = monitor.folder / "process.json"
    descriptor = os.open(document, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(process, file)
    terminal = bool(process["terminal"])
    try:
        await conmon.exec_session(container_id, monitor, document, terminal=terminal)
    except BackendError as error:
        verdict = start_failure(error.message, process["args"], process["cwd"])
        if verdict is None:
            raise
        record_failure(monitor, container_id, *verdict, stream="stdout" if terminal else "stderr")
    finally:
        document.unlink(missing_ok=True)


async def exit_code(monitor: Monitor, container_id: str, inotify: Inotify) -> int:
    """The exit code that conmon records a moment after the end of what it watches."""
    with contextlib.suppress(FileNotFoundError, TimeoutError):
        watch = inotify.watch(monitor.exit_dir)
        try:
            async with asyncio.timeout(_EXIT_FILE_SECONDS):
                while (code := monitor.exit_code(container_id)) is None:
                    if not monitor.is_running(container_id):
                        break
                    await watch.wait(1.0)
        finally:
            watch.close()
    code = monitor.exit_code(container_id)
    return UNKNOWN_EXIT if code is None else code
