"""The few HTTP calls that the command line makes to a running server, on the standard library alone.

No proxy of the environment is used: the server is on this host or was named on purpose.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Final
from urllib.parse import quote, urlsplit

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
SHA256_HEADER: Final = "x-hiver-snapshot-sha256"
_PIECE_BYTES: Final = 1 << 20
_SILENCE_SECONDS: Final = 60.0
"""The server sends a byte every 2 s on streams and long answers; this much silence means that it is gone."""


class CallError(Exception):
    """A call that failed; the message is for people, `exit_code` for scripts."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


class Server:
    """A running server at a base URL such as http://localhost:10000."""

    def __init__(self, url: str, *, timeout_seconds: float = _SILENCE_SECONDS) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1:
            raise CallError(f"{url} is not an http:// or https:// URL", EXIT_USAGE)
        self._url = url.rstrip("/")
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = port
        self._base = parts.path.rstrip("/")
        self._timeout_seconds = timeout_seconds

    def sandboxes(self) -> list[dict[str, Any]]:
        """All sandboxes as `{"id", "key", "status"}`."""
        answer = self._call("GET", "/controller/v1/sandboxes")
        if not isinstance(answer, list) or not all(
            isinstance(ref, dict) and {"id", "key"} <= ref.keys() for ref in answer
        ):
            raise self._no_server()
        return answer

    def delete(self, key: str) -> None:
        """Stops and removes a sandbox."""
        self._call("DELETE", self._path(key))

    def snapshots(self) -> list[dict[str, Any]]:
        """All snapshots as `{"key", "versions": [{"version", "bytes", "created_at", "sha256"?}]}`."""
        answer = self._call("GET", "/v1/snapshots")
        if not isinstance(answer, list):
            raise self._no_server()
        return answer

    def snapshot(self, key: str) -> dict[str, Any]:
        """One of them."""
        answer = self._call("GET", _snapshot_path(key))
        if not isinstance(answer, dict):
            raise self._no_server()
        return answer

    def delete_snapshot(self, key: str, version: str | None) -> None:
        """All of its versions if none is named."""
        self._call("DELETE", _snapshot_path(key, "", version))

    def export_snapshot(self, key: str, version: str | None, target: BinaryIO) -> None:
        """Writes the archive. Raises `CallError` if it does not arrive as the server has it."""
        digest = hashlib.sha256()
        with self._request("GET", _snapshot_path(key, "/archive", version), None) as response:
            expected = response.headers.get(SHA256_HEADER)
            while piece := response.read(_PIECE_BYTES):
                digest.update(piece)
                target.write(piece)
        if response.length or (expected is not None and digest.hexdigest() != expected):
            raise CallError(f'the archive of "{key}" did not arrive whole; the server\'s log may say why')

    def import_snapshot(self, key: str, content: BinaryIO) -> dict[str, Any]:
        """Stores an archive as the newest version; answers as `snapshots` has a version, with its key."""
        pieces = iter(lambda: content.read(_PIECE_BYTES), b"")
        with self._request("PUT", _snapshot_path(key, "/archive"), pieces) as response:
            answer = json.loads(response.read())
        if not isinstance(answer, dict) or "version" not in answer:
            raise self._no_server()
        return answer

    def fork_snapshot(self, key: str, version: str | None, target: str) -> dict[str, Any]:
        """Copies a snapshot to another key; answers as `import_snapshot` does."""
        body = json.dumps({"to": target}).encode()
        with self._request("POST", _snapshot_path(key, "/fork", version), body) as response:
            answer = json.loads(response.read())
        if isinstance(answer, dict) and "error" in answer:  # after a second the status is sent, and then it fails
            raise CallError(str(answer["error"]))
        if not isinstance(answer, dict) or "version" not in answer:
            raise self._no_server()
        return answer

    def exec_stream(self, key: str, exec_id: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Frames of a command's output, the last one of type `exit`."""
        return self._stream("POST", self._path(key, f"/exec-stream/{exec_id}"), json.dumps(body).encode())

    def events(self, key: str, *, after: int | None, follow: bool) -> Iterator[dict[str, Any]]:
        """Events with ids above `after`, then live ones if `follow`."""
        query = f"?follow={'true' if follow else 'false'}" + ("" if after is None else f"&lastEventId={after}")
        return self._stream("GET", self._path(key, f"/events{query}"), None)

    def _no_server(self) -> CallError:
        return CallError(f"what answers at {self._url} is no Hiver server", EXIT_UNREACHABLE)

    def _path(self, key: str, rest: str = "") -> str:
        ref = next((ref for ref in self.sandboxes() if ref["key"] == key), None)
        if ref is None:
            raise CallError(f'there is no sandbox "{key}"; see: hiver ls')
        return f"/sandbox/{quote(ref['id'], safe='')}/v1/{quote(key, safe='')}{rest}"

    def _call(self, method: str, path: str) -> Any:
        with self._request(method, path, None) as response:
            raw = response.read()
            return json.loads(raw) if raw.strip() else None

    def _stream(self, method: str, path: str, body: bytes | None) -> Iterator[dict[str, Any]]:
        with self._request(method, path, body) as response:
            yield from _frames(response)

    @contextmanager
    def _request(
        self, method: str, path: str, body: bytes | Iterator[bytes] | None
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout_seconds)
        headers = {"Content-Type": "application/json"} if isinstance(body, bytes) else {}
        if isinstance(body, Iterator):
            headers = {"Content-Type": "application/octet-stream", "Transfer-Encoding": "chunked"}
        try:
            # A server that refuses a long body answers and hangs up before it has read all of it.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(
                    method, self._base + path, body=body, headers=headers, encode_chunked=isinstance(body, Iterator)
                )
            response = connection.getresponse()
            if response.status >= 400:
                raise CallError(_error_text(response))
            yield response
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _unreachable(self, error: Exception) -> CallError:
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            return CallError(f"no server answers at {self._url}; start one with: hiver serve", EXIT_UNREACHABLE)
        if isinstance(error, TimeoutError):
            return CallError(f"the server at {self._url} does not answer", EXIT_UNREACHABLE)
        return CallError(f"the connection to {self._url} failed: {error or type(error).__name__}", EXIT_UNREACHABLE)


def _snapshot_path(key: str, rest: str = "", version: str | None = None) -> str:
    query = "" if version is None else f"?version={quote(version, safe='')}"
    return f"/v1/snapshots/{quote(key, safe='')}{rest}{query}"


def _error_text(response: http.client.HTTPResponse) -> str:
    text = response.read().decode("utf-8", "replace")
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        body = None
    message = body.get("error") if isinstance(body, dict) else text.strip()
    return f"{message or response.reason} (HTTP {response.status})"


def _frames(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events as their JSON data; comments and fields other than `data` are skipped."""
    data: list[str] = []
    for raw in response:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield json.loads("\n".join(data))
            data = []
