"""What a rule changes in a request that it allows (PROTOCOL 5.5). Pure.

The order is query, headers, prefix_path, body; `host` concerns the dialling only. What is put in may be secret, so
nothing from here goes into an event as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from hiverd.egress.names import split_authority
from hiverd.http.framing import Headers
from hiverd.http.headers import HOP_BY_HOP
from hiverd.wire.model import EgressOverride
from hiverd.wire.redaction import REDACTED

MAX_MERGED_BODY_BYTES: Final = 8 * 1024 * 1024
"""Of the agent's body, where it has to be held as a whole."""
_BODY_FIELDS: Final = frozenset((b"content-length", b"content-encoding", b"transfer-encoding"))

_NEVER_SET: Final = HOP_BY_HOP | {b"content-length", b"expect"}


def dial_target(override: EgressOverride | None, host: str, port: int) -> tuple[str, int]:
    """Host and port to connect to. Raises `HostError` for a host that is none."""
    if override is None or not override.host:
        return host, port
    other, other_port = split_authority(override.host)
    return other, port if other_port is None else other_port


def target(override: EgressOverride | None, path: str, query: str | None) -> str:
    """The request target to send, in origin form."""
    if override is not None:
        if override.query:
            query = _with_query(query or "", override.query)
        if override.prefix_path:
            path = override.prefix_path.rstrip("/") + path
    return path if query is None else f"{path}?{query}"


def headers(override: EgressOverride | None, fields: Headers) -> Headers:
    """The fields to send: those of the override in place of all others of their names. Fields that delimit the message
    or belong to one connection are nobody's to set."""
    if override is None or not override.headers:
        return fields
    added = [(name.lower().encode("latin-1"), value.encode("utf-8")) for name, value in override.headers.items()]
    added = [field for field in added if field[0] not in _NEVER_SET]
    names = {name for name, _ in added}
    return [*(field for field in fields if field[0] not in names), *added]


def shown_headers(override: EgressOverride | None, fields: Headers) -> Headers:
    """As `headers`, for events: what the override sets is not told."""
    if override is None or not override.headers:
        return fields
    hidden = dict.fromkeys(override.headers, REDACTED)
    return headers(EgressOverride(headers=hidden), fields)


def replaces_body(override: EgressOverride | None) -> bool:
    """True if the agent's body is not sent as it is; it may have to be read as a whole before."""
    return override is not None and isinstance(override.body, str | dict)


def body(override: EgressOverride, agent_body: bytes) -> bytes:
    """The body to send, given the agent's own without its content coding."""
    wanted = override.body
    if isinstance(wanted, str):
        return wanted.encode()
    assert wanted is not None  # noqa: S101 -- asked only if `replaces_body`
    if override.body_strategy == "replace":
        return json.dumps(wanted).encode()
    return json.dumps({**_object(agent_body), **wanted}).encode()


def without_body_fields(fields: Headers) -> Headers:
    """Fields that do not describe the body that was replaced."""
    return [field for field in fields if field[0] not in _BODY_FIELDS]


def secrets_of(override: EgressOverride | None) -> tuple[str, ...]:
    """Texts that an upstream may send back and events must not show, the longest first."""
    if override is None:
        return ()
    return secrets_in(value for values in (override.headers, override.query) for value in (values or {}).values())


def secrets_in(values: Iterable[str]) -> tuple[str, ...]:
    """The values and their words, the longest first."""
    found = set(values)
    for value in list(found):
        found.update(value.split())
    return tuple(sorted((text for text in found if len(text) >= _SECRET_CHARACTERS), key=len, reverse=True))


_SECRET_CHARACTERS: Final = 8
"""Shorter values are words such as `application/json`'s parts, of which a text without them would tell more."""


def _with_query(query: str, wanted: dict[str, str]) -> str:
    kept: dict[str, list[str]] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        kept.setdefault(name, []).append(value)
    kept.update({name: [value] for name, value in wanted.items()})
    return urlencode(sorted(kept.items()), doseq=True)


def _object(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
