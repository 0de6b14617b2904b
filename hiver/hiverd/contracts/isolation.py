"""The contract between the core and an isolation plug-in (entry-point group `hiver.isolation`).

Life of a workload, as the core drives it:

    resolve_image -> create -> (core: listeners in its network namespace) -> begin -> ... -> stop -> destroy

`create` builds everything except the workload's first instruction; `begin` lets it run. Whatever happened before,
`destroy` removes all that bears the sandbox's id and may be called any number of times. After a restart of the server
`adopt` turns the stored, opaque state document back into a `Workload`.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from msgspec import Struct

from hiverd.contracts.errors import UnsupportedError

Stream = Literal["stdout", "stderr"]
Progress = Callable[[str], None]
"""Called with one line of text for people while something long is under way."""

RESOLVER_ADDRESS: Final = "11.0.0.1"
"""The only name server that a workload is to know; also the answer to every question to it (PROTOCOL 5.7)."""
GATE_ADDRESS: Final = "11.0.0.3"
"""Inside a workload's network namespace, the core's own listeners have this address: they are no ports of its own."""

HOST_GATEWAY_ADDRESS: Final = "11.0.0.4"
"""Inside a workload, what `host-gateway` in `extra_hosts` means. Only the egress proxy knows it: none of the workload's
own, or connections would stay inside."""


class Finding(Struct, frozen=True):
    """One result of a probe, as shown by `hiver doctor` and in start-up errors."""

    name: str
    ok: bool
    detail: str
    required: bool = True
    remedy: str = ""
    """What the operator can do, as a command or a sentence; empty when `ok`."""


class BackendContext(Struct, frozen=True):
    """What the core hands to an isolation plug-in when it is built."""

    instance: str
    """Names everything of ours on this host: `[a-z0-9]{8}`, stable per data folder."""
    data_dir: Path
    """Private folder of this plug-in; survives restarts and reboots. Mode 0700."""
    run_dir: Path
    """Private folder of this plug-in on a tmpfs if there is one; short enough for UNIX sockets. Gone after a reboot."""
    options: Mapping[str, Any]
    """The plug-in's own table of the configuration file, `[oci]` for `oci`. The plug-in validates it."""
    image_aliases: Mapping[str, str]


class Image(Struct, frozen=True):
    """A resolved image: what `create` needs, and what the core shows."""

    reference: str
    """As asked for, after alias resolution."""
    handle: str
    """Opaque to the core; names the prepared image for the plug-in."""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str = "/"
    user: str = ""
    exposed_ports: tuple[int, ...] = ()
    tty: bool = False


class Mount(Struct, frozen=True):
    """A kernel mount inside the sandbox."""

    target: str
    """Absolute path inside the sandbox."""
    source: str
    """Absolute path of a folder on the host."""
    owned: bool = True
    """True: the folder is the sandbox's own and its root owns it. False: the operator's; the folder's owner appears as
    root inside, and what the sandbox creates belongs to that owner outside."""
    read_only: bool = False


class WorkloadSpec(Struct, frozen=True, kw_only=True):
    """Everything `create` must know. Defaults are already filled in by the core."""

    sandbox_id: str
    key: str
    slot: int
    """Unique among live sandboxes on this data folder, from 0: for uid ranges and the like."""
    image: Image
    volume: Path
    """A folder of the sandbox's own on bounded disk; root file system changes belong here, under `root/`."""
    hostname: str
    cpu: float
    memory_bytes: int
    pids_max: int
    argv: tuple[str, ...]
    """The entrypoint; empty keeps the sandbox alive without a workload of its own."""
    tty: bool
    """Run `argv` on a terminal; the sandbox then outlives it (PROTOCOL 3.12)."""
    cwd: str
    env: dict[str, str]
    extra_hosts: tuple[tuple[str, str], ...] = ()
    mounts: tuple[Mount, ...] = ()


class ExecSpec(Struct, frozen=True, kw_only=True):
    """A command to run inside a workload, as its root user."""

    exec_id: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    """Merged over the sandbox's own environment."""
    cwd: str = ""
    """Empty: the sandbox's working directory."""
    tty: bool = False
    stdin: bool = False
    """False: standard input is empty."""


