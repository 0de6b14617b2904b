"""Folders of the host that callers may mount: only what lies below the operator's list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hiverd.contracts.errors import InvalidError


def resolve_origin(origin: str, roots: Sequence[Path], *, field: str) -> Path:
    """The real folder behind `origin`, links followed. Relative paths start at the server's working directory.

    Judged on the resolved path, so that a link below an allowed folder cannot lead out of it. What lies outside the
    list is refused in one way whether it exists or not: callers learn nothing about the rest of the host.
    """
    if not roots:
        raise InvalidError(
            f"{field}: this server shares no folders; the operator can list some in files.origin_roots", field=field
        )
    try:
        resolved = Path(origin).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a NUL, a loop of links, a name that is too long
        raise InvalidError(f"{field}: is not the path of a folder", field=field) from error
    allowed = [root.resolve() for root in roots]
    if not any(resolved == root or root in resolved.parents for root in allowed):
        raise InvalidError(f"{field}: is not below a folder that the operator lists in files.origin_roots", field=field)
    if not os.path.isdir(resolved):
        raise InvalidError(f"{field}: is not an existing folder", field=field)
    return resolved
