"""The system calls that a sandbox may make: an allow list for the native architecture.

What is left out, and why: making namespaces, mounting, and the new mount API (privileges inside a user namespace reach
much of the kernel); `bpf`, `perf_event_open`, `userfaultfd`, `io_uring_*` and `AF_ALG`/`AF_VSOCK` sockets (large attack
surface, and vsock would leave the network namespace); keyrings (not namespaced everywhere); module, kexec, clock, swap,
quota and accounting calls (the host's); `open_by_handle_at`, `name_to_handle_at` with it (reach behind mounts).
Architectures other than the native one are absent, so their entry points are killed.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any, Final

from hiverd.contracts.errors import InvalidError

_ARCHITECTURES: Final = {
    "x86_64": "SCMP_ARCH_X86_64",
    "aarch64": "SCMP_ARCH_AARCH64",
    "riscv64": "SCMP_ARCH_RISCV64",
    "ppc64le": "SCMP_ARCH_PPC64LE",
    "loongarch64": "SCMP_ARCH_LOONGARCH64",
}

_FILES: Final = """
access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fallocate
fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat
fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr getxattrat inotify_add_watch inotify_init
inotify_init1 inotify_rm_watch ioctl lchown lgetxattr link linkat listxattr listxattrat llistxattr lremovexattr lseek
lsetxattr lstat memfd_create memfd_secret mkdir mkdirat mknod mknodat newfstatat open openat openat2 pipe pipe2 pread64
preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr removexattrat rename
renameat renameat2 rmdir sendfile setxattr setxattrat splice stat statfs statx symlink symlinkat sync sync_file_range
sync_file_range2 syncfs tee truncate umask unlink unlinkat ustat utime utimensat utimes vmsplice write writev
"""
_PROCESSES: Final = """
_sysctl alarm arch_prctl capget capset execve execveat exit exit_group fork futex futex_requeue futex_wait futex_waitv
futex_wake get_robust_list get_thread_area getcpu getegid geteuid getgid getgroups getitimer getpgid getpgrp getpid
getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid gettid getuid ioprio_get ioprio_set
kcmp kill membarrier nanosleep pause pidfd_getfd pidfd_open pidfd_send_signal prctl prlimit64 process_madvise
process_mrelease process_vm_readv process_vm_writev ptrace restart_syscall riscv_flush_icache riscv_hwprobe rseq
rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield
seccomp set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setpriority
setregid setresgid setresuid setreuid setrlimit setsid setuid sigaltstack signalfd signalfd4 sysinfo tgkill time times
tkill uname vfork wait4 waitid chroot
"""
_MEMORY: Final = """
brk cachestat get_mempolicy landlock_add_rule landlock_create_ruleset landlock_restrict_self madvise
map_shadow_stack mbind mincore mlock mlock2 mlockall mmap mprotect mremap mseal msync munlock munlockall munmap
pkey_alloc pkey_free pkey_mprotect remap_file_pages set_mempolicy set_mempolicy_home_node
"""
_TIME_AND_EVENTS: Final = """
clock_getres clock_gettime clock_nanosleep epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2
epoll_wait epoll_wait_old eventfd eventfd2 gettimeofday io_cancel io_destroy io_getevents io_pgetevents io_setup
io_submit poll ppoll pselect6 select timer_create timer_delete timer_getoverrun timer_gettime timer_settime
timerfd_create timerfd_gettime timerfd_settime
"""
_COMMUNICATION: Final = """
accept accept4 bind connect getpeername getsockname getsockopt listen mq_getsetattr mq_notify mq_open mq_timedreceive
mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd recvfrom recvmmsg recvmsg semctl semget semop semtimedop sendmmsg
sendmsg sendto setsockopt shmat shmctl shmdt shmget shutdown socketpair
"""

_NEW_NAMESPACES: Final = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET together."""
_SOCKET_FAMILIES: Final = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK."""
_PERSONALITIES: Final = (0x0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)
"""Linux, 32-bit, their UNAME26 forms, no address randomisation (debuggers), and the query."""
_EPERM: Final = 1
_ENOSYS: Final = 38


def default_profile() -> dict[str, Any] | None:
    """`linux.seccomp` of an OCI configuration; None on an architecture that we have no list for."""
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return None
    names = " ".join((_FILES, _PROCESSES, _MEMORY, _TIME_AND_EVENTS, _COMMUNICATION)).split()
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _EPERM,
        "architectures": [architecture],
        "syscalls": [
            {"names": sorted(names), "action": "SCMP_ACT_ALLOW"},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": _NEW_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
            },
            # Its flags lie in memory, out of a filter's reach; libc falls back to clone on ENOSYS.
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS},
            *(_equal("socket", family) for family in _SOCKET_FAMILIES),
            *(_equal("personality", value) for value in _PERSONALITIES),
        ],
    }


def _equal(name: str, value: int) -> dict[str, Any]:
    return {
        "names": [name],
        "action": "SCMP_ACT_ALLOW",
        "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}],
    }


def load(choice: str, table: str) -> dict[str, Any] | None:
    """The profile for the option `seccomp` of the table `table`. Raises `InvalidError` for a file that is none."""
    if choice == "default":
        return default_profile()
    try:
        profile = json.loads(Path(choice).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidError(f"[{table}] seccomp: cannot read {choice}: {error}", field=f"{table}.seccomp") from error
    if not isinstance(profile, dict) or "defaultAction" not in profile:
        raise InvalidError(f"[{table}] seccomp: {choice} has no defaultAction", field=f"{table}.seccomp")
    return profile
