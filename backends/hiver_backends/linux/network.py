"""What listens in a network namespace, from /proc/<pid>/net (proc_pid_net(5))."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path
from typing import Final

from hiverd.contracts.isolation import GATE_ADDRESS

_LISTEN: Final = "0A"
_GATE: Final = f"{int.from_bytes(socket.inet_aton(GATE_ADDRESS), sys.byteorder):08X}:"


def listening_ports(pid: int) -> frozenset[int]:
    """TCP ports with a listener, IPv4 or IPv6. Raises `OSError` if the process is gone."""
    ports = parse_listeners(Path("/proc", str(pid), "net", "tcp").read_text())
    with contextlib.suppress(FileNotFoundError):
        ports |= parse_listeners(Path("/proc", str(pid), "net", "tcp6").read_text())
    return ports


def parse_listeners(table: str) -> frozenset[int]:
    """Ports of the lines in state LISTEN, without the core's own; `local_address` is `ADDRESS:PORT` in hexadecimal."""
    ports = set()
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 3 and fields[3] == _LISTEN and not fields[1].startswith(_GATE):
            ports.add(int(fields[1].rpartition(":")[2], 16))
    return frozenset(ports)
