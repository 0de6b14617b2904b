"""What a worker gives up before it runs a script. Linux; by prctl(2), setrlimit(2) and a seccomp filter.

The Lua machine is what keeps a script in; this is what is left to one that has broken out of it: memory and processor
time within limits, and reading and writing on the descriptors that it has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
from typing import Final

from hiverd.egress.script_frames import CPU_SECONDS

ADDRESS_SPACE_BYTES: Final = 256 * 1024 * 1024
_NOBODY: Final = 65534
_DESCRIPTORS: Final = 16
_BACKSTOP_CPU_SECONDS: Final = int(CPU_SECONDS) + 2
"""For one process, in case the timer is got rid of; whole seconds, as the kernel counts here."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2

_BPF_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_BPF_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_BPF_RETURN: Final = 0x06
_ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000
_REFUSE: Final = 0x00050001  # SECCOMP_RET_ERRNO with EPERM
_NUMBER_OFFSET: Final = 0
_ARCHITECTURE_OFFSET: Final = 4

# Memory, locks, the clock, reading and writing, the timer of a run, random numbers, and the end.
# fmt: off
_CALLS: Final = {
    "x86_64": (0xC000003E, {
        "read": 0, "write": 1, "mmap": 9, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
        "rt_sigreturn": 15, "mremap": 25, "madvise": 28, "setitimer": 38, "exit": 60, "gettimeofday": 96,
        "futex": 202, "restart_syscall": 219, "clock_gettime": 228, "exit_group": 231, "getrandom": 318,
    }),
    "aarch64": (0xC00000B7, {
        "read": 63, "write": 64, "exit": 93, "exit_group": 94, "futex": 98, "setitimer": 103, "clock_gettime": 113,
        "restart_syscall": 128, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "gettimeofday": 169,
        "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "madvise": 233, "getrandom": 278,
    }),
}
# fmt: on

_libc = ctypes.CDLL(None, use_errno=True)


def enter() -> None:
    """For the worker as a whole. Raises `OSError` where something cannot be given up: then it must not go on."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        score.write("1000")  # rather this process than the server
    for limit, value in (
        (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_NOFILE, _DESCRIPTORS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)  # and with it all capabilities
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)  # others of this user must not trace it
    die_with_parent()  # last: a change of the user undoes it


def enter_run() -> None:
    """For the process of one run, in addition. Raises `OSError` as `enter` does."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_BACKSTOP_CPU_SECONDS, _BACKSTOP_CPU_SECONDS))
    _forbid_system_calls()


def die_with_parent() -> None:
    """SIGKILL when the thread that started this process ends. A fork does not inherit it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _forbid_system_calls() -> None:
    """All but a few. Where the numbers are not known, the rest has to do."""
    known = _CALLS.get(platform.machine())
    if known is None:
        return
    architecture, calls = known
    numbers = tuple(calls.values())
    steps = [
        (_BPF_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_BPF_IF_EQUAL, 1, 0, architecture),
        (_BPF_RETURN, 0, 0, _KILL),
        (_BPF_LOAD, 0, 0, _NUMBER_OFFSET),
        *((_BPF_IF_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)),
        (_BPF_RETURN, 0, 0, _REFUSE),
        (_BPF_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program)


def _prctl(option: int, value: int, more: bytes | None = None) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), more, ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
