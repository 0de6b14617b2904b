"""Takes secrets out of configurations and changes before they reach logs and events (PROTOCOL 0.9)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from msgspec import inspect

from hiverd.wire.model import FILE_SYSTEM_CLASSES

REDACTED: Final = "[redacted]"
_USER_INFO: Final = re.compile(r"(?<=://)[^/@]*@")


def _secret_members() -> frozenset[str]:
    return frozenset(
        field.encode_name
        for cls in FILE_SYSTEM_CLASSES
        for field in _fields(cls)
        if any(_is_secret(kind) for kind in _alternatives(field.type))
    )


def _fields(cls: type) -> tuple[inspect.Field, ...]:
    kind = inspect.type_info(cls)
    assert isinstance(kind, inspect.StructType)  # noqa: S101 -- they are structs
    return kind.fields


def _alternatives(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    return kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _is_secret(kind: inspect.Type) -> bool:
    return isinstance(kind, inspect.Metadata) and bool((kind.extra or {}).get("secret"))


SECRET_MEMBERS: Final = _secret_members()
"""Members of `fs` entries that hold credentials."""


def without_user_info(url: str) -> str:
    """The URL without the user name and password that may be in it."""
    return _USER_INFO.sub("", url)


def redact_config(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration, or of a `changes` object, that is fit for logs and events.

    What overrides inject, scripts, credentials of file systems and the values of environment variables become
    `[redacted]`; names stay, and so does a shape that every client parses.
    """
    return {name: _redact_member(name, value) for name, value in config_dict.items()}


def _redact_member(name: str, value: Any) -> Any:
    if name in SECRET_MEMBERS or name == "override_script":
        return REDACTED
    if name == "env" and isinstance(value, Mapping):
        return dict.fromkeys(value, REDACTED)
    if name == "override" and isinstance(value, Mapping):
        return _redact_override(value)
    if name == "host" and isinstance(value, str):
        return _USER_INFO.sub(f"{REDACTED}@", value)
    return _redact_value(value)


def _redact_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact_config(value)
    if isinstance(value, list | tuple):
        return [_redact_value(item) for item in value]
    return value


def _redact_override(override: Mapping[str, Any]) -> dict[str, Any]:
    redacted = dict(override)
    for name in ("headers", "query"):
        if isinstance(redacted.get(name), Mapping):
            redacted[name] = dict.fromkeys(redacted[name], REDACTED)
    if "body" in redacted:
        redacted["body"] = REDACTED
    return redacted
