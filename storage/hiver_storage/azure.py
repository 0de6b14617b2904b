"""The backend `azure`: a container of Azure Blob Storage (PROTOCOL 4.2).

Versions are entity tags, conditions are `If-Match` and `If-None-Match`. On the client of `azure-storage-blob`,
which adlfs stands on as well: adlfs has neither conditions nor timeouts, and no endpoint to give beside a SAS token.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar, Final

from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.core.exceptions import AzureError, HttpResponseError, ResourceNotFoundError
from azure.storage.blob import BlobBlock
from azure.storage.blob.aio import BlobClient, BlobPrefix, ContainerClient

from hiverd.contracts.errors import InvalidError
from hiverd.contracts.filesystem import ABSENT, VersionConflictError

from .failures import of_connection, of_status, of_transport, quieten
from .keys import decode_target, endpoint_of, optional, prefix_of, required
from .names import CONTROLS, UNDECODABLE, Names
from .object_files import ObjectFileSystem
from .object_store import LINK, WRITE, Body, Page, Store, Stored, Upload

_PART_BYTES: Final = 8 << 20
_MOST_PARTS: Final = 50_000
_RANGE_BYTES: Final = 4 << 20
"""What is asked for at once: the library holds all of an answer."""
_PIECE_BYTES: Final = 1 << 20
_POLL_SECONDS: Final = 0.5
_NAMES: Final = Names(UNDECODABLE + CONTROLS + "\\", last=".")
"""The service takes a backslash for a slash, and drops dots at the end of a name."""
_FOLDER: Final = "hdi_isfolder"
"""Metadata of a blob by which other programs mean a directory."""
_OPTIONS: Final[Mapping[str, Any]] = {
    "retry_total": 0,
    "connection_timeout": 5,
    "read_timeout": 30,
    "max_single_get_size": _RANGE_BYTES,
    "max_chunk_get_size": _RANGE_BYTES,
    "max_single_put_size": 64 << 20,
}


class AzureFileSystem(ObjectFileSystem):
    """`azure_container` is required, and one of `azure_connection_string` (which wins), `azure_account_key` and
    `azure_sas_token`. The host's own rights are never used."""

    backend: ClassVar[str] = "azure"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, AzureStore(config), prefix_of(config, "azure_prefix"), _NAMES)


def _client_of(config: Mapping[str, Any]) -> tuple[ContainerClient, str]:
    """The client, and what a source's URL needs besides. Raises InvalidError, without repeating any value."""
    container = required(config, "azure_container")
    connection = optional(config, "azure_connection_string")
    if connection is not None:
        try:
            client = ContainerClient.from_connection_string(connection, container, **_OPTIONS)
        except (ValueError, AttributeError, TypeError):
            message = "azure_connection_string is not a connection string"
            raise InvalidError(message, field="azure_connection_string") from None
        given = dict(part.split("=", 1) for part in connection.rstrip(";").split(";"))
        return client, next((value for name, value in given.items() if name.lower() == "sharedaccesssignature"), "")
    account = optional(config, "azure_account")
    if account is not None and re.fullmatch(r"[a-z0-9]{3,24}", account) is None:
        raise InvalidError("azure_account must be the name of a storage account", field="azure_account")
    endpoint = endpoint_of(config, "azure_endpoint")
    if endpoint is None:
        if account is None:
            message = "azure_account is required without azure_connection_string and azure_endpoint"
            raise InvalidError(message, field="azure_account")
        endpoint = f"https://{account}.blob.core.windows.net"
    credential, query = _credential(config, account)
    return ContainerClient(endpoint, container, credential=credential, **_OPTIONS), query


def _credential(config: Mapping[str, Any], account: str | None) -> tuple[Any, str]:
    key, token = optional(config, "azure_account_key"), optional(config, "azure_sas_token")
    if key is not None:
        try:
            base64.b64decode(key, validate=True)
        except ValueError:
            raise InvalidError("azure_account_key is not a key in Base64", field="azure_account_key") from None
        return (key if account is None else AzureNamedKeyCredential(account, key)), ""
    if token is not None:
        query = token.removeprefix("?")
        if re.search(r"(^|&)sig=", query) is None:
            raise InvalidError("azure_sas_token has no signature", field="azure_sas_token")
        return AzureSasCredential(query), query
    message = "one of azure_connection_string, azure_account_key and azure_sas_token is required"
    raise InvalidError(message, field="azure_account_key")


