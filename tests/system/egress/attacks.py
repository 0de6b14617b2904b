"""Scripts that a hostile agent runs inside a sandbox, and what is on record of them (docs/egress-bypasses.md)."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final

_PRELUDE: Final = """
import contextlib, ctypes, errno, fcntl, json, os, socket, ssl, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
outcomes = {}
SECONDS = 3
socket.setdefaulttimeout(SECONDS)

def attack(function, *arguments, name=None):
    try:
        outcome = function(*arguments)
    except OSError as error:
        number = None if isinstance(error, ssl.SSLError) else error.errno
        outcome = errno.errorcode.get(number, type(error).__name__)
    outcomes[name or function.__name__] = outcome

def syscall(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")
    return "done"

def command(*argv):
    return subprocess.run(argv, capture_output=True, timeout=20).returncode

def exchange(data, address, family=socket.AF_INET, prepare=None, half_close=False):
    '''Sends bytes over TCP and returns what comes back, as text; at least an empty one if it was let in.'''
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(SECONDS)
        if prepare is not None:
            prepare(sock)
        sock.connect(address)
        for piece in [data] if isinstance(data, bytes) else data:
            sock.sendall(piece)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while piece := sock.recv(65536):
                answer += piece
        except TimeoutError:
            answer += b"[silence]"
        except ConnectionResetError:
            answer += b"[reset]"
        return answer.decode("latin-1")

"""

_END: Final = "\nprint(json.dumps(outcomes))\n"


async def run_attacks(sandbox: Any, script: str) -> dict[str, Any]:
    """Runs attacks written with the helpers above; the outcome of each by its name: what it returned, or an errno."""
    await sandbox.write("/tmp/attacks.py", _PRELUDE + script + _END)
    output = await sandbox.run(["python3", "/tmp/attacks.py"])
    assert output.exit_code == 0, output.stderr[-3000:]
    outcomes = json.loads(output.stdout.splitlines()[-1])
    assert isinstance(outcomes, dict)
    return outcomes


def others(outcomes: dict[str, Any], expected: Collection[object]) -> dict[str, Any]:
    """The attacks that ended in another way than these."""
    return {name: outcome for name, outcome in outcomes.items() if outcome not in expected}


def denials(events: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """(host, method, path) of every denied request that also has its response, as each must."""
    answered = {event["request_id"] for event in events if event["type"] == "egress.response"}
    denied = [event for event in events if event.get("access") == "denied"]
    assert all(event["id"] in answered for event in denied), "a denial without a response"
    return {(event["host"], event["method"], event["path"]) for event in denied}


def allowances(events: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The same of what was allowed."""
    return [(event["host"], event["method"], event["path"]) for event in events if event.get("access") == "allowed"]


def packet(protocol: str, target: str) -> tuple[str, str, str]:
    """How a refused packet is on record."""
    return (target, "?", f"/{protocol}")
