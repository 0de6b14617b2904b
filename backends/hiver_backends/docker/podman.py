"""Podman's service takes the same requests as Docker, but not all of their members: some it wants in another form,
others it passes over in silence. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_SECCOMP: Final = "seccomp="
_ULIMITS: Final = (
    {"Name": "nofile", "Soft": 1024, "Hard": 4096},
    {"Name": "nproc", "Soft": 32_768, "Hard": 32_768},
)
"""Of process 1 alone, which needs little. Unasked, Podman gives it more than a server without CAP_SYS_RESOURCE may."""


def container(config: Mapping[str, Any], seccomp_file: Path) -> dict[str, Any]:
    """The body of POST /containers/create as Podman understands it.

    It reads the system call filter from a file, not from the request, and knows what is to be hidden only as a security
    option. What it makes read-only of itself is what we ask for.
    """
    host = dict(config["HostConfig"])
    security = [option for option in host["SecurityOpt"] if not option.startswith(_SECCOMP)]
    if len(security) < len(host["SecurityOpt"]):
        security.append(f"{_SECCOMP}{seccomp_file}")
    security.append("mask=" + ":".join(host.pop("MaskedPaths")))
    return {**config, "HostConfig": {**host, "SecurityOpt": security, "Ulimits": [dict(limit) for limit in _ULIMITS]}}
