"""The operator's snapshot store: list, look, delete, copy, export, import. No published client knows these routes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from litestar import Controller, Response, delete, get, post, put
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, Parameter
from litestar.response.base import ASGIResponse
from litestar.status_codes import HTTP_201_CREATED, HTTP_204_NO_CONTENT
from litestar.types import ASGIApp, Receive, Scope, Send

from hiverd.api.documents import bytes_body, describe, json_body
from hiverd.api.file_uploads import body_of
from hiverd.api.injected import AnyRequest, TheKeepalive, TheSnapshotStores
from hiverd.api.streams import HeldJson, while_connected
from hiverd.api.transfers import body_length
from hiverd.contracts.errors import HiverError, InvalidError, NotFoundError
from hiverd.contracts.snapshot import SnapshotInfo, SnapshotStore, closing, missing_snapshot
from hiverd.files.paths import content_disposition
from hiverd.wire.answers import SnapshotEntry, SnapshotStored, SnapshotVersion
from hiverd.wire.keys import check_key
from hiverd.wire.requests import SnapshotFork, decode_fork

log = logging.getLogger(__name__)

VERSION_HEADER: Final = "x-hiver-snapshot-version"
SHA256_HEADER: Final = "x-hiver-snapshot-sha256"
_ENDINGS: Final = ((b"\x28\xb5\x2f\xfd", ".tar.zst"), (b"\x1f\x8b", ".tar.gz"))
_HEAD_BYTES: Final = 4

QueryVersion = Annotated[str | None, Parameter(description="One version; otherwise the newest, or with DELETE all")]
_ARCHIVE: Final = {
    **describe(),
    200: ResponseSpec(bytes, media_type="application/octet-stream", generate_examples=False, description="The archive"),
}


class SnapshotsController(Controller):
    path = "/v1/snapshots"
    tags = ("snapshots",)
    # Archives stream to the store; `snapshots.max_mib` bounds them.
    request_max_body_size = None

    @get("/", summary="All snapshots", responses=describe())
    async def list_all(self, snapshot_stores: TheSnapshotStores) -> list[SnapshotEntry]:
        """Keys in order, the versions of each from the newest to the oldest."""
        entries: dict[str, list[SnapshotVersion]] = {}
        async for info in snapshot_stores.default.list():
            entries.setdefault(info.key, []).append(_version(info))
        return [SnapshotEntry(key, tuple(versions)) for key, versions in entries.items()]

    @get("/{key:str}", summary="One snapshot and its versions", responses=describe())
    async def show(self, key: FromPath[str], snapshot_stores: TheSnapshotStores) -> SnapshotEntry:
        check_key(key)
        versions = tuple([_version(info) async for info in snapshot_stores.default.list(key)])
        if not versions:
            raise missing_snapshot(key)
        return SnapshotEntry(key, versions)

    @delete("/{key:str}", status_code=HTTP_204_NO_CONTENT, summary="Remove a snapshot", responses=describe())
    async def remove(
        self, key: FromPath[str], snapshot_stores: TheSnapshotStores, version: QueryVersion = None
    ) -> None:
        """All versions, or the named one."""
        await snapshot_stores.default.delete(check_key(key), version)

    @get("/{key:str}/archive", summary="Export an archive", responses=_ARCHIVE)
    async def export(
        self, key: FromPath[str], snapshot_stores: TheSnapshotStores, version: QueryVersion = None
    ) -> ASGIApp:
        """A tar, compressed with zstd or gzip. If it turns out to be damaged the answer stays incomplete."""
        return await ArchiveDownload.of(snapshot_stores.default, check_key(key), version)

    @put(
        "/{key:str}/archive",
        status_code=HTTP_201_CREATED,
        summary="Import an archive",
        operation_class=bytes_body("A tar, compressed with zstd or gzip"),
        responses={
            **describe(),
            201: ResponseSpec(SnapshotStored, generate_examples=False, description="It is stored"),
        },
    )
    async def import_archive(
        self, request: AnyRequest, key: FromPath[str], snapshot_stores: TheSnapshotStores
    ) -> Response[SnapshotStored]:
        """As the newest version of the key. What sandboxes may unpack is judged when they do."""
        check_key(key)
        length = body_length(request.scope)
        if length is not None:
            _require_allowed(length, snapshot_stores.max_bytes)
        info = await snapshot_stores.default.put(key, _judged(body_of(request), snapshot_stores.max_bytes))
        return Response(_stored(info), status_code=HTTP_201_CREATED)

    @post(
        "/{key:str}/fork",
        status_code=HTTP_201_CREATED,
        summary="Copy a snapshot to another key",
        operation_class=json_body(SnapshotFork),
        responses=describe({201: "The copy is stored; 200 if that took more than a second"}),
    )
    async def fork(
        self,
        request: AnyRequest,
        key: FromPath[str],
        snapshot_stores: TheSnapshotStores,
        keepalive_seconds: TheKeepalive,
        version: QueryVersion = None,
    ) -> ASGIApp:
        """`{"to": key}`: the newest version, or the named one, becomes the newest of the other key."""
        check_key(key)
        target = decode_fork(await request.body()).to
        if target == key:
            raise InvalidError("to: must be another key", field="to")

        async def work() -> SnapshotStored:
            store = snapshot_stores.default
            async with closing(store.get(key, version)) as content:
                return _stored(await store.put(target, content))

        return HeldJson(
            work(),
            prompt_status=201,
            cancel_on_disconnect=True,
            keepalive_seconds=keepalive_seconds,
            name=f"fork-{key}",
        )


def _version(info: SnapshotInfo) -> SnapshotVersion:
    return SnapshotVersion(info.version, info.bytes, info.created_at, info.sha256)


def _stored(info: SnapshotInfo) -> SnapshotStored:
    return SnapshotStored(info.key, info.version, info.bytes, info.created_at, info.sha256)


def _require_allowed(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise InvalidError(f"the archive is larger than {max_bytes >> 20} MiB, the operator's snapshots.max_mib")


async def _judged(body: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[bytes]:
    """The body, if it is not too large and begins as an archive does."""
    head, size = b"", 0
    async for piece in body:
        if len(head) < _HEAD_BYTES:
            head += piece
            if len(head) < _HEAD_BYTES:
                continue
            _require_archive(head)
            piece = head  # noqa: PLW2901 -- it is the first that is passed on
        size += len(piece)
        _require_allowed(size, max_bytes)
        yield piece
    if len(head) < _HEAD_BYTES:
        _require_archive(b"")


def _require_archive(head: bytes) -> None:
    if _ending(head) == ".tar":
        raise InvalidError("the archive is compressed neither with zstd nor with gzip")


def _ending(head: bytes) -> str:
    return next((ending for magic, ending in _ENDINGS if head.startswith(magic)), ".tar")


class ArchiveDownload(ASGIResponse):
    """A stored archive. The last piece goes out only once the store has found the whole to be undamaged: of a damaged
    one the client sees an incomplete message (RFC 9112, 8)."""

    _should_set_content_length = False

    def __init__(self, info: SnapshotInfo, first: bytes, rest: AsyncIterator[bytes]) -> None:
        headers = {
            "content-length": str(info.bytes),
            "content-disposition": content_disposition(f"snapshot-{info.key}{_ending(first)}".encode()),
            "x-content-type-options": "nosniff",
            VERSION_HEADER: info.version,
        }
        if info.sha256 is not None:
            headers[SHA256_HEADER] = info.sha256
        super().__init__(status_code=200, media_type="application/octet-stream", headers=headers)
        self._held = first
        self._rest = rest

    @classmethod
    async def of(cls, store: SnapshotStore, key: str, version: str | None) -> ArchiveDownload:
        """Raises `NotFoundError` and whatever else is known before the first piece."""
        for left in (True, False):
            info = await store.find(key, version)
            rest = store.get(key, info.version)
            try:
                return cls(info, await anext(rest, b""), rest)
            except NotFoundError:
                if version is not None or not left:
                    raise  # otherwise there is a newer one, and it was the oldest
        raise missing_snapshot(key, version)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await self.start_response(send)
        try:
            async with closing(self._rest):
                async for piece in self._rest:
                    await send(_body(self._held, more=True))
                    self._held = piece
        except HiverError as error:
            log.warning("an export ends incomplete: %s", error.message)
            return
        await send(_body(self._held, more=False))


def _body(data: bytes, *, more: bool) -> Any:
    return {"type": "http.response.body", "body": data, "more_body": more}
