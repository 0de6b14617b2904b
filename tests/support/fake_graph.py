"""Microsoft Graph's drives as far as a file system needs them, and Microsoft's token service, on loopback.

Refuses what OneDrive refuses: names that it does not take, requests without a valid token, and requests to the
addresses that it gave for content if they do bring one. Those addresses are of another host name. Names are compared
without case.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import parse_qs, unquote

from hiverd.testing.filesystem import FailureKind
from support.fake_http import Answer, Call, FakeService, json_answer, ranged_answer

_REFUSED: Final = re.compile(
    r'["*:<>?/\\|\x00-\x1f\x7f]|^ |[ .]\Z|^(con|prn|aux|nul|com\d|lpt\d|\.lock|desktop\.ini)\Z|^~\$|_vti_',
    re.IGNORECASE,
)
_BEHAVIOR: Final = "@microsoft.graph.conflictBehavior"


class DriveItem:
    def __init__(self, number: int, name: str, parent: DriveItem | None, data: bytes | None) -> None:
        self.id = f"01ITEM{number:06}"
        self.name = name
        self.parent = parent
        self.data = data
        """None: a folder."""
        self.changes = self.content_changes = 1
        self.modified = datetime.now(UTC)
        self.children: dict[str, DriveItem] = {}

    def resource(self, host: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "eTag": f'"{{{self.id}}},{self.changes}"',
            "lastModifiedDateTime": self.modified.isoformat().replace("+00:00", "Z"),
            "size": sum(len(child.data or b"") for child in self.children.values()),
        }
        if self.data is None:
            return {**found, "folder": {"childCount": len(self.children)}}
        return {
            **found,
            "size": len(self.data),
            "cTag": f'"c:{{{self.id}}},{self.content_changes}"',
            "file": {"mimeType": "application/octet-stream"},
            "@microsoft.graph.downloadUrl": f"{host}/content/{self.id}?tempauth=the-tempauth",
        }


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.answer = json_answer(status, {"error": {"code": code, "message": code}})


class FakeGraph(FakeService):
    """`page_size` bounds pages; `makes_parents` and `replaces_on_move` are what the service may do or leave to the
    client; `max_chunk` is what an upload session takes of one request."""

    def __init__(self) -> None:
        super().__init__()
        self.page_size = 200
        self.makes_parents = True
        self.replaces_on_move = True
        self.max_chunk = 1 << 40
        self.pages_elsewhere = False
        self.drive = "/me/drive"
        self.tenant = "common"
        self.refresh_tokens = {"refresh-0"}
        self.expired_downloads = 0
        """So many of the next requests for content find that their address has expired."""
        self._numbers = itertools.count(1)
        self.root = DriveItem(next(self._numbers), "root", None, None)
        self._sessions: dict[str, dict[str, Any]] = {}

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def other_host(self) -> str:
        return f"http://localhost:{self.port}"

    # -- for tests ----------------------------------------------------------------------------------------------------

    def add(self, name: str, data: bytes | None, parent: DriveItem | None = None) -> DriveItem:
        """As another program makes it, or replaces it."""
        parent = parent or self.root
        item = parent.children.get(_folded(name))
        if item is None:
            item = parent.children[_folded(name)] = DriveItem(next(self._numbers), name, parent, data)
            return item
        item.data = data
        item.changes += 1
        item.content_changes += 1
        item.modified = datetime.now(UTC)
        return item

    def names(self) -> set[str]:
        return {item.name for item in self.root.children.values()}

    # -- the API ------------------------------------------------------------------------------------------------------

    def kind(self, call: Call) -> str:
        if call.path.endswith("/oauth2/v2.0/token"):
            return "token"
        if call.path.startswith("/content/"):
            return "content"
        if call.path.startswith("/session/"):
            return f"session {call.method}"
        relation = call.target.rpartition("/")[2]
        if relation in ("children", "content", "createUploadSession"):
            return f"{call.method} {relation}"
        return f"{call.method} item"

    def refused(self, kind: FailureKind) -> Answer:
        codes = {"429": "activityLimitReached", "503": "serviceNotAvailable"}
        return json_answer(int(kind), {"error": {"code": codes.get(kind, "generalException")}}, **{"Retry-After": "0"})

    def answer(self, call: Call) -> Answer:
        if self.kind(call) == "token":
            return self._token(call)
        try:
            if self.kind(call) == "content" or self.kind(call).startswith("session"):
                return self._other_host(call)
            if call.bearer not in self.accepted_tokens:
                raise _RefusedError(401, "InvalidAuthenticationToken")
            return self._graph(call)
        except _RefusedError as refused:
            return refused.answer

    def _token(self, call: Call) -> Answer:
        form = {name: values[0] for name, values in parse_qs(call.body.decode()).items()}
        known = form["refresh_token"] in self.refresh_tokens and form["client_id"] == "the-client"
        if self.revoked or not known or call.path.split("/")[1] != self.tenant:
            return json_answer(400, {"error": "invalid_grant", "error_description": "AADSTS70000"})
        token = self.new_token()
        self.refresh_tokens = {f"refresh-{self.tokens}"}  # each is good once
        return json_answer(200, {"access_token": token, "refresh_token": f"refresh-{self.tokens}", "expires_in": 3599})

    def _graph(self, call: Call) -> Answer:
        if not call.target.startswith(f"/v1.0{self.drive}/"):
            raise _RefusedError(404, "itemNotFound")
        rest = call.target.removeprefix(f"/v1.0{self.drive}/")
        if rest.startswith("items/"):
            return self._patch(call, self._by_id(self.root, rest.removeprefix("items/")))
        path, relation = "", rest.removeprefix("root").strip("/")
        if rest.startswith("root:/"):
            path, _, relation = rest.removeprefix("root:/").partition(":/")
        names = [unquote(name) for name in path.split("/")] if path else []
        for name in names:
            if _REFUSED.search(name):
                raise _RefusedError(400, "invalidRequest")
        routes: dict[str, Callable[[Call, list[str]], Answer]] = {
            "GET item": self._get,
            "DELETE item": self._delete,
            "GET children": self._children,
            "POST children": self._make_folder,
            "PUT content": self._put,
            "POST createUploadSession": self._open_session,
        }
        return routes[f"{call.method} {relation or 'item'}"](call, names)

    def _find(self, names: list[str]) -> DriveItem:
        item = self.root
        for name in names:
            found = item.children.get(_folded(name))
            if found is None:
                raise _RefusedError(404, "itemNotFound")
            item = found
        return item

    def _by_id(self, item: DriveItem, item_id: str) -> DriveItem:
        below = [item]
        for found in below:
            if found.id == item_id:
                return found
            below.extend(found.children.values())
        raise _RefusedError(404, "itemNotFound")

    def _resource(self, call: Call, item: DriveItem, status: int = 200) -> Answer:
        wanted = call.query.get("$select")
        found = item.resource(self.other_host)
        return json_answer(status, {name: found[name] for name in found if wanted is None or name in wanted.split(",")})

    def _get(self, call: Call, names: list[str]) -> Answer:
        return self._resource(call, self._find(names))

    def _delete(self, call: Call, names: list[str]) -> Answer:
        item = self._find(names)
        assert item.parent is not None
        del item.parent.children[_folded(item.name)]
        return Answer(204)

    def _children(self, call: Call, names: list[str]) -> Answer:
        items = list(self._find(names).children.values())
        start = int(call.query.get("$skiptoken") or 0)
        size = min(int(call.query.get("$top") or 200), self.page_size)
        wanted = call.query["$select"].split(",")
        found = [item.resource(self.other_host) for item in items[start : start + size]]
        page: dict[str, Any] = {"value": [{name: one[name] for name in one if name in wanted} for one in found]}
        if start + size < len(items):
            query = f"$top={call.query.get('$top')}&$select={call.query['$select']}&$skiptoken={start + size}"
            host = self.other_host if self.pages_elsewhere else self.url
            page["@odata.nextLink"] = f"{host}{call.target}?{query}"
        return json_answer(200, page)

    def _make_folder(self, call: Call, names: list[str]) -> Answer:
        parent, body = self._find(names), call.json()
        if _REFUSED.search(body["name"]) or parent.data is not None:
            raise _RefusedError(400, "invalidRequest")
        if _folded(body["name"]) in parent.children:
            raise _RefusedError(409, "nameAlreadyExists")
        return self._resource(call, self.add(body["name"], None, parent), 201)

    def _parent(self, names: list[str]) -> DriveItem:
        parent = self.root
        for name in names:
            found = parent.children.get(_folded(name))
            if found is None:
                if not self.makes_parents:
                    raise _RefusedError(404, "itemNotFound")
                found = self.add(name, None, parent)
            if found.data is not None:
                raise _RefusedError(400, "invalidRequest")
            parent = found
        return parent

    def _judge(self, names: list[str], behavior: str, if_match: str | None) -> None:
        """Raises what the service says if the condition does not hold."""
        try:
            item: DriveItem | None = self._find(names)
        except _RefusedError:
            item = None
        if if_match is not None and (item is None or item.resource("")["eTag"] != if_match):
            raise _RefusedError(412, "preconditionFailed")
        if item is not None and (behavior == "fail" or item.data is None):
            raise _RefusedError(409, "nameAlreadyExists")

    def _store(self, names: list[str], data: bytes, behavior: str, if_match: str | None) -> DriveItem:
        self._judge(names, behavior, if_match)
        return self.add(names[-1], data, self._parent(names[:-1]))

    def _put(self, call: Call, names: list[str]) -> Answer:
        assert len(call.body) <= 4 << 20, "too much for one request"
        behavior = call.query.get(_BEHAVIOR, "replace")
        return self._resource(call, self._store(names, call.body, behavior, call.headers.get("if-match")), 201)

    def _patch(self, call: Call, item: DriveItem) -> Answer:
        assert call.method == "PATCH"
        body = call.json()
        parent = self._by_id(self.root, body["parentReference"]["id"]) if "parentReference" in body else item.parent
        name = body.get("name", item.name)
        assert item.parent is not None
        assert parent is not None
        if _REFUSED.search(name):
            raise _RefusedError(400, "invalidRequest")
        there = parent.children.get(_folded(name))
        if there is not None and there is not item:
            replaces = self.replaces_on_move and body.get(_BEHAVIOR) == "replace" and there.data is not None
            if not replaces:
                raise _RefusedError(409, "nameAlreadyExists")
        del item.parent.children[_folded(item.name)]
        item.name, item.parent = name, parent
        item.changes += 1
        parent.children[_folded(name)] = item
        return self._resource(call, item)

    # -- what is at other hosts ---------------------------------------------------------------------------------------

    def _other_host(self, call: Call) -> Answer:
        assert call.headers["host"].startswith("localhost"), call.headers["host"]
        if "authorization" in call.headers:
            raise _RefusedError(401, "unauthenticated")  # as the service does
        if self.kind(call) != "content":
            return self._session(call)
        if self.expired_downloads > 0:
            self.expired_downloads -= 1
            raise _RefusedError(401, "unauthenticated")
        item = self._by_id(self.root, call.path.rpartition("/")[2])
        return ranged_answer(item.data or b"", call.headers.get("range"))

    def _open_session(self, call: Call, names: list[str]) -> Answer:
        behavior = call.json().get("item", {}).get(_BEHAVIOR, "rename")
        self._judge(names, behavior, call.headers.get("if-match"))
        self._parent(names[:-1])
        name = f"{next(self._numbers)}"
        self._sessions[name] = {
            "names": names, "behavior": behavior, "if_match": call.headers.get("if-match"), "data": b"",
        }  # fmt: skip
        return json_answer(200, {"uploadUrl": f"{self.other_host}/session/{name}?the-tempauth"})

    def _session(self, call: Call) -> Answer:
        name = call.path.rpartition("/")[2]
        session = self._sessions.get(name)
        if session is None:
            raise _RefusedError(404, "itemNotFound")
        if call.method == "DELETE":
            del self._sessions[name]
            return Answer(204)
        if call.method == "PUT":
            span, _, total = call.headers["content-range"].removeprefix("bytes ").partition("/")
            first, last = map(int, span.split("-"))
            if first != len(session["data"]):
                raise _RefusedError(416, "invalidRange")
            assert last - first + 1 == len(call.body)
            assert last + 1 == int(total) or len(call.body) % (320 << 10) == 0
            session["data"] += call.body[: self.max_chunk]
            if len(session["data"]) == int(total):
                item = self._store(session["names"], session["data"], session["behavior"], session["if_match"])
                del self._sessions[name]
                return self._resource(call, item, 201)
        return json_answer(202, {"nextExpectedRanges": [f"{len(session['data'])}-"]})

    @property
    def open_sessions(self) -> int:
        return len(self._sessions)
