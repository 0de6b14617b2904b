"""Object stores on loopback, one process per test worker: moto for S3, azurite for Azure."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final

from support.server import REPOSITORY, clean_environment
from support.waiting import until

AZURITE_VERSION: Final = "3.37.0"
AZURITE_ACCOUNT: Final = "devstoreaccount1"
AZURITE_KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The same for every azurite; it is published with it."""

# One request at a time: moto judges a condition and then writes, without a lock.
_MOTO: Final = """
import sys
from moto.server import create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

class Quiet(WSGIRequestHandler):
    def log_request(self, *args, **options):
        pass

server = make_server("127.0.0.1", 0, create_backend_app("s3"), threaded=False, request_handler=Quiet)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def moto() -> Iterator[int]:
    """The port of an S3 service; it takes any key."""
    with _serving([sys.executable, "-P", "-c", _MOTO]) as (process, _):
        assert process.stdout is not None
        yield int(process.stdout.readline())


@contextlib.contextmanager
def azurite() -> Iterator[int]:
    """The port of an Azure blob service."""
    program = _installed_azurite()
    options = ("--blobPort", "0", "--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry")
    with _serving(["node", str(program), *options]) as (process, log):
        yield until(lambda: _listening_port(process, log), seconds=60, what="azurite listens")


def _listening_port(process: subprocess.Popen[str], log: IO[bytes]) -> int | None:
    said = os.pread(log.fileno(), 1 << 16, 0).decode()
    assert process.poll() is None, said
    for line in said.splitlines():
        if "listens on http://127.0.0.1:" in line:
            return int(line.rpartition(":")[2])
    return None


def _installed_azurite() -> Path:
    """Fetched once for this work tree."""
    folder = REPOSITORY / ".build" / f"azurite-{AZURITE_VERSION}"
    program = folder / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    done = folder / "done"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"]
            subprocess.run([*install, str(folder), f"azurite@{AZURITE_VERSION}"], check=True, timeout=240)
            done.touch()
    return program


@contextlib.contextmanager
def _serving(argv: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], IO[bytes]]]:
    """A process, and the nameless file that has what it says (its errors alone, if it is to be read from). It ends with
    this one, also when this one is killed."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=log if argv[0] == "node" else subprocess.PIPE,
            stderr=log,
            text=True,
            env=clean_environment({}),
        )
        try:
            yield process, log
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def main() -> None:
    """Installs what comes from elsewhere, so that the tests themselves need no network."""
    _installed_azurite()


if __name__ == "__main__":
    main()
