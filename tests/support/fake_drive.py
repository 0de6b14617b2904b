"""Google Drive's API v3 as far as a file system needs it, and Google's token service, on loopback.

Refuses what Drive refuses: unknown queries, unknown ids, requests without a valid token. Answers hold only the `fields`
that were asked for. Names are compared loosely in queries, and lists come in no useful order, so that nothing relies on
either. With `shared_drive` nothing is found unless a request says that it supports shared drives.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from typing import Any, Final
from urllib.parse import parse_qs

from hiverd.testing.filesystem import FailureKind
from support.fake_http import Answer, Call, FakeService, json_answer, ranged_answer

FOLDER: Final = "application/vnd.google-apps.folder"
ROOT: Final = "0AroOtOfTheDrive"
_START: Final = datetime.now(UTC)


class Revision:
    def __init__(self, number: int, data: bytes, mime_type: str) -> None:
        self.id = f"rev{number:06}"
        self.data = data
        self.mime_type = mime_type

    def resource(self) -> dict[str, Any]:
        md5 = hashlib.md5(self.data).hexdigest()  # noqa: S324 -- Drive's own
        return {"id": self.id, "md5Checksum": md5, "size": str(len(self.data)), "mimeType": self.mime_type}


class File:
    def __init__(self, file_id: str, name: str, mime_type: str, parent: str, created: datetime) -> None:
        self.id = file_id
        self.name = name
        self.mime_type = mime_type
        self.parents = [parent]
        self.created = self.modified = created
        self.trashed = False
        self.properties: dict[str, str] = {}
        self.revisions: list[Revision] = []
        self.changes = 1

    @property
    def data(self) -> bytes:
        return self.revisions[-1].data

    def resource(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kind": "drive#file",
            "id": self.id,
            "name": self.name,
            "mimeType": self.mime_type,
            "parents": self.parents,
            "trashed": self.trashed,
            "createdTime": _time(self.created),
            "modifiedTime": _time(self.modified),
            "version": str(self.changes),
            "webViewLink": f"https://drive.example/{self.id}/edit",
        }
        if self.properties:
            found["properties"] = self.properties
        if self.revisions:
            last = self.revisions[-1].resource()
            found |= {"size": last["size"], "md5Checksum": last["md5Checksum"], "headRevisionId": last["id"]}
        return found


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"


class FakeDrive(FakeService):
    """`files`: id -> file. `page_size` bounds pages; `max_chunk` is what an upload session takes of one request."""

    def __init__(self) -> None:
        super().__init__()
        self.page_size = 1000
        self.max_chunk = 1 << 40
        self.shared_drive = False
        self.refresh_tokens = {"refresh-0"}
        self.account_email: str | None = None
        """Of the service account that may fetch tokens."""
        self.rate_reason = "userRateLimitExceeded"
        self.files: dict[str, File] = {ROOT: File(ROOT, "My Drive", FOLDER, "", _START)}
        self._sessions: dict[str, dict[str, Any]] = {}
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"http://{self.address}/"

    # -- for tests ----------------------------------------------------------------------------------------------------

    def add(self, name: str, data: bytes | None = b"", parent: str = ROOT, mime_type: str = "text/plain") -> File:
        """As another program makes it. `data` None: without bytes."""
        file = File(self._new_id(), name, mime_type, parent, self._now())
        self.files[file.id] = file
        if data is not None:
            self.set_data(file, data)
        return file

    def set_data(self, file: File, data: bytes) -> None:
        file.revisions.append(Revision(next(self._numbers), data, file.mime_type))
        file.modified = self._now()
        file.changes += 2

    def named(self, name: str) -> list[File]:
        return [file for file in self.files.values() if file.name == name and not file.trashed]

    # -- the API ------------------------------------------------------------------------------------------------------

    def kind(self, call: Call) -> str:
        path = call.path
        if path.startswith("/upload/"):
            return f"upload {call.query.get('uploadType')}"
        if call.query.get("alt") == "media" and "/revisions/" not in path:
            return "media"
        known = {"/token": "token", "/drive/v3/files/generateIds": "ids", "/drive/v3/files": "list or create"}
        kind = known.get(path) or ("chunk" if path.startswith("/session/") else None)
        kind = "revisions" if "/revisions" in path else kind
        if kind == "list or create":
            return "list" if call.method == "GET" else "create"
        return kind or {"GET": "get", "PATCH": "update", "DELETE": "delete"}.get(call.method, call.method)

    def refused(self, kind: FailureKind) -> Answer:
        if kind == "429" and self.rate_reason:
            return _error(403, self.rate_reason)
        return _error(int(kind), "backendError")

    def answer(self, call: Call) -> Answer:
        if call.path == "/token":
            return self._token(call)
        if call.bearer not in self.accepted_tokens:
            return _error(401, "authError")
        routes: dict[str, Callable[[Call], Answer]] = {
            "list": self._list,
            "ids": lambda call: json_answer(200, {"ids": [self._new_id() for _ in range(int(call.query["count"]))]}),
            "create": lambda call: self._create(call, call.json(), None),
            "get": self._get,
            "media": self._media,
            "update": lambda call: self._update(call, call.json(), None),
            "delete": self._delete,
            "upload multipart": self._multipart,
            "upload media": lambda call: self._update(call, {}, (call.body, call.headers["content-type"])),
            "upload resumable": self._open_session,
            "chunk": self._chunk,
            "revisions": self._revisions,
        }
        return routes[self.kind(call)](call)

    def _token(self, call: Call) -> Answer:
        form = {name: values[0] for name, values in parse_qs(call.body.decode()).items()}
        if form["grant_type"] == "refresh_token":
            known = form["refresh_token"] in self.refresh_tokens and form["client_secret"] == "the-client-secret"
        else:
            claims = json.loads(base64.urlsafe_b64decode(form["assertion"].split(".")[1] + "=="))
            known = claims["iss"] == self.account_email and "auth/drive" in claims["scope"]
        if self.revoked or not known:
            return json_answer(400, {"error": "invalid_grant", "error_description": "Token has been revoked."})
        return json_answer(200, {"access_token": self.new_token(), "expires_in": 3599, "token_type": "Bearer"})

    def _find(self, call: Call) -> File | None:
        file_id = re.sub(r"^.*/files/", "", call.path).split("/")[0]
        if self.shared_drive and call.query.get("supportsAllDrives") != "true":
            return None
        return self.files.get(ROOT if file_id == "root" else file_id)

    def _list(self, call: Call) -> Answer:
        keep = _Query(call.query["q"]).parse()
        if keep is None:
            return _error(400, "invalid")
        visible = not self.shared_drive or call.query.get("includeItemsFromAllDrives") == "true"
        found = [file for file in self.files.values() if visible and keep(file, self._ancestors_trashed)]
        found.sort(key=lambda file: hashlib.md5(file.id.encode()).digest())  # noqa: S324 -- no useful order
        start = int(call.query.get("pageToken") or 0)
        size = min(int(call.query.get("pageSize") or 100), self.page_size)
        wanted = re.search(r"files\(([^)]*)\)", call.query.get("fields", ""))
        assert wanted is not None, "fields are not restricted"
        body: dict[str, Any] = {
            "incompleteSearch": False,
            "files": [_only(file.resource(), wanted[1]) for file in found[start : start + size]],
        }
        if start + size < len(found):
            body["nextPageToken"] = str(start + size)
        return json_answer(200, body)

    def _ancestors_trashed(self, file: File) -> bool:
        """Drive lists what is in a trashed folder as trashed."""
        while file.parents[0] in self.files:
            if file.trashed:
                return True
            file = self.files[file.parents[0]]
        return file.trashed

    def _get(self, call: Call) -> Answer:
        file = self._find(call)
        return self._resource(call, file) if file else _error(404, "notFound")

    def _media(self, call: Call) -> Answer:
        file = self._find(call)
        if file is None:
            return _error(404, "notFound")
        if not file.revisions:
            return _error(403, "fileNotDownloadable")
        return ranged_answer(file.data, call.headers.get("range"))

    def _revisions(self, call: Call) -> Answer:
        file = self.files.get(re.sub(r"^.*/files/", "", call.path).split("/")[0])
        if file is None:
            return _error(404, "notFound")
        revision_id = call.path.rpartition("/revisions")[2].strip("/")
        if revision_id:
            return ranged_answer(next(found.data for found in file.revisions if found.id == revision_id), None)
        return json_answer(200, {"revisions": [revision.resource() for revision in file.revisions]})

    def _delete(self, call: Call) -> Answer:
        file = self._find(call)
        if file is None:
            return _error(404, "notFound")
        del self.files[file.id]
        return Answer(204)

    def _create(self, call: Call, body: dict[str, Any], media: tuple[bytes, str] | None) -> Answer:
        if body.get("id") in self.files:
            return _error(409, "fileIdInUse")
        parent = (body.get("parents") or [ROOT])[0]
        parent = ROOT if parent == "root" else parent
        if parent not in self.files:
            return _error(404, "notFound")
        mime_type = body.get("mimeType") or (media[1] if media else "application/octet-stream")
        file = File(body.get("id") or self._new_id(), body.get("name", "Untitled"), mime_type, parent, self._now())
        if not _set_properties(file, body):
            return _error(400, "invalid")
        self.files[file.id] = file
        if media is not None or mime_type != FOLDER:
            self.set_data(file, media[0] if media else b"")
        return self._resource(call, file)

    def _update(self, call: Call, body: dict[str, Any], media: tuple[bytes, str] | None) -> Answer:
        file = self._find(call)
        if file is None:
            return _error(404, "notFound")
        if not _set_properties(file, body):
            return _error(400, "invalid")
        added, removed = call.query.get("addParents"), call.query.get("removeParents")
        if removed:
            file.parents.remove(ROOT if removed == "root" else removed)
        if added:
            file.parents.append(ROOT if added == "root" else added)
        assert len(file.parents) == 1, "Drive's files have one parent"
        file.name = body.get("name", file.name)
        file.mime_type = body.get("mimeType", file.mime_type)
        file.trashed = body.get("trashed", file.trashed)
        file.changes += 1
        if media is not None:
            self.set_data(file, media[0])
        return self._resource(call, file)

    def _resource(self, call: Call, file: File) -> Answer:
        return json_answer(200, _only(file.resource(), call.query.get("fields", "kind,id,name,mimeType")))

    # -- uploads ------------------------------------------------------------------------------------------------------

    def _multipart(self, call: Call) -> Answer:
        boundary = b"--" + re.findall('boundary="([^"]*)"', call.headers["content-type"])[0].encode()
        metadata, media = (part.partition(b"\n\n") for part in call.body.split(boundary)[1:3])
        data = media[2].removesuffix(b"\n")
        assert len(data) <= 5 << 20, "too much for one request"
        content = data, BytesParser().parsebytes(media[0].strip()).get_content_type()
        return (self._create if call.method == "POST" else self._update)(call, json.loads(metadata[2]), content)

    def _open_session(self, call: Call) -> Answer:
        if call.method == "PATCH" and self._find(call) is None:
            return _error(404, "notFound")
        name = f"{next(self._numbers)}"
        self._sessions[name] = {"call": call, "data": b"", "done": None}
        return Answer(200, b"", {"Location": f"{self.url}session/{name}"})

    def _chunk(self, call: Call) -> Answer:
        session = self._sessions.get(call.path.rpartition("/")[2])
        if session is None:
            return _error(404, "notFound")
        if session["done"] is not None:
            done: Answer = session["done"]
            return done
        span, _, total = call.headers["content-range"].removeprefix("bytes ").partition("/")
        if span != "*":
            first, last = map(int, span.split("-"))
            if first != len(session["data"]) or last - first + 1 != len(call.body):
                return _error(400, "badRequest")
            assert last + 1 == int(total) or len(call.body) % (256 << 10) == 0
            taken = min(len(call.body), self.max_chunk)
            session["data"] += call.body[:taken]
        if len(session["data"]) < int(total):
            headers = {"Range": f"bytes=0-{len(session['data']) - 1}"} if session["data"] else {}
            return Answer(308, b"", headers)
        opened: Call = session["call"]
        content = session["data"], opened.headers.get("x-upload-content-type", "")
        finish = self._create if opened.method == "POST" else self._update
        answer = session["done"] = finish(opened, opened.json(), content)
        return answer

    def _new_id(self) -> str:
        return f"1fileId_{next(self._numbers):06}-x"

    def _now(self) -> datetime:
        return datetime.now(UTC) + timedelta(milliseconds=next(self._numbers))


def _set_properties(file: File, body: dict[str, Any]) -> bool:
    """False if one is larger than Drive takes, or there are too many."""
    for key, value in (body.get("properties") or {}).items():
        if value is None:
            file.properties.pop(key, None)
        else:
            file.properties[key] = value
    return len(file.properties) <= 30 and all(
        len(key.encode() + value.encode()) <= 124 for key, value in file.properties.items()
    )


def _only(resource: dict[str, Any], fields: str) -> dict[str, Any]:
    wanted = fields.split(",")
    return {name: value for name, value in resource.items() if name in wanted}


def _error(status: int, reason: str) -> Answer:
    errors = [{"domain": "global", "reason": reason, "message": reason}]
    return json_answer(status, {"error": {"errors": errors, "code": status, "message": reason}})


Keep = Callable[[File, Callable[[File], bool]], bool]


class _Query:
    """Drive's query language: `and`, `or`, parentheses, and the terms that a file system needs."""

    def __init__(self, text: str) -> None:
        self._tokens = re.findall(r"'(?:[^'\\]|\\.)*'|[()=]|\w+", text)

    def parse(self) -> Keep | None:
        try:
            keep = self._any()
        except (IndexError, ValueError):
            return None
        return None if self._tokens else keep

    def _any(self) -> Keep:
        terms = list(self._series("or", self._all))
        return lambda file, trashed: any(term(file, trashed) for term in terms)

    def _all(self) -> Keep:
        terms = list(self._series("and", self._term))
        return lambda file, trashed: all(term(file, trashed) for term in terms)

    def _series(self, word: str, part: Callable[[], Keep]) -> Iterator[Keep]:
        yield part()
        while self._tokens[:1] == [word]:
            self._take(word)
            yield part()

    def _term(self) -> Keep:
        if self._tokens[0] == "(":
            self._take("(")
            inner = self._any()
            self._take(")")
            return inner
        if self._tokens[0] == "trashed":
            self._take("trashed", "=", "false")
            return lambda file, trashed: not trashed(file)
        if self._tokens[0] == "name":
            self._take("name", "=")
            name = self._string().casefold()
            return lambda file, _: file.name.casefold() == name
        parent = self._string()
        self._take("in", "parents")
        return lambda file, _: (ROOT if parent == "root" else parent) in file.parents

    def _take(self, *words: str) -> None:
        for word in words:
            if self._tokens.pop(0) != word:
                raise ValueError(word)

    def _string(self) -> str:
        token = self._tokens.pop(0)
        if not token.startswith("'"):
            raise ValueError(token)
        return re.sub(r"\\(.)", r"\1", token[1:-1], flags=re.DOTALL)
