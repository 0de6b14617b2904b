"""Google Cloud Storage on loopback: the JSON API as far as a file system needs it.

Objects have generations, preconditions hold, ranges are answered, listings have pages, uploads can be multipart or
resumable, rewrites take several requests when they are large, and tokens are fetched with a signed assertion and
expire when a test says so. Written after the API's reference; it shares no code with the plug-in.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import jwt

REWRITE_BYTES: Final = 1 << 20
"""More takes more than one request; the true limit is far higher."""
CHUNK_BYTES: Final = 256 << 10
"""All chunks of a resumable upload but the last are a multiple of it."""


class Object(NamedTuple):
    data: bytes
    generation: int
    updated: str
    metadata: dict[str, str]


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


class Refused(Exception):  # noqa: N818 -- an answer, not an error of ours
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.answer = _json({"error": {"code": status, "message": reason, "errors": [{"reason": reason}]}}, status)


class Session:
    """A resumable upload."""

    def __init__(self, bucket: str, name: str, metadata: dict[str, str], condition: str | None) -> None:
        self.bucket, self.name, self.metadata, self.condition = bucket, name, metadata, condition
        self.received = bytearray()
        self.finished: Object | None = None


class FakeGcs:
    """A server in threads of this process."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Object]] = {}
        self.sessions: dict[str, Session] = {}
        self.tokens: set[str] = set()
        self.issued: list[str] = []
        self.lock = threading.RLock()
        self._generations = itertools.count(1_700_000_000_000_000)
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        fake = self

        class Handler(_Handler):
            server_state = fake

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fake gcs", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def service_account(self) -> dict[str, str]:
        """A key file's content that this server knows."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {
            "type": "service_account",
            "project_id": "project",
            "private_key_id": "key-id",
            "private_key": pem.decode(),
            "client_email": "agent@project.iam.example",
            "token_uri": f"http://127.0.0.1:{self.port}/token",
        }

    # -- the service --------------------------------------------------------------------------------------------------

    def token(self, body: bytes) -> Answer:
        public = self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        try:
            claims: Any = jwt.decode(  # type: ignore[no-untyped-call]
                parse_qs(body.decode())["assertion"][0], certs=public.decode()
            )
        except ValueError:
            return _json({"error": "invalid_grant"}, 400)
        if "devstorage.read_write" not in claims["scope"]:
            return _json({"error": "invalid_scope"}, 400)
        token = f"ya29.{secrets.token_hex(16)}"
        self.tokens.add(token)
        self.issued.append(token)
        return _json({"access_token": token, "expires_in": 3600, "token_type": "Bearer"})

    def objects(self, bucket: str) -> dict[str, Object]:
        try:
            return self.buckets[bucket]
        except KeyError:
            raise Refused(404, "notFound") from None

    def found(self, bucket: str, name: str, generation: str | None = None) -> Object:
        found = self.objects(bucket).get(name)
        if found is None or generation not in {None, str(found.generation)}:
            raise Refused(404, "notFound")
        return found

    def store(self, bucket: str, name: str, data: bytes, metadata: dict[str, str], condition: str | None) -> Object:
        objects = self.objects(bucket)
        self.check(bucket, name, condition)
        if not name or len(name.encode()) > 1024 or "\n" in name or "\r" in name:
            raise Refused(400, "invalid")
        made = Object(data, next(self._generations), datetime.now(UTC).isoformat(), metadata)
        objects[name] = made
        return made

    def check(self, bucket: str, name: str, condition: str | None) -> None:
        there = self.objects(bucket).get(name)
        if condition is not None and int(condition) != (there.generation if there else 0):
            raise Refused(412, "conditionNotMet")

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        """In pages of objects and prefixes together, in the order of names."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        most = min(int(query.get("maxResults", "1000")), 1000)
        after = base64.urlsafe_b64decode(query["pageToken"]).decode() if "pageToken" in query else None
        answer: dict[str, Any] = {"kind": "storage#objects"}
        last = ""
        for name in sorted(self.objects(bucket)):
            if not name.startswith(prefix):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entry = name if cut < 0 else name[: cut + 1]
            if (after is not None and entry <= after) or entry in answer.get("prefixes", ()):
                continue
            if len(answer.get("items", ())) + len(answer.get("prefixes", ())) == most:
                answer["nextPageToken"] = base64.urlsafe_b64encode(last.encode()).decode()
                break
            last = entry
            if cut < 0:
                answer.setdefault("items", []).append(_resource(name, self.objects(bucket)[name]))
            else:
                answer.setdefault("prefixes", []).append(entry)
        return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: ClassVar[FakeGcs]
    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("POST", r"/token", "_token"),
        ("GET", r"/storage/v1/b/([^/]+)/o", "_list"),
        ("GET", r"/storage/v1/b/([^/]+)/o/([^/]+)", "_get"),
        ("GET", r"/download/storage/v1/b/([^/]+)/o/([^/]+)", "_get"),
        ("DELETE", r"/storage/v1/b/([^/]+)/o/([^/]+)", "_delete"),
        ("POST", r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", "_rewrite"),
        ("POST", r"/upload/storage/v1/b/([^/]+)/o", "_upload"),
        ("PUT", r"/upload/session/(\w+)", "_chunk"),
        ("POST", r"/upload/session/(\w+)", "_chunk"),
        ("DELETE", r"/upload/session/(\w+)", "_cancel"),
    ]

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 -- names of the standard library

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            answer = self._route(url.path)
        except Refused as refused:
            answer = refused.answer
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def _route(self, path: str) -> Answer:
        for method, pattern, name in self.routes:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                # The address of an upload is its own credential.
                if name not in {"_token", "_chunk", "_cancel"}:
                    self._authorise()
                serve: Callable[..., Answer] = getattr(self, name)
                with self.server_state.lock:
                    return serve(*map(unquote, match.groups()))
        raise Refused(404, "notFound")

    def _authorise(self) -> None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or token not in self.server_state.tokens:
            raise Refused(401, "authError")

    def _token(self) -> Answer:
        return self.server_state.token(self.body)

    def _list(self, bucket: str) -> Answer:
        return _json(self.server_state.listing(bucket, self.query))

    def _get(self, bucket: str, name: str) -> Answer:
        found = self.server_state.found(bucket, name, self.query.get("generation"))
        if self.query.get("alt") != "media":
            return _json(_resource(name, found))
        headers = {"x-goog-generation": str(found.generation), "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return Answer(200, found.data, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(found.data) - 1)
        if first >= len(found.data):
            raise Refused(416, "requestedRangeNotSatisfiable")
        data = found.data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{len(found.data)}"
        return Answer(206, data, headers)

    def _delete(self, bucket: str, name: str) -> Answer:
        self.server_state.found(bucket, name)
        self.server_state.check(bucket, name, self.query.get("ifGenerationMatch"))
        del self.server_state.buckets[bucket][name]
        return Answer(204)

    def _rewrite(self, bucket: str, name: str, into: str, target: str) -> Answer:
        state = self.server_state
        found = state.found(bucket, name, self.query.get("sourceGeneration"))
        done = int(self.query.get("rewriteToken", "0")) + REWRITE_BYTES
        if done < len(found.data):
            return _json({"done": False, "rewriteToken": str(done), "totalBytesRewritten": str(done)})
        made = state.store(into, target, found.data, found.metadata, self.query.get("ifGenerationMatch"))
        return _json({"done": True, "resource": _resource(target, made)})

    def _upload(self, bucket: str) -> Answer:
        state, condition = self.server_state, self.query.get("ifGenerationMatch")
        if self.query["uploadType"] == "multipart":
            resource, data = _parts(self.headers["Content-Type"], self.body)
            made = state.store(bucket, resource["name"], data, resource.get("metadata") or {}, condition)
            return _json(_resource(resource["name"], made))
        assert self.query["uploadType"] == "resumable"
        # gcsfs names the object in the query, others in the resource.
        resource = {"name": self.query.get("name"), **json.loads(self.body or b"{}")}
        state.check(bucket, resource["name"], condition)
        session = secrets.token_hex(16)
        state.sessions[session] = Session(bucket, resource["name"], resource.get("metadata") or {}, condition)
        return Answer(200, headers={"Location": f"http://{self.headers['Host']}/upload/session/{session}"})

    def _chunk(self, key: str) -> Answer:
        session = self._session(key)
        if session.finished is not None:
            return _json(_resource(session.name, session.finished))
        wanted = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers["Content-Range"])
        assert wanted is not None
        if wanted[1] is not None:
            first, last = int(wanted[1]), int(wanted[2])
            if first > len(session.received) or last - first + 1 != len(self.body):
                raise Refused(400, "badRange")
            # What it has already is passed over, as the service does: libraries may send a request twice.
            session.received += self.body[len(session.received) - first :]
        if wanted[3] == str(len(session.received)):
            data = bytes(session.received)
            made = self.server_state.store(session.bucket, session.name, data, session.metadata, session.condition)
            session.finished = made
            return _json(_resource(session.name, made))
        if len(self.body) % CHUNK_BYTES:
            raise Refused(400, "badChunk")
        last_byte = len(session.received) - 1
        return Answer(308, headers={"Range": f"bytes=0-{last_byte}"} if last_byte >= 0 else {})

    def _cancel(self, key: str) -> Answer:
        self._session(key)
        del self.server_state.sessions[key]
        return Answer(499)

    def _session(self, key: str) -> Session:
        try:
            return self.server_state.sessions[key]
        except KeyError:
            raise Refused(404, "notFound") from None


def _json(document: dict[str, Any], status: int = 200) -> Answer:
    return Answer(status, json.dumps(document).encode(), {"Content-Type": "application/json"})


def _resource(name: str, found: Object) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "name": name,
        "size": str(len(found.data)),
        "generation": str(found.generation),
        "updated": found.updated.replace("+00:00", "Z"),
        "md5Hash": base64.b64encode(hashlib.md5(found.data, usedforsecurity=False).digest()).decode(),
        **({"metadata": found.metadata} if found.metadata else {}),
    }


def _parts(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """The two parts of a multipart upload. The second is cut out by hand: it may hold anything."""
    match = re.search(r'boundary="?([^";]+)', content_type)
    assert match is not None
    boundary = f"--{match[1]}".encode()
    # MIME says CRLF; gcsfs sends LF alone, and the service takes it.
    end = b"\r\n" if boundary + b"\r\n" in body else b"\n"
    head, data = (
        body.removesuffix(end + boundary + b"--" + end)
        .removesuffix(end + boundary + b"--")
        .split(end + boundary + end, 1)
    )
    resource = BytesParser().parsebytes(head.removeprefix(boundary + end)).get_payload()
    assert isinstance(resource, str)
    return json.loads(resource), data.split(end + end, 1)[1]
