"""The gRPC client for Node, from the npm registry, ready to be unpacked inside a sandbox."""

from __future__ import annotations

import fcntl
import subprocess

from support.server import REPOSITORY

_VERSION = "1.14.7"


def archive() -> bytes:
    """A gzipped tar with `node_modules`. Fetched once for this work tree."""
    folder = REPOSITORY / ".build" / f"grpc-js-{_VERSION}"
    packed = folder / "node_modules.tar.gz"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not packed.exists():
            install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"]
            subprocess.run([*install, str(folder), f"@grpc/grpc-js@{_VERSION}"], check=True, timeout=240)
            unfinished = folder / "unfinished.tar.gz"
            subprocess.run(["tar", "-czf", unfinished, "-C", folder, "node_modules"], check=True, timeout=60)
            unfinished.rename(packed)
    return packed.read_bytes()