class AzureStore(Store):
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._client, self._query = _client_of(config)

    async def open(self) -> None:
        quieten("azure")

    async def close(self) -> None:
        await self._client.close()

    def translate(self, error: Exception) -> OSError | None:
        if isinstance(error, HttpResponseError) and (error.status_code or 0) >= 400:
            return _of_answer(error)
        if isinstance(error, AzureError):
            return of_connection(TimeoutError() if "Timeout" in type(error).__name__ else error)
        return of_transport(error)

    def part_bytes(self, size: int) -> int:
        return max(_PART_BYTES, -(-size // _MOST_PARTS))

    def _blob(self, key: str) -> BlobClient:
        return self._client.get_blob_client(key)

    async def head(self, key: str) -> Stored:
        found = await self._blob(key).get_blob_properties()
        if _is_folder(found):
            raise FileNotFoundError(errno.ENOENT, "a directory")
        return _stored(key, found)

    async def page(self, prefix: str, *, flat: bool, after: str | None = None, limit: int | None = None) -> Page:
        options: dict[str, Any] = {
            "name_starts_with": prefix,
            "include": ["metadata"],
            "results_per_page": limit or self.page_keys,
        }
        listing = self._client.walk_blobs(delimiter="/", **options) if flat else self._client.list_blobs(**options)
        pages: Any = listing.by_page(after)
        found = [item async for item in await anext(pages)]
        prefixes = {item.name for item in found if isinstance(item, BlobPrefix)}
        blobs = [item for item in found if not isinstance(item, BlobPrefix)]
        if flat:
            prefixes |= {f"{item.name}/" for item in blobs if _is_folder(item)}
            blobs = [item for item in blobs if not _is_folder(item)]
        return Page([_stored(item.name, item) for item in blobs], sorted(prefixes), pages.continuation_token or None)

    async def fetch(self, key: str, offset: int, size: int | None, version: str | None) -> Body | None:
        blob = self._blob(key)
        try:
            download = await _download(blob, offset, size, version)
        except HttpResponseError as error:
            if error.status_code == 416:
                return None
            raise
        return AzureBody(blob, download, offset)

    async def put(self, key: str, data: bytes, condition: str | None, metadata: Mapping[str, str]) -> Stored:
        answer = await self._blob(key).upload_blob(
            io.BytesIO(data), length=len(data), metadata=dict(metadata), **_condition(condition, overwrite=True)
        )
        return _written(key, len(data), answer, metadata)

    async def begin(self, key: str, size: int, condition: str | None, metadata: Mapping[str, str]) -> Upload:
        return AzureUpload(self._blob(key), condition, metadata)

    async def copy(self, source: Stored, key: str) -> None:
        """Large blobs are copied in the background; one that is copied again meanwhile starts anew."""
        url = self._blob(source.key).url.partition("?")[0]
        target = self._blob(key)
        answer = await target.start_copy_from_url(f"{url}?{self._query}" if self._query else url)
        status: Any = answer["copy_status"]
        while status == "pending":
            await asyncio.sleep(_POLL_SECONDS)
            status = (await target.get_blob_properties()).copy.status
        if status != "success":
            raise OSError(errno.EIO, "the service did not finish a copy")

    async def remove(self, key: str) -> None:
        try:
            await self._blob(key).delete_blob(delete_snapshots="include")
        except ResourceNotFoundError as error:
            if isinstance(_of_answer(error), FileNotFoundError):
                return
            raise


async def _download(blob: BlobClient, offset: int, size: int | None, version: str | None) -> Any:
    """As it is stored: what is packed stays packed."""
    condition: dict[str, Any] = {} if version is None else _condition(version)
    start = offset if offset or size is not None else None
    return await blob.download_blob(start, size, decompress=False, max_concurrency=1, **condition)


class AzureBody(Body):
    """Range after range, each a request under the condition that nothing changed."""

    def __init__(self, blob: BlobClient, download: Any, offset: int) -> None:
        self.version = _tag(download.properties.etag)
        self.size = int(download.size)
        self._blob = blob
        self._download = download
        self._offset = offset

    async def pieces(self) -> AsyncIterator[bytes]:
        done = 0
        while done < self.size:
            # The library has the first range already when it answers; it is not asked to go on by itself.
            data = await self._download.read(min(_RANGE_BYTES, self.size - done))
            for start in range(0, len(data), _PIECE_BYTES):
                yield data[start : start + _PIECE_BYTES]
            done += len(data)
            if done < self.size:
                length = min(_RANGE_BYTES, self.size - done)
                self._download = await _download(self._blob, self._offset + done, length, self.version)

    async def close(self) -> None:
        """Nothing is open between two requests."""


class AzureUpload(Upload):
    """Blocks, and the list that makes a blob of them. The service drops blocks without a list after a week."""

    def __init__(self, blob: BlobClient, condition: str | None, metadata: Mapping[str, str]) -> None:
        self._blob = blob
        self._condition = condition
        self._metadata = metadata
        self._word = secrets.token_hex(8)
        self._blocks: list[BlobBlock] = []
        self._size = 0

    async def add(self, data: bytes) -> None:
        name = f"{self._word}-{len(self._blocks):06}"
        await self._blob.stage_block(name, io.BytesIO(data), length=len(data))
        self._blocks.append(BlobBlock(name))
        self._size += len(data)

    async def finish(self) -> Stored:
        try:
            answer = await self._blob.commit_block_list(
                self._blocks, metadata=dict(self._metadata), **_condition(self._condition)
            )
        except HttpResponseError as error:
            # Who finishes an upload to the same name ends all others.
            if _code(error) == "InvalidBlockList":
                raise _overtaken(self._condition) from None
            raise
        return _written(self._blob.blob_name, self._size, answer, self._metadata)

    async def abort(self) -> None:
        """There is no request for that."""


def _overtaken(condition: str | None) -> OSError:
    text = "another upload to this name was finished meanwhile"
    return OSError(errno.EIO, text) if condition is None else VersionConflictError(errno.EEXIST, text)


def _condition(condition: str | None, *, overwrite: bool = False) -> dict[str, Any]:
    """`overwrite`: for a method that has such an argument and takes its absence for a condition."""
    if condition is None:
        return {"overwrite": True} if overwrite else {}
    if condition == ABSENT:
        return {"overwrite": False} if overwrite else {"match_condition": MatchConditions.IfMissing}
    options: dict[str, Any] = {"etag": f'"{condition}"', "match_condition": MatchConditions.IfNotModified}
    return {**options, "overwrite": True} if overwrite else options


def _tag(text: str) -> str:
    """Listings have it without quotes."""
    return text.strip('"')


def _metadata(found: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in (found.metadata or {}).items()}


def _is_folder(found: Any) -> bool:
    return _metadata(found).get(_FOLDER, "").lower() == "true"


def _stored(key: str, found: Any) -> Stored:
    metadata = _metadata(found)
    target = decode_target(metadata.get(LINK))
    return Stored(key, found.size, found.last_modified, _tag(found.etag), link_target=target, write=metadata.get(WRITE))


def _written(key: str, size: int, answer: Mapping[str, Any], metadata: Mapping[str, str]) -> Stored:
    target = decode_target(metadata.get(LINK))
    write = metadata.get(WRITE)
    return Stored(key, size, answer["last_modified"], _tag(answer["etag"]), link_target=target, write=write)


def _code(error: HttpResponseError) -> str:
    """The service's own word, where the answer has one."""
    code = getattr(error, "error_code", None) or ""
    return str(getattr(code, "value", code))


def _of_answer(error: HttpResponseError) -> OSError:
    code = _code(error)
    status = error.status_code or 500
    if code in {"ContainerNotFound", "ContainerBeingDeleted"}:
        return OSError(errno.EIO, "the container does not exist")
    if code == "BlobAlreadyExists":
        return of_status(412, code)
    if status == 412 and code.startswith("Lease"):
        return of_status(403, code)
    return of_status(status, code)
