"""Accesses of files as stored events, several times faster than one by one: a workload makes thousands per second."""

from __future__ import annotations

import json
from typing import Final

import msgspec

from hiverd.clock import rfc3339
from hiverd.wire.events import FileOperation

_encode: Final = msgspec.json.Encoder().encode

_REQUEST: Final = (
    b'{"id":%d,"timestamp":"%b","type":"fs.request","access":"allowed","mount":%b,"path":%b,"operation":"%b"}'
)
_RESPONSE: Final = b'{"id":%d,"timestamp":"%b","type":"fs.response","backend":%b,"request_id":%d,"duration_ms":0}'


class AccessEncoder:
    """Encodes pairs of allowed `fs.request` and `fs.response` as `encode_event` does, for one moment and backend."""

    def __init__(self, wall_seconds: float, backend: str) -> None:
        self._stamp = rfc3339(wall_seconds).encode()
        self._backend = text(backend)
        self._mounts: dict[str, bytes] = {}

    def request(self, event_id: int, operation: FileOperation, mount: str, path: str) -> bytes:
        known = self._mounts.get(mount)
        if known is None:
            known = self._mounts[mount] = text(mount)
        return _REQUEST % (event_id, self._stamp, known, text(path), operation.encode())

    def response(self, event_id: int, request_id: int) -> bytes:
        return _RESPONSE % (event_id, self._stamp, self._backend, request_id)


def text(value: str) -> bytes:
    """A JSON string in ASCII."""
    encoded = _encode(value)
    return encoded if encoded.isascii() else json.dumps(value).encode()
