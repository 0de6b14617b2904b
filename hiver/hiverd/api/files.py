"""Files and directories of a sandbox (PROTOCOL 3.10): new-form routes, all three historical shapes."""

from __future__ import annotations

import os
from typing import Annotated, Final

from litestar import Controller, delete, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromQuery, Parameter
from litestar.status_codes import HTTP_200_OK
from litestar.types import ASGIApp
from msgspec import Struct

from hiverd.api.documents import FileOperation, bytes_body, describe
from hiverd.api.file_responses import DirectoryListing, FileDownload
from hiverd.api.file_uploads import UploadForm, body_of
from hiverd.api.injected import AnyRequest, TheFiles, TheSandbox
from hiverd.api.transfers import body_length, takeover_of
from hiverd.contracts.errors import InvalidError
from hiverd.files.access import DirectoryEntry, Written
from hiverd.files.paths import path_from_url, query_value

_BASE_SEGMENTS: Final = 5
"""`file` is number five when `/sandbox/{ref}/v1/{key}/file` is split at its slashes."""

QueryPath = Annotated[str | None, Parameter(description="Absolute path inside the sandbox")]
"""Declared for the API's description. Handlers take the value from the raw query, where odd bytes survive."""


def _path_in_url(request: AnyRequest) -> bytes:
    """What follows `/file/`, percent-decoded exactly once, so that names with `%`, `?`, `#` or odd bytes are reachable.

    Raises `InvalidError` for an empty path.
    """
    scope = request.scope
    path = path_from_url(scope["raw_path"], scope["path"], "file", _BASE_SEGMENTS)
    if not path.strip(b"/"):
        raise InvalidError("path is empty", field="path")
    return path


def _path_in_query(request: AnyRequest, declared: str | None) -> bytes:
    """`?path=` of the clients up to 0.1.23. Raises `InvalidError` if it is absent, empty or relative."""
    path = query_value(request.scope["query_string"], "path")
    if not declared or not path:
        raise InvalidError("query parameter 'path' is missing", field="path")
    if not path.startswith(b"/"):
        raise InvalidError("path must be absolute", field="path")
    return path


class Directory(Struct, frozen=True):
    """Shape of a listing, for the API's description; the listing itself is streamed."""

    entries: list[DirectoryEntry]


_DOWNLOAD: Final = {
    **describe(),
    200: ResponseSpec(bytes, media_type="application/octet-stream", generate_examples=False, description="The file"),
}
_WRITING: Final = {**describe(), 200: ResponseSpec(Written, generate_examples=False, description="It is in place")}
_LISTING: Final = {**describe(), 200: ResponseSpec(Directory, generate_examples=False, description="Its entries")}


class FilesController(Controller):
    """Needs the dependencies `sandbox` and `files`, and `raw_path` rewritten wherever `path` is."""

    path = "/sandbox/{sandbox_ref:str}/v1/{key:str}"
    tags = ("files",)
    # Uploads stream to disk, and the sandbox's disk bounds them.
    request_max_body_size = None

    @get("/file/{path:path}", operation_class=FileOperation, summary="Read a file", responses=_DOWNLOAD)
    async def read(
        self,
        request: AnyRequest,
        sandbox: TheSandbox,
        files: TheFiles,
        offset: FromQuery[int] = 0,
    ) -> ASGIApp:
        """The bytes from `offset` on."""
        return FileDownload(await files.read(sandbox, _path_in_url(request), offset))

    @get("/file", summary="Read a file, for clients up to 0.1.23", responses=_DOWNLOAD)
    async def read_by_query(
        self,
        request: AnyRequest,
        sandbox: TheSandbox,
        files: TheFiles,
        path: QueryPath = None,
        offset: FromQuery[int] = 0,
    ) -> ASGIApp:
        """`path` is absolute."""
        return FileDownload(await files.read(sandbox, _path_in_query(request, path), offset))

    @post(
        "/file/{path:path}",
        status_code=HTTP_200_OK,
        summary="Write a file",
        operation_class=bytes_body("The file's content; may be empty"),
        responses=_WRITING,
    )
    async def write(self, request: AnyRequest, sandbox: TheSandbox, files: TheFiles) -> Written:
        """Makes missing parents; replaces an existing file when everything has arrived."""
        path = _path_in_url(request)
        takeover, length = takeover_of(request.scope), body_length(request.scope)
        if takeover is None or length is None:
            return await files.write(sandbox, path, body_of(request))
        async with takeover.body(length) as incoming:
            return await files.write(sandbox, path, body_of(request) if incoming is None else incoming)

    @post("/file", status_code=HTTP_200_OK, summary="Write a file, for clients up to 0.1.23", responses=_WRITING)
    async def write_form(self, request: AnyRequest, sandbox: TheSandbox, files: TheFiles) -> Written:
        """`multipart/form-data`: `destination`, an absolute directory, and then `file`, whose file name is used."""
        form = UploadForm(request.headers.get("content-type", ""), body_of(request))
        await form.open()
        path = os.fsencode(form.destination) + b"/" + os.fsencode(form.filename)
        return await files.write(sandbox, path, form.content())

    @delete(
        "/file/{path:path}",
        operation_class=FileOperation,
        summary="Remove a file or an empty directory",
        responses=describe(),
    )
    async def remove(self, request: AnyRequest, sandbox: TheSandbox, files: TheFiles) -> None:
        """A link is removed itself, not what it leads to."""
        await files.delete(sandbox, _path_in_url(request))

    @delete("/file", summary="Remove a file, for clients up to 0.1.23", responses=describe())
    async def remove_by_query(
        self,
        request: AnyRequest,
        sandbox: TheSandbox,
        files: TheFiles,
        path: QueryPath = None,
    ) -> None:
        """`path` is absolute."""
        await files.delete(sandbox, _path_in_query(request, path))

    @get("/directories", summary="List a directory", responses=_LISTING)
    async def list_directory(
        self,
        request: AnyRequest,
        sandbox: TheSandbox,
        files: TheFiles,
        path: QueryPath = None,
    ) -> ASGIApp:
        """`path` may be empty, which is the root. Sorted by name unless the directory is very large."""
        raw = query_value(request.scope["query_string"], "path")
        if path is None or raw is None:
            raise InvalidError("query parameter 'path' is missing", field="path")
        return await DirectoryListing.of(files.list_directory(sandbox, raw))
