"""The path of a request as servers may read it.

Rules are compared with the decoded path (PROTOCOL 5.1). Servers differ in what they do besides: they resolve dot
segments, merge slashes, take a backslash for a slash, drop path parameters, or decode twice. A request is allowed only
if the same rule decides under each of these readings, so none of them is a way round a rule.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

_PLAIN: Final = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9_.~!$&'()*+,=:@-]+)*/?")
"""Paths that every server reads alike; nearly all are of this kind."""
_PARAMETERS: Final = re.compile(r";[^/]*")


def path_readings(path: str) -> tuple[str, ...]:
    """The distinct readings of a raw path without its query; the first is the decoded path itself."""
    if _PLAIN.fullmatch(path):
        return (path,)
    once = _decoded(path)
    twice = _decoded(once)
    return tuple(
        dict.fromkeys(
            (once, _resolved(once), _resolved(twice), _resolved(_PARAMETERS.sub("", once.replace("\\", "/"))))
        )
    )


def _decoded(path: str) -> str:
    return unquote_to_bytes(path.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _resolved(path: str) -> str:
    """Without empty and dot segments (RFC 3986, 5.2.4); a final slash stays."""
    kept: list[str] = []
    segments = path.replace("\\", "/").split("/")
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    final_slash = "/" if kept and segments[-1] in ("", ".", "..") else ""
    return "/" + "/".join(kept) + final_slash
