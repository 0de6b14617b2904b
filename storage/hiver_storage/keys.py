"""Paths of a mount and keys of a bucket; members of a mount's configuration."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote, unquote_to_bytes, urlsplit

from hiverd.contracts.errors import InvalidError

from .names import Names

_KEY_BYTES: Final = 1024
"""The longest key of all three services."""


class Keys:
    """The part of a bucket below a prefix, with names as the service takes them. No path leads out of it."""

    def __init__(self, prefix: str, names: Names) -> None:
        self._names = names
        self._base = f"{self._encoded(prefix)}/" if prefix else ""

    def file(self, path: str) -> str:
        """The key of a path that is not the root. Raises OSError: EISDIR, EINVAL, ENAMETOOLONG."""
        clean = clean_path(path)
        if clean == "/":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "/")
        return self._checked(self._base + self._encoded(clean[1:]), path)

    def directory(self, path: str) -> str:
        """What every key below this path begins with, and the key of the directory's own marker: it ends in `/`."""
        clean = clean_path(path)
        return self._base if clean == "/" else self._checked(f"{self._base}{self._encoded(clean[1:])}/", path)

    def shown(self, name: str) -> str | None:
        """What a mount shows for a part of a key; None for what cannot be a name of a file."""
        shown = self._names.decode(name)
        return None if shown in {"", ".", ".."} or "/" in shown or "\0" in shown else shown

    def _encoded(self, relative: str) -> str:
        return "/".join(map(self._names.encode, relative.split("/")))

    @staticmethod
    def _checked(key: str, path: str) -> str:
        if len(key.encode()) > _KEY_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
        return key


def clean_path(path: str) -> str:
    """Lexically: `.` and `..` are resolved, the root is its own parent. Raises OSError EINVAL for a NUL."""
    if "\0" in path:
        raise OSError(errno.EINVAL, "a path holds a NUL byte")
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del kept[-1:]
        elif part not in {"", "."}:
            kept.append(part)
    return "/" + "/".join(kept)


def parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def encode_target(target: str) -> str:
    """A link's target as ASCII, odd bytes and all."""
    return quote(os.fsencode(target), safe="/:@+,=~!$&()*;")


def decode_target(text: str | None) -> str | None:
    return None if text is None else os.fsdecode(unquote_to_bytes(text))


def date_of(text: str | None) -> datetime:
    """An HTTP date; now, if there is none."""
    try:
        found = parsedate_to_datetime(text or "")
    except ValueError:
        return datetime.now(UTC)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def optional(config: Mapping[str, Any], member: str) -> str | None:
    """A text; None if it is absent or empty. Raises InvalidError."""
    value = config.get(member)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or any(character < " " for character in value.strip()):
        raise InvalidError(f"{member} must be a text", field=member)
    return value


def required(config: Mapping[str, Any], member: str) -> str:
    """A text that is not empty. Raises InvalidError."""
    value = optional(config, member)
    if value is None:
        raise InvalidError(f"{member} is required", field=member)
    return value


def prefix_of(config: Mapping[str, Any], member: str) -> str:
    """A prefix without slashes at its ends. Raises InvalidError."""
    prefix = (optional(config, member) or "").strip("/")
    if prefix and any(part in {"", ".", ".."} for part in prefix.split("/")):
        raise InvalidError(f"{member} must be a plain path", field=member)
    return prefix


def endpoint_of(config: Mapping[str, Any], member: str) -> str | None:
    """A URL without a slash at its end. Raises InvalidError, without repeating the value."""
    value = optional(config, member)
    if value is None:
        return None
    try:
        url = urlsplit(value)
        valid = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:
        valid = False
    if not valid or url.query or url.fragment or url.username is not None:
        raise InvalidError(f"{member} must be a URL with http or https, without a query", field=member)
    return value.rstrip("/")