class Usage(Struct, frozen=True):
    cpu_seconds: float
    """Since the workload began."""
    memory_bytes: int
    """Without reclaimable page cache."""


class RootChanges(Struct, frozen=True, kw_only=True):
    """Where on this host is what a sandbox has written to its root file system."""

    upper: str
    """The upper folder of an overlay, with the kernel's marks for what was deleted."""
    first_id: int = 0
    """The host id that is 0 inside; owners in `upper` are shifted by it."""
    id_count: int = 1 << 32


class WorkloadExit(Struct, frozen=True):
    exit_code: int
    """128+n for signal n."""
    out_of_memory: bool = False


class LogChunk(Struct, frozen=True):
    """A piece of the entrypoint's output. `position` resumes behind it, also after a restart."""

    stream: Stream
    data: bytes
    position: str


class ExecProcess(abc.ABC):
    """A command running inside a workload."""

    @abc.abstractmethod
    def output(self) -> AsyncIterator[tuple[Stream, bytes]]:
        """Pieces of output as they come, until every holder of the pipes has closed them.

        Nothing is read ahead: a consumer that waits makes the command wait. With a tty all is `stdout`.
        """

    @abc.abstractmethod
    async def write(self, data: bytes) -> None:
        """Writes to standard input, waiting while the command does not read. Raises `NotFoundError` once closed."""

    @abc.abstractmethod
    def resize(self, rows: int, cols: int) -> None:
        """Sets the terminal's size; the workload's foreground group gets SIGWINCH, also for an unchanged size."""

    @abc.abstractmethod
    async def wait(self) -> int:
        """The exit code, 128+n for signal n. Does not wait for the output to end."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """Kills the command with all its descendants, at once. Harmless when it has ended."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Kills what is left and frees pipes and descriptors. Idempotent."""


class Terminal(abc.ABC):
    """The entrypoint's terminal. One live reader at a time: the core fans out to viewers."""

    @abc.abstractmethod
    async def scrollback(self, max_bytes: int) -> bytes:
        """The newest output so far."""

    @abc.abstractmethod
    def output(self) -> AsyncIterator[bytes]:
        """Live output from now on, until the entrypoint ends."""

    @abc.abstractmethod
    async def write(self, data: bytes) -> None: ...

    @abc.abstractmethod
    async def resize(self, rows: int, cols: int) -> None: ...

    @abc.abstractmethod
    async def wait(self) -> int:
        """The entrypoint's exit code."""


