"""Paths of the file API as pure functions (PROTOCOL 3.10). Inside the server they are bytes, as the kernel has them."""

from __future__ import annotations

import os
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from hiverd.contracts.errors import InvalidError

_PATH_MAX = 4095


def clean(path: bytes) -> bytes:
    """Absolute, without `//`, `.` and `..`; `..` stops at `/`. Purely lexical, so links are not looked at.

    Raises `InvalidError` for NUL and for what no kernel accepts.
    """
    if b"\0" in path:
        raise InvalidError("path contains a NUL byte", field="path")
    kept: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            del kept[-1:]
        elif part not in (b"", b"."):
            kept.append(part)
    cleaned = b"/" + b"/".join(kept)
    if len(cleaned) > _PATH_MAX:
        raise InvalidError("path is too long", field="path")
    return cleaned


def shown(path: bytes) -> str:
    """For JSON, events and errors: what is not UTF-8 becomes U+FFFD."""
    return path.decode("utf-8", "replace")


def path_from_url(raw_path: bytes, decoded_path: str, operation: str, base_segments: int) -> bytes:
    """The file's path out of a request's URL, percent-decoded exactly once.

    `raw_path` is the encoded URL path without the query, `decoded_path` the server's decoding of it; when the two
    disagree (something rewrote only one) the decoded one counts. The wanted path is what follows segment number
    `base_segments`, which must be `operation`.
    """
    if unquote_to_bytes(raw_path).decode("utf-8", "replace") == decoded_path:
        parts = raw_path.split(b"/", base_segments + 1)
        if len(parts) == base_segments + 2 and unquote_to_bytes(parts[base_segments]) == operation.encode():
            return unquote_to_bytes(parts[-1])
    texts = decoded_path.split("/", base_segments + 1)
    return os.fsencode(texts[-1]) if len(texts) == base_segments + 2 else b""


def query_value(query_string: bytes, name: str) -> bytes | None:
    """The first value of a query parameter as the bytes it stands for; None when it is absent."""
    text = query_string.decode("utf-8", "surrogateescape")
    for key, value in parse_qsl(text, keep_blank_values=True, errors="surrogateescape"):
        if key == name:
            return os.fsencode(value)
    return None


def content_disposition(path: bytes) -> str:
    """`attachment` with the file's name (RFC 6266): in ASCII, and in UTF-8 beside it where that loses something."""
    name = shown(path.rsplit(b"/", 1)[-1])
    plain = "".join("\\" + char if char in '"\\' else char if " " <= char <= "~" else "_" for char in name)
    header = f'attachment; filename="{plain}"'
    if any(not " " <= char <= "~" for char in name):
        header += f"; filename*=UTF-8''{quote(name, safe='')}"
    return header


def mount_of(path: bytes, mounts: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    """The innermost configured mount that holds a cleaned path, with its backend."""
    best: tuple[str, str] | None = None
    best_length = -1
    for mount, backend in mounts:
        target = clean(os.fsencode(mount))
        inside = path == target or path.startswith(target.rstrip(b"/") + b"/")
        if inside and len(target) > best_length:
            best, best_length = (mount, backend), len(target)
    return best


def names_below(path: bytes, mounts: tuple[tuple[str, str], ...]) -> tuple[bytes, ...]:
    """Last components of the configured mounts that lie directly in a cleaned directory path."""
    prefix = path.rstrip(b"/") + b"/"
    found = []
    for mount, _ in mounts:
        target = clean(os.fsencode(mount))
        rest = target[len(prefix) :]
        if target.startswith(prefix) and rest and b"/" not in rest:
            found.append(rest)
    return tuple(dict.fromkeys(found))
