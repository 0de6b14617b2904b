"""What listens in a network namespace, from /proc/<pid>/net (proc_pid_net(5))."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

_LISTEN: Final = "0A"


def listening_ports(pid: int) -> frozenset[int]:
    """TCP ports with a listener, IPv4 or IPv6. Raises `OSError` if the process is gone."""
    ports = parse_listeners(Path("/proc", str(pid), "net", "tcp").read_text())
    with contextlib.suppress(FileNotFoundError):
        ports |= parse_listeners(Path("/proc", str(pid), "net", "tcp6").read_text())
    return ports


def parse_listeners(table: str) -> frozenset[int]:
    """Ports of the lines in state LISTEN; `local_address` ends with the port in hexadecimal."""
    ports = set()
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 3 and fields[3] == _LISTEN:
            ports.add(int(fields[1].rpartition(":")[2], 16))
    return frozenset(ports)
