"""Rules for the entries of `egress` (PROTOCOL 4.4, 5.1, 5.5).

Whatever could only make a rule silently match nothing is refused: a deny rule that never matches lets traffic through.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

from hiverd.strict import fail, fail_missing, member, shown
from hiverd.wire.model import HTTP_METHODS, EgressOverride, EgressRule

MAX_RULES: Final = 4096
MAX_MATCHERS: Final = 1024
"""Ports, methods or paths of one rule."""
MAX_HOST_CHARACTERS: Final = 253
MAX_PATH_CHARACTERS: Final = 4096
MAX_SCRIPT_BYTES: Final = 256 * 1024

_HOST: Final = re.compile(r"[!-.0-~]+")  # printable ASCII without blank and slash
_UPSTREAM: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:(?P<port>[0-9]{1,6}))?")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_FIELD_VALUE_BAD: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110, 5.5
_PATH_BAD: Final = re.compile(r"[\x00-\x20\x7f]")


def validate_egress(rules: Sequence[EgressRule]) -> None:
    """Checks every rule. Raises `InvalidError`."""
    if len(rules) > MAX_RULES:
        fail("egress", f"must have at most {MAX_RULES} rules")
    for index, rule in enumerate(rules):
        _validate_rule(f"egress[{index}]", rule)


def _validate_rule(path: str, rule: EgressRule) -> None:
    _validate_host(f"{path}.host", rule.host)
    _validate_ports(f"{path}.ports", rule.ports or ())
    _validate_methods(f"{path}.methods", rule.methods or ())
    _validate_paths(f"{path}.paths", rule.paths or ())
    if rule.override is not None:
        _validate_override(f"{path}.override", rule.override, allow=rule.access == "allow")
    if rule.override_script:
        _validate_script(f"{path}.override_script", rule.override_script, allow=rule.access == "allow")


def _validate_host(field: str, host: str) -> None:
    host = host.strip()
    if not host:
        fail_missing(field)
    if not host.isascii():
        fail(field, f"must be ASCII, write international names in their xn-- form, got {shown(host)}")
    if "/" in host:
        fail(field, f"must be a host name, without scheme and path, got {shown(host)}")
    if len(host) > MAX_HOST_CHARACTERS or _HOST.fullmatch(host) is None:
        fail(field, f"must be a host name or a pattern with *, got {shown(host)}")


def _check_count(field: str, entries: Sequence[object]) -> None:
    if len(entries) > MAX_MATCHERS:
        fail(field, f"must have at most {MAX_MATCHERS} entries")


def _validate_ports(field: str, ports: Sequence[int]) -> None:
    _check_count(field, ports)
    for index, port in enumerate(ports):
        if not 1 <= port <= 65535:
            fail(f"{field}[{index}]", f"{port} out of range [1, 65535]")


def _validate_methods(field: str, methods: Sequence[str]) -> None:
    _check_count(field, methods)
    for index, method in enumerate(methods):
        if method.upper() not in HTTP_METHODS:
            fail(f"{field}[{index}]", f"unknown value {shown(method)}")


def _validate_paths(field: str, paths: Sequence[str]) -> None:
    _check_count(field, paths)
    for index, pattern in enumerate(paths):
        where = f"{field}[{index}]"
        if not pattern.startswith(("/", "*")):
            fail(where, f'must start with "/", got {shown(pattern)}')
        if "\0" in pattern or len(pattern) > MAX_PATH_CHARACTERS:
            fail(where, f"must be at most {MAX_PATH_CHARACTERS} characters without NUL")


def _validate_override(path: str, override: EgressOverride, *, allow: bool) -> None:
    if override.host:
        _validate_upstream(f"{path}.host", override.host, allow=allow)
    if override.prefix_path:
        _validate_prefix(f"{path}.prefix_path", override.prefix_path, allow=allow)
    for name, value in (override.headers or {}).items():
        where = member(f"{path}.headers", name)
        if _TOKEN.fullmatch(name) is None:
            fail(where, "is not a header name")
        if _FIELD_VALUE_BAD.search(value):
            fail(where, "must not hold control characters")
    for name in override.query or {}:
        if not name:
            fail(f"{path}.query", "a parameter needs a name")


def _validate_upstream(field: str, upstream: str, *, allow: bool) -> None:
    if not allow:
        fail(field, "is only possible on an allow rule")
    if "://" in upstream or "/" in upstream or "*" in upstream:
        fail(field, f'must be "host[:port]" without scheme, path and *, got {shown(upstream)}')
    if _is_address(upstream):
        return
    match = _UPSTREAM.fullmatch(upstream)
    if match is None or (match["host"].startswith("[") and not _is_address(match["host"][1:-1])):
        fail(field, f'must be "host[:port]" or "ip[:port]", got {shown(upstream)}')
    if match["port"] is not None and not 1 <= int(match["port"]) <= 65535:
        fail(field, f"port {match['port']} out of range [1, 65535]")


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _validate_prefix(field: str, prefix: str, *, allow: bool) -> None:
    if not allow:
        fail(field, "is only possible on an allow rule")
    if not prefix.startswith("/"):
        fail(field, f'must start with "/", got {shown(prefix)}')
    if any(character in prefix for character in "*?#") or _PATH_BAD.search(prefix) or not prefix.isascii():
        fail(field, f"must be an ASCII path without * ? # and blanks, got {shown(prefix)}")
    if len(prefix) > MAX_PATH_CHARACTERS:
        fail(field, f"must be at most {MAX_PATH_CHARACTERS} characters")


def _validate_script(field: str, script: str, *, allow: bool) -> None:
    if not allow:
        fail(field, "is only possible on an allow rule")
    if len(script.encode()) > MAX_SCRIPT_BYTES:
        fail(field, f"must be at most {MAX_SCRIPT_BYTES} bytes")
