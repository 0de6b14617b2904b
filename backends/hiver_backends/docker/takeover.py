"""From a container of the Engine's to a sandbox of ours: who its process 1 is, and a root file system for it.

Blocking calls.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from hiver_backends.linux import inside, livemounts, pids
from hiver_backends.linux.rootfs import RootFs, unmount_below
from hiverd.contracts.errors import BackendError
from hiverd.contracts.isolation import WorkloadSpec

from . import below, layers, rootswap
from .below import Below
from .images import Prepared
from .places import Places
from .workload import Identity


class Found(NamedTuple):
    """A running container."""

    identity: Identity
    below: Below
    descriptor: int
    """A pidfd of process 1, for the caller to close."""


def identify(container: Mapping[str, Any]) -> Found:
    """By the Engine's description of a running container. Raises `BackendError` if it has ended."""
    pid = int(container["State"]["Pid"])
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        raise BackendError("the sandbox ended while it was made") from error
    try:
        container_id = str(container["Id"])
        found = below.find(pid, container_id)
        stat = pids.read_stat(pid)
        host_id = below.root_id(pid)
        # Looked at last: until here the pid was surely not another process's, and that it was this container's the
        # runtime has told.
        if stat is None or pids.has_ended(descriptor):
            raise BackendError("the sandbox ended while it was made")
    except BaseException:
        os.close(descriptor)
        raise
    identity = Identity(
        container_id=container_id,
        pid=pid,
        start_ticks=stat.start_ticks,
        boot_id=pids.boot_id(),
        runtime=found.program,
        state_dir=found.state_dir,
        host_id=host_id,
        apparmor=str(container.get("AppArmorProfile") or ""),
        selinux=str(container.get("ProcessLabel") or ""),
    )
    return Found(identity, found, descriptor)


def give_root(
    rootfs: RootFs,
    spec: WorkloadSpec,
    prepared: Prepared,
    container: Mapping[str, Any],
    found: Found,
    places: Places,
) -> None:
    """Builds the sandbox's root file system with its mounts, and moves it into the container."""
    identity = found.identity
    folders = layers.of(prepared, container, found.below)
    owner = identity.host_id or 0
    os.chown(places.mount, owner, owner)
    etc = inside.identity(spec.hostname, spec.extra_hosts)
    # An Engine that maps user ids has its images' files on disk with the owners that they are mapped to.
    shifted = prepared.layers is None
    rootfs.mount(folders, spec.volume, places.rootfs, identity.host_id, etc, shifted=shifted)
    root = os.open(places.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        rootswap.make_places(root, owner)
        livemounts.attach_all(rootfs, root, spec.mounts, identity.host_id)
        os.close(inside.make_directory(root, spec.cwd or "/", (owner, owner)))
    finally:
        os.close(root)
    rootswap.replace(identity.pid, str(places.rootfs))
    unmount_below(places.mount)
