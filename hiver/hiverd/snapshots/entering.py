"""Entering a sandbox's namespaces, for good: before anything hostile is read. For a process with one thread."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Final

_NAMESPACES: Final = {
    "user": 0x10000000,
    "mnt": 0x00020000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}
"""All but the one of processes: nobody in the sandbox is to see this process (setns(2), Linux 5.8)."""
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAPBSET_DROP: Final = 24
_PR_SET_DUMPABLE: Final = 4
_SIGKILL: Final = 9
_KEPT_CAPABILITIES: Final = {0, 1, 3, 4, 31}
"""CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETFCAP (capabilities(7))."""
_LAST_CAPABILITY: Final = Path("/proc/sys/kernel/cap_last_cap")
_CAPABILITY_VERSION_3: Final = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends. Forgotten when ids change: say it again."""
    _call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def enter(process: int, root: int) -> int:
    """`process`: a pidfd of a process of the sandbox; `root`: its root folder. Returns a descriptor of that root as it
    is seen from inside. Afterwards this process is the sandbox's root user, with the rights to make files alone.

    Raises `OSError`.
    """
    last_capability = int(_LAST_CAPABILITY.read_text())
    flags = sum(flag for name, flag in _NAMESPACES.items() if _differs(process, name))
    _call("setns", process, flags)
    os.fchdir(root)
    os.chroot(".")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    os.umask(0)
    _keep_capabilities(last_capability)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    die_with_parent()
    return os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _differs(process: int, name: str) -> bool:
    pid = _pid_of(process)
    return os.readlink(f"/proc/self/ns/{name}") != os.readlink(f"/proc/{pid}/ns/{name}")


def _pid_of(process: int) -> int:
    """Raises `ProcessLookupError` if it has ended: its number may be another's."""
    found = re.search(r"^Pid:\s*(-?\d+)$", Path(f"/proc/self/fdinfo/{process}").read_text(), re.MULTILINE)
    pid = int(found[1]) if found else -1
    if pid <= 0:
        raise ProcessLookupError
    return pid


def _keep_capabilities(last: int) -> None:
    for number in range(last + 1):
        if number not in _KEPT_CAPABILITIES:
            _call("prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)
    bits = sum(1 << number for number in _KEPT_CAPABILITIES)
    sets = (_Set * 2)(_Set(bits, bits, 0), _Set(0, 0, 0))
    header = _Header(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(ctypes.byref(header), sets) < 0:
        _fail("capset")


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        _fail(name)


def _fail(name: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), name)
