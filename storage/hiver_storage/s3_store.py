"""A bucket of S3, by aiobotocore's client, which s3fs makes."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Mapping
from functools import cache
from typing import Any, Final

import s3fs
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from botocore.parsers import ResponseParserError

from hiverd.contracts.errors import InvalidError
from hiverd.contracts.filesystem import ABSENT

from .failures import of_connection, of_status, of_transport, quieten
from .keys import date_of, endpoint_of, optional, required
from .object_store import WRITE, Body, Page, Store, Stored, Upload

LINK_VERSION: Final = "link:"
"""What the version of a link begins with."""
LINK_BYTES: Final = 4095
"""No target of a link is longer, so a longer object of such a name is a file."""
_CONNECTIONS: Final = 32
_PART_BYTES: Final = 8 << 20
_MOST_PARTS: Final = 10_000
_COPY_BYTES: Final = 5 << 30
"""The largest object that is copied with one request."""
_PIECE_BYTES: Final = 1 << 20
_REFUSED: Final = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"}
)


class S3Store(Store):
    """Repeating is left to the caller."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._bucket = required(config, "s3_bucket")
        path_style = config.get("s3_use_path_style") or False
        if not isinstance(path_style, bool):
            raise InvalidError("s3_use_path_style must be true or false", field="s3_use_path_style")
        self._options: dict[str, Any] = {
            "key": required(config, "s3_access_key_id"),
            "secret": required(config, "s3_secret_access_key"),
            "token": optional(config, "s3_session_token"),
            "endpoint_url": endpoint_of(config, "s3_endpoint"),
            "client_kwargs": {"region_name": optional(config, "s3_region") or "us-east-1"},
            "config_kwargs": {
                "connect_timeout": 5,
                "read_timeout": 30,
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "max_pool_connections": _CONNECTIONS,
                "s3": {"addressing_style": "path" if path_style else "auto"},
                "ignore_configured_endpoint_urls": True,
                # Services that speak S3 seldom know the checksums that Amazon's takes.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        }
        self._files: Any = None
        self._client: Any = None

    async def open(self) -> None:
        quieten("botocore", "aiobotocore", "s3fs", "fsspec")
        self._files = s3fs.S3FileSystem(
            asynchronous=True,
            skip_instance_cache=True,
            use_listings_cache=False,
            session=_session(),
            **self._options,
        )
        self._client = await self._files.set_session()

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def translate(self, error: Exception) -> OSError | None:
        if isinstance(error, ClientError):
            return _of_answer(error)
        if isinstance(error, ParamValidationError):
            return OSError(errno.EINVAL, "the service cannot take this name or value")
        if isinstance(error, BotoCoreError | ResponseParserError):
            return of_connection(TimeoutError() if "Timeout" in type(error).__name__ else error)
        return of_transport(error)

    def part_bytes(self, size: int) -> int:
        return max(_PART_BYTES, -(-size // _MOST_PARTS))

    async def head(self, key: str) -> Stored:
        answer = await self._client.head_object(Bucket=self._bucket, Key=key)
        return Stored(
            key,
            answer["ContentLength"],
            answer["LastModified"],
            answer["ETag"],
            write=answer["Metadata"].get(WRITE),
        )

    async def side(self, key: str) -> Stored | None:
        """The link that this object holds; None if there is no such object, or it is a file."""
        try:
            answer = await self._client.get_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if isinstance(_of_answer(error), FileNotFoundError):
                return None
            raise
        async with answer["Body"] as body:
            if answer["ContentLength"] > LINK_BYTES or WRITE in answer["Metadata"]:
                return None
            target = os.fsdecode(await body.read())
        return Stored(key, 0, answer["LastModified"], LINK_VERSION + answer["ETag"], link_target=target)

    async def page(self, prefix: str, *, flat: bool, after: str | None = None, limit: int | None = None) -> Page:
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": prefix, "MaxKeys": limit or self.page_keys}
        if flat:
            request["Delimiter"] = "/"
        if after is not None:
            request["ContinuationToken"] = after
        answer = await self._client.list_objects_v2(**request)
        objects = [
            Stored(found["Key"], found["Size"], found["LastModified"], found["ETag"])
            for found in answer.get("Contents", ())
        ]
        prefixes = [found["Prefix"] for found in answer.get("CommonPrefixes", ())]
        return Page(objects, prefixes, answer.get("NextContinuationToken"))

    async def fetch(self, key: str, offset: int, size: int | None, version: str | None) -> Body | None:
        request: dict[str, Any] = {"Bucket": self._bucket, "Key": key}
        if offset or size is not None:
            request["Range"] = f"bytes={offset}-" if size is None else f"bytes={offset}-{offset + size - 1}"
        if version is not None:
            request["IfMatch"] = version
        try:
            return S3Body(await self._client.get_object(**request))
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 416:
                return None
            raise

    async def put(self, key: str, data: bytes, condition: str | None, metadata: Mapping[str, str]) -> Stored:
        answer = await self._client.put_object(
            Bucket=self._bucket, Key=key, Body=data, Metadata=metadata, **_condition(condition)
        )
        return _written(key, len(data), answer, metadata)

    async def begin(self, key: str, size: int, condition: str | None, metadata: Mapping[str, str]) -> Upload:
        answer = await self._client.create_multipart_upload(Bucket=self._bucket, Key=key, Metadata=metadata)
        target = {"Bucket": self._bucket, "Key": key, "UploadId": answer["UploadId"]}
        return S3Upload(self._client, target, condition, metadata)

    async def copy(self, source: Stored, key: str) -> None:
        origin = {"Bucket": self._bucket, "Key": source.key}
        if source.size <= _COPY_BYTES:
            await self._client.copy_object(Bucket=self._bucket, Key=key, CopySource=origin)
            return
        metadata = (await self._client.head_object(**origin))["Metadata"]
        upload = await self.begin(key, source.size, None, metadata)
        assert isinstance(upload, S3Upload)  # noqa: S101 -- for the type checker
        try:
            for start in range(0, source.size, _COPY_BYTES):
                await upload.add_copy(origin, start, min(start + _COPY_BYTES, source.size) - 1)
            await upload.finish()
        except BaseException:
            await upload.abort()
            raise

    async def remove(self, key: str) -> None:
        await self._client.delete_object(Bucket=self._bucket, Key=key)


@cache
def _session() -> AioSession:
    """Holds no credential of ours; it keeps the description of the service, which takes long to read."""
    return AioSession()


class S3Body(Body):
    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.version = answer["ETag"]
        self.size = answer["ContentLength"]
        self._body = answer["Body"]

    async def pieces(self) -> AsyncIterator[bytes]:
        while piece := await self._body.read(_PIECE_BYTES):
            yield piece

    async def close(self) -> None:
        self._body.close()


class S3Upload(Upload):
    """A multipart upload."""

    def __init__(self, client: Any, target: Mapping[str, str], condition: str | None, metadata: Mapping[str, str]):
        self._client = client
        self._target = target
        self._condition = condition
        self._metadata = metadata
        self._parts: list[dict[str, Any]] = []
        self._size = 0

    async def add(self, data: bytes) -> None:
        number = len(self._parts) + 1
        answer = await self._client.upload_part(**self._target, PartNumber=number, Body=data)
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        self._size += len(data)

    async def add_copy(self, origin: Mapping[str, str], first: int, last: int) -> None:
        """A range of another object as the next part."""
        number = len(self._parts) + 1
        answer = await self._client.upload_part_copy(
            **self._target, PartNumber=number, CopySource=origin, CopySourceRange=f"bytes={first}-{last}"
        )
        self._parts.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
        self._size += last + 1 - first

    async def finish(self) -> Stored:
        answer = await self._client.complete_multipart_upload(
            **self._target, MultipartUpload={"Parts": self._parts}, **_condition(self._condition)
        )
        return _written(self._target["Key"], self._size, answer, self._metadata)

    async def abort(self) -> None:
        await self._client.abort_multipart_upload(**self._target)


def _condition(condition: str | None) -> dict[str, str]:
    if condition is None:
        return {}
    return {"IfNoneMatch": "*"} if condition == ABSENT else {"IfMatch": condition}


def _written(key: str, size: int, answer: Mapping[str, Any], metadata: Mapping[str, str]) -> Stored:
    """The service does not say when it was written; the answer's own date is as good."""
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    return Stored(key, size, date_of(headers.get("date")), answer["ETag"], write=metadata.get(WRITE))


def _of_answer(error: ClientError) -> OSError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    if code == "NoSuchBucket":
        return OSError(errno.EIO, "the bucket does not exist")
    if code in _REFUSED:
        return of_status(403, code)
    if code == "RequestTimeout":
        return of_status(408, code)
    if code in {"InternalError", "SlowDown", "ServiceUnavailable"}:
        # These can come after a 200 (CompleteMultipartUpload, CopyObject).
        return of_status(503, code)
    return of_status(status, code)
