"""What programs fetch packages and code from: a Python index, an npm registry, git repositories. Small, and on loopback
as the servers in `support.upstreams`."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from ssl import SSLContext
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from support.upstreams import Seen, SocketUpstream, read_body


class Answer(NamedTuple):
    status: int
    kind: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


NOT_FOUND = Answer(404, "text/plain", b"no such thing\n")


class AnsweringUpstream(SocketUpstream):
    """HTTP/1.1 with keep-alive; a function answers. Every request is kept in `seen`."""

    def __init__(self, answer: Callable[[Seen], Answer], context: SSLContext | None = None) -> None:
        self.seen: list[Seen] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                request = Seen(self.command, self.path, list(self.headers.items()), read_body(self))
                seen.append(request)
                self._send(answer(request))

            def _send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers:
                    self.send_header(name, value)
                self.send_header("Content-Type", answer.kind)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(lambda connection: _handle(Handler, connection), context)


def _handle(handler: Callable[..., object], connection: object) -> None:
    handler(connection, ("127.0.0.1", 0), None)


def python_index(files_host: str, packages: Mapping[str, str], context: SSLContext) -> AnsweringUpstream:
    """The simple index (PEP 503) at `/simple/NAME/`, and the wheels, which are said to be on `files_host`.

    `packages`: name to the source of the one module that it has.
    """
    wheels = {f"{name}-1.0-py3-none-any.whl": _wheel(name, source) for name, source in packages.items()}

    def answer(request: Seen) -> Answer:
        *_, parent, name = ("", "", *urlsplit(request.path).path.strip("/").split("/"))
        if name in wheels:
            return Answer(200, "application/octet-stream", wheels[name])
        wheel = f"{name}-1.0-py3-none-any.whl"
        if parent != "simple" or wheel not in wheels:
            return NOT_FOUND
        digest = hashlib.sha256(wheels[wheel]).hexdigest()
        link = f'<a href="https://{files_host}/packages/{wheel}#sha256={digest}">{wheel}</a>'
        return Answer(200, "text/html", f"<!DOCTYPE html><html><body>{link}</body></html>".encode())

    return AnsweringUpstream(answer, context)


def _wheel(name: str, source: str) -> bytes:
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return packed.getvalue()


def npm_registry(host: str, packages: Mapping[str, str], context: SSLContext) -> AnsweringUpstream:
    """Documents of packages at `/NAME`, their tarballs at `/NAME/-/FILE.tgz`. `packages`: name to its index.js."""
    tarballs = {name: _tarball(name, source) for name, source in packages.items()}

    def answer(request: Seen) -> Answer:
        path = unquote(urlsplit(request.path).path).removeprefix("/")
        if path in tarballs:
            return Answer(200, "application/json", json.dumps(document(path)).encode())
        for name, tarball in tarballs.items():
            if path == _tarball_path(name):
                return Answer(200, "application/octet-stream", tarball)
        return NOT_FOUND

    def document(name: str) -> dict[str, Any]:
        digest = base64.b64encode(hashlib.sha512(tarballs[name]).digest()).decode()
        dist = {"tarball": f"https://{host}/{_tarball_path(name)}", "integrity": f"sha512-{digest}"}
        version = {"name": name, "version": "1.0.0", "dist": dist}
        return {"name": name, "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}

    return AnsweringUpstream(answer, context)


def _tarball_path(name: str) -> str:
    return f"{name}/-/{name.rpartition('/')[2]}-1.0.0.tgz"


def _tarball(name: str, source: str) -> bytes:
    packed = io.BytesIO()
    manifest = json.dumps({"name": name, "version": "1.0.0", "main": "index.js"})
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path, content in (("package/package.json", manifest), ("package/index.js", source)):
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    return packed.getvalue()


def git_server(root: Path, context: SSLContext) -> AnsweringUpstream:
    """Git's smart protocol for the bare repositories in the folder, by `git http-backend` (gitprotocol-http(5))."""

    def answer(request: Seen) -> Answer:
        url = urlsplit(request.path)
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": request.method,
            "PATH_INFO": unquote(url.path),
            "QUERY_STRING": url.query,
            "CONTENT_TYPE": request.header("content-type") or "",
            "CONTENT_LENGTH": str(len(request.body)),
            "HTTP_CONTENT_ENCODING": request.header("content-encoding") or "",
            "REMOTE_USER": "tests",
            "GIT_PROTOCOL": request.header("git-protocol") or "",
            "REMOTE_ADDR": "127.0.0.1",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
        }
        command = ["git", "http-backend"]
        output = subprocess.run(command, input=request.body, capture_output=True, env=environment, check=True).stdout
        head, _, body = output.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
        status = int(fields.pop("Status", "200 OK").split()[0])
        return Answer(status, fields.pop("Content-Type", "text/plain"), body, tuple(fields.items()))

    return AnsweringUpstream(answer, context)


def bare_repository(path: Path, files: Mapping[str, str]) -> None:
    """With one commit that has the files on the branch `main`."""
    who = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")

    def git(*arguments: str, data: bytes | None = None) -> str:
        command = ["git", "-C", str(path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, input=data).stdout.decode().strip()

    path.mkdir(parents=True)
    git("init", "--quiet", "--bare", "--initial-branch=main")
    git("config", "http.receivepack", "true")
    rows = [
        f"100644 blob {git('hash-object', '-w', '--stdin', data=text.encode())}\t{name}" for name, text in files.items()
    ]
    tree = git("mktree", data="\n".join(rows).encode())
    git("update-ref", "refs/heads/main", git("commit-tree", tree, "-m", "first"))
