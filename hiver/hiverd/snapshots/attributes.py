"""What belongs to a file besides its content, turned from the host's view into the sandbox's. Pure functions."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Final

from hiverd.snapshots.members import OWN_PREFIX, Attributes

NOBODY: Final = 65534
"""Whoever has no id in the sandbox (the kernel shows them so, too)."""
ACL_NAMES: Final = (b"system.posix_acl_access", b"system.posix_acl_default")
CAPABILITY: Final = b"security.capability"
_ACL_ENTRY: Final = struct.Struct("<HHI")
_ACL_HEADER: Final = struct.Struct("<I")
_ACL_WITH_ID: Final = (0x02, 0x08)
"""ACL_USER and ACL_GROUP (acl(5)); the ids of other entries mean nothing."""
_CAPABILITY_REVISIONS: Final = 0xFF000000
_CAPABILITY_REVISION_2: Final = 0x02000000
_CAPABILITY_2_BYTES: Final = 20


class Ids:
    """A sandbox's range of the host's ids: `count` of them from `first` on are 0, 1, ... inside."""

    def __init__(self, first: int, count: int) -> None:
        self._first = first
        self._count = count

    def inside(self, host_id: int) -> int:
        shifted = host_id - self._first
        return shifted if 0 <= shifted < self._count else NOBODY


def attributes_of(status: os.stat_result, ids: Ids, xattrs: dict[bytes, bytes]) -> Attributes:
    """`xattrs`: as `inner_xattrs` gives them."""
    return Attributes(
        stat.S_IMODE(status.st_mode), ids.inside(status.st_uid), ids.inside(status.st_gid), status.st_mtime_ns, xattrs
    )


def inner_xattrs(descriptor: int, ids: Ids) -> dict[bytes, bytes]:
    """The extended attributes of an open file that can be set again inside a sandbox, as they are to be set there."""
    try:
        names = os.listxattr(descriptor)
    except OSError:
        return {}
    if not names:
        return {}
    found = {}
    for name in names:
        key = os.fsencode(name)
        if is_portable(key):
            try:
                found[key] = _inner(key, os.getxattr(descriptor, name), ids)
            except OSError:
                continue  # removed meanwhile
    return found


def is_portable(key: bytes) -> bool:
    """Whether a sandbox's own root may set this attribute, and it is none of ours."""
    if key.startswith(b"user."):
        return not key.startswith(OWN_PREFIX)
    return key in ACL_NAMES or key == CAPABILITY


def _inner(key: bytes, value: bytes, ids: Ids) -> bytes:
    if key in ACL_NAMES:
        return _inner_acl(value, ids.inside)
    if key == CAPABILITY and len(value) > _CAPABILITY_2_BYTES:
        # Revision 3 holds the id of the namespace's root (capabilities(7)); inside it is given without.
        magic = struct.unpack_from("<I", value)[0] & ~_CAPABILITY_REVISIONS | _CAPABILITY_REVISION_2
        return struct.pack("<I", magic) + value[4:_CAPABILITY_2_BYTES]
    return value


def _inner_acl(value: bytes, inside: Callable[[int], int]) -> bytes:
    def entries() -> Iterator[bytes]:
        for tag, permissions, number in _ACL_ENTRY.iter_unpack(value[_ACL_HEADER.size :]):
            yield _ACL_ENTRY.pack(tag, permissions, inside(number) if tag in _ACL_WITH_ID else number)

    if (len(value) - _ACL_HEADER.size) % _ACL_ENTRY.size:
        return value
    return value[: _ACL_HEADER.size] + b"".join(entries())
