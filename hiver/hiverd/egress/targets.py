"""The path of a request as servers may read it.

Rules are compared with the decoded path (PROTOCOL 5.1). Servers differ in what they do besides: they resolve dot
segments, merge slashes, take a backslash for a slash, drop path parameters (before or after), decode twice, or end at a
NUL. A request is allowed only if the same rule decides under each of these readings, so none of them is a way round a
rule. Letters of the other case, and what Windows drops at the end of a name, are not among them.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final
from urllib.parse import unquote_to_bytes

_PLAIN: Final = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9_.~!$&'()*+,=:@-]+)*/?")
"""Paths that every server reads alike; nearly all are of this kind."""
_PARAMETERS: Final = re.compile(r";[^/]*")
_OVERLONG: Final = (("\udcc0\udcaf", "/"), ("\udcc0\udcae", "."), ("\udcc1\udc9c", "\\"))
"""Two bytes for what takes one, as `_decoded` leaves them."""


def path_readings(path: str) -> tuple[str, ...]:
    """The distinct readings of a raw path without its query; the first is the decoded path itself."""
    if _PLAIN.fullmatch(path):
        return (path,)
    texts: dict[str, None] = {}
    for raw in (path, _without_parameters(path)):  # Java containers drop parameters before they decode
        once = _decoded(raw)
        for text in (once, _decoded(once)):
            texts.update(dict.fromkeys((text, text.partition("\0")[0], _lenient(text))))
    texts.update(dict.fromkeys([text.replace("\\", "/") for text in texts]))
    resolved = [_resolved(reading) for text in texts for reading in (text, _without_parameters(text))]
    return tuple(dict.fromkeys((_decoded(path), *resolved)))


def _without_parameters(path: str) -> str:
    return _PARAMETERS.sub("", path)


def _lenient(text: str) -> str:
    """As by who takes overlong UTF-8, or maps letters that look alike, such as a full-width slash."""
    for wrong, right in _OVERLONG:
        text = text.replace(wrong, right)
    return unicodedata.normalize("NFKC", text)


def _decoded(path: str) -> str:
    return unquote_to_bytes(path.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _resolved(path: str) -> str:
    """Without empty and dot segments (RFC 3986, 5.2.4); a final slash stays."""
    kept: list[str] = []
    segments = path.split("/")
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    final_slash = "/" if kept and segments[-1] in ("", ".", "..") else ""
    return "/" + "/".join(kept) + final_slash
