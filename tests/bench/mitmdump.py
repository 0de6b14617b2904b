"""mitmproxy's mitmdump beside us, in an environment of its own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support.server import REPOSITORY, free_port

ENVIRONMENT: Final = REPOSITORY / ".build" / "mitmproxy"
START_SECONDS: Final = 30.0


@contextlib.contextmanager
def running(upstream_port: int, folder: Path) -> Iterator[int]:
    """Intercepts TLS to the upstream on this host; the port where it listens."""
    port = free_port()
    argv = [str(_program()), "--quiet", "--mode", f"reverse:https://127.0.0.1:{upstream_port}"]
    argv += ["--listen-host", "127.0.0.1", "--listen-port", str(port), "--set", f"confdir={folder / 'mitmproxy'}"]
    with subprocess.Popen([*argv, "--ssl-insecure"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_until_listening(port)
            yield port
        finally:
            process.kill()


def _program() -> Path:
    """Installed at first use."""
    program = ENVIRONMENT / "bin" / "mitmdump"
    if not program.exists():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "mitmproxy"], check=True)
    return program


def _wait_until_listening(port: int) -> None:
    deadline_monotonic = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline_monotonic:
                raise
            time.sleep(0.05)