class Workload(abc.ABC):
    """A created sandbox. Cheap to hold: no thread and no task of its own while idle."""

    sandbox_id: str

    @property
    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """JSON document from which `adopt` rebuilds this object in another process. No secrets."""

    @property
    @abc.abstractmethod
    def network_namespace(self) -> str | None:
        """Path of an nsfs file for `setns`, valid while the workload lives. None: the workload has no network at
        all, so that there is nothing to guard.

        The namespace has no device but `lo`, and the workload neither CAP_NET_ADMIN nor CAP_NET_RAW in it: the core
        closes it by a packet filter, and tells its own sockets by a mark that these could set.
        """

    @property
    def ingress_addresses(self) -> tuple[str, ...]:
        """Addresses inside that namespace at which the workload's servers are tried, in order."""
        return ("127.0.0.1", "::1")

    @abc.abstractmethod
    def open_root(self) -> int:
        """A new O_PATH descriptor of the workload's root directory as the workload sees it, mounts included.

        The caller closes it soon. Every path below it is hostile: resolve with openat2 and RESOLVE_IN_ROOT.
        """

    @property
    @abc.abstractmethod
    def root_ids(self) -> tuple[int, int]:
        """Host uid and gid of the workload's root user, for files that the core creates inside."""

    @abc.abstractmethod
    def open_process(self) -> int:
        """A new pidfd of a process whose namespaces are the workload's, from `create` on: for `setns`. The caller
        closes it soon."""

    @abc.abstractmethod
    async def begin(self) -> None:
        """Lets the workload run its first instruction."""

    @abc.abstractmethod
    async def wait(self) -> WorkloadExit:
        """Until the workload (not the entrypoint, if that has a terminal) has ended. Any number of callers."""

    @abc.abstractmethod
    async def exec(self, spec: ExecSpec) -> ExecProcess:
        """Starts a command. A missing program, a bad working directory and the like are not errors of this call: they
        come as an exit code (127, 126) and a message on stderr (PROTOCOL 0.8). `BackendError` if it cannot start."""

    @abc.abstractmethod
    def entrypoint_output(self, position: str | None) -> AsyncIterator[LogChunk]:
        """The entrypoint's output without a tty, from `position` (None: from the beginning) until the workload ends."""

    @abc.abstractmethod
    def terminal(self) -> Terminal | None:
        """The entrypoint's terminal, if it was started with one."""

    @abc.abstractmethod
    async def usage(self) -> Usage: ...

    @abc.abstractmethod
    async def listening_ports(self) -> frozenset[int]:
        """TCP ports with a listener in the workload's network namespace, whoever owns it."""

    @abc.abstractmethod
    async def add_mount(self, mount: Mount) -> None:
        """Adds a mount to the running workload. On an error nothing has changed."""

    @abc.abstractmethod
    async def remove_mount(self, target: str) -> None:
        """Takes a mount away; users with open files keep them. No error if it is not mounted."""

    @abc.abstractmethod
    async def mounted_targets(self) -> frozenset[str]:
        """Those of our mounts that exist in the running workload."""

    async def pause(self) -> frozenset[int]:
        """Nothing of the workload runs when this returns, until `resume`, `stop` or `Isolation.adopt`. Gives its
        processes' pids on this host. Raises `UnavailableError` if that cannot be had soon; then it runs.
        `UnsupportedError`: this plug-in cannot."""
        raise UnsupportedError("this isolation plug-in cannot pause a sandbox")

    async def resume(self) -> None:  # noqa: B027 -- for those that cannot pause
        """Ends a pause. Harmless without one."""

    @abc.abstractmethod
    async def stop(self, grace_seconds: float) -> None:
        """SIGTERM, then SIGKILL after the grace; returns when no process of the workload is left. Idempotent."""

    async def close(self) -> None:  # noqa: B027 -- some hold nothing
        """Frees what this process holds; the workload goes on."""


class Isolation(abc.ABC):
    """An isolation plug-in. Built once per server."""

    name: ClassVar[str]
    kind: ClassVar[Literal["container", "microvm"]]

    def __init__(self, context: BackendContext) -> None:
        self.context = context

    @abc.abstractmethod
    async def probe(self) -> list[Finding]:
        """What this host offers. Quick, changes nothing that stays."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Makes ready for work. Raises `UnavailableError` with the missing findings and their remedies."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Frees this process's resources. Workloads go on."""

    @abc.abstractmethod
    async def resolve_image(self, name: str, progress: Progress) -> Image:
        """Finds, pulls and unpacks. `NotFoundError`/`InvalidError` naming the image if there is none such."""

    @abc.abstractmethod
    async def create(self, spec: WorkloadSpec) -> Workload:
        """Builds the sandbox up to its first instruction. On an error the core calls `destroy`."""

    @abc.abstractmethod
    async def adopt(self, spec: WorkloadSpec, state: Mapping[str, Any]) -> Workload:
        """Takes over a workload that another server process created. `SandboxGoneError` if it has surely ended."""

    @abc.abstractmethod
    async def destroy(self, sandbox_id: str, state: Mapping[str, Any] | None) -> None:
        """Kills and removes all that bears this id: processes, mounts, namespaces, cgroups, files of the plug-in.

        Works on half-made sandboxes and on ids it never saw. Returns when nothing is left; raises otherwise.
        """

    async def root_changes(self, spec: WorkloadSpec, state: Mapping[str, Any]) -> RootChanges | None:
        """For a sandbox that runs, or has ended and was not destroyed yet. None: this plug-in cannot tell."""
        return None

    @abc.abstractmethod
    async def list_owned(self) -> frozenset[str]:
        """Ids of all sandboxes of this instance of which anything is left on the host, for the sweep."""
