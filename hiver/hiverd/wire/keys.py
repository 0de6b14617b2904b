"""Names that callers choose (PROTOCOL 1.4, 4.3): they become parts of URLs, of file names and of log lines."""

from __future__ import annotations

import re
from typing import Final

from hiverd.contracts.errors import InvalidError
from hiverd.strict import shown

KEY_RULE: Final = "1 to 64 characters out of A-Z a-z 0-9 . _ - (and not . or ..)"
_KEY: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_EXEC_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def is_key(text: str) -> bool:
    """True for the key of a sandbox or of a snapshot."""
    return _KEY.fullmatch(text) is not None and text not in {".", ".."}


def check_key(key: str, *, field: str = "key") -> str:
    """Returns the key. Raises `InvalidError` naming `field` if it breaks the rule."""
    if not is_key(key):
        raise InvalidError(f"{field}: must be {KEY_RULE}, got {shown(key)}", field=field)
    return key


def check_exec_id(exec_id: str) -> str:
    """Returns the id that a client gave to a command (a UUID in practice). Raises `InvalidError`."""
    if _EXEC_ID.fullmatch(exec_id) is None:
        raise InvalidError(
            f"exec id: must be 1 to 128 characters out of A-Z a-z 0-9 . _ -, got {shown(exec_id)}", field="execId"
        )
    return exec_id
