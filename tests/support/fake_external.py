"""A server of the `external` contract (PROTOCOL 6.4). `honours_ranges = False` makes it one that ignores `Range`."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import NamedTuple

from support.fake_http import Answer, Call, FakeService, json_answer, ranged_answer


class Stored(NamedTuple):
    data: bytes
    mtime: str
    target: str | None = None


class FakeExternal(FakeService):
    """`files`: path -> what is there. Directories exist by their files."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Stored] = {}
        self.honours_ranges = True
        self.listing: dict[str, list[dict[str, object]]] | None = None
        """The answer to every listing instead of the true one."""
        self.credentials: str | None = None
        """`user:password` that each request must bring."""

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def expire_token(self) -> bool:
        return False

    def kind(self, call: Call) -> str:
        return f"{call.method} {call.path.removeprefix('/v1/')}"

    def put(self, path: str, data: bytes, target: str | None = None) -> None:
        self.files[path] = Stored(data, datetime.now(UTC).isoformat(), target)

    def answer(self, call: Call) -> Answer:
        if self.revoked:
            return Answer(401)
        if self.credentials is not None:
            sent = call.headers.get("authorization", "").removeprefix("Basic ")
            if base64.b64decode(sent).decode() != self.credentials:
                return Answer(401)
        routes = {
            "GET list": self._list,
            "GET directory": self._directory,
            "GET stat": self._stat,
            "GET file": self._get,
            "PUT file": self._put,
            "DELETE file": self._delete,
            "POST move": self._move,
            "POST symlink": self._symlink,
        }
        route = routes.get(self.kind(call))
        return route(call) if route else Answer(405)

    def _below(self, path: str) -> list[str]:
        prefix = path.rstrip("/") + "/"
        return [name for name in self.files if name.startswith(prefix)]

    def info(self, path: str) -> dict[str, object]:
        stored = self.files.get(path)
        if stored is None:
            return {"path": path, "size": 0, "mtime": "2026-01-02T03:04:05Z", "is_dir": True}
        info: dict[str, object] = {"path": path, "size": len(stored.data), "mtime": stored.mtime, "is_dir": False}
        return info if stored.target is None else {**info, "symlink": True, "link_target": stored.target}

    def _list(self, call: Call) -> Answer:
        return json_answer(200, {"paths": [path for path in self.files if path.startswith(call.query["prefix"])]})

    def _directory(self, call: Call) -> Answer:
        if self.listing is not None:
            return json_answer(200, self.listing)
        path = call.query["path"].rstrip("/")
        names = dict.fromkeys(name[len(path) + 1 :].split("/")[0] for name in self._below(path))
        if not names and path:
            return Answer(404)
        return json_answer(200, {"entries": [self.info(f"{path}/{name}") for name in names]})

    def _stat(self, call: Call) -> Answer:
        path = call.query["path"]
        known = path in self.files or self._below(path)
        return json_answer(200, self.info(path)) if known else Answer(404)

    def _get(self, call: Call) -> Answer:
        stored = self.files.get(call.query["path"])
        if stored is None:
            return Answer(404)
        return ranged_answer(stored.data, call.headers.get("range") if self.honours_ranges else None)

    def _put(self, call: Call) -> Answer:
        path = call.query["path"]
        if self._below(path):
            return Answer(409)
        self.put(path, call.body)
        return Answer(204)

    def _delete(self, call: Call) -> Answer:
        self.files.pop(call.query["path"], None)
        return Answer(204)

    def _move(self, call: Call) -> Answer:
        body = call.json()
        if body["src"] not in self.files:
            return Answer(404)
        moved = self.files.pop(body["src"])
        self.put(body["dst"], moved.data, moved.target)
        return Answer(204)

    def _symlink(self, call: Call) -> Answer:
        body = call.json()
        self.put(body["path"], b"", body["target"])
        return Answer(204)
