"""The backend `s3` beside the SDK below it, on the same service (moto), one after the other.

Both do the same requests as far as the service sees; moto, which answers one at a time, is what limits both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession

from bench.report import Row, p50
from hiver_storage.s3 import S3FileSystem
from hiverd.contracts.filesystem import ABSENT, FileSystem
from support.object_services import moto

FILES: Final = 1_000
FILE_BYTES: Final = 4_096
PARALLEL: Final = 16
LISTED: Final = 10_000
ROUNDS: Final = 3
TURNS: Final = 20
OPENS: Final = 200
BUCKET: Final = "bench"


def measure() -> list[Row]:
    with moto() as port:
        return asyncio.run(_measure(f"http://127.0.0.1:{port}"))


async def _measure(endpoint: str) -> list[Row]:
    async with _sdk(endpoint) as client, _ours(endpoint) as files:
        await client.create_bucket(Bucket=BUCKET)
        return [
            await _uploads(client, files),
            *await _looks(client, files),
        ]


@asynccontextmanager
async def _sdk(endpoint: str) -> AsyncIterator[Any]:
    session = AioSession()
    async with session.create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=AioConfig(
            max_pool_connections=2 * PARALLEL,
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    ) as client:
        yield client


@asynccontextmanager
async def _ours(endpoint: str) -> AsyncIterator[FileSystem]:
    files = S3FileSystem(
        {
            "mount": "/data",
            "s3_bucket": BUCKET,
            "s3_access_key_id": "key",
            "s3_secret_access_key": "secret",
            "s3_endpoint": endpoint,
            "s3_use_path_style": True,
        }
    )
    await files.open()
    try:
        yield files
    finally:
        await files.close()


async def _uploads(client: Any, files: FileSystem) -> Row:
    body = bytes(FILE_BYTES)

    async def content() -> AsyncIterator[bytes]:
        yield body

    async def theirs(name: str) -> None:
        await client.put_object(Bucket=BUCKET, Key=name, Body=body)

    async def ours(name: str) -> None:
        await files.write(f"/{name}", content(), size=FILE_BYTES, expected_version=ABSENT)

    # In small turns, first the one and then the other: the machine's load and the service's size are the same for both.
    seconds = {ours: 0.0, theirs: 0.0}
    for turn in range(TURNS):
        for work in list(seconds)[:: 1 if turn % 2 else -1]:
            names = [f"{work.__name__}/{turn}-{index}" for index in range(FILES // TURNS)]
            seconds[work] += await _at_once(work, names)
    mine, sdk = FILES / seconds[ours], FILES / seconds[theirs]
    what = f"s3: {FILES:,} new files of {FILE_BYTES:,} bytes"
    note = f"{PARALLEL} at a time for both; the baseline writes without a condition"
    return Row(what, "put_object of the SDK", "requests/s", mine, sdk, ">= 0.8x", mine >= 0.8 * sdk, note)


async def _looks(client: Any, files: FileSystem) -> list[Row]:
    """A directory of many objects, one level above a tree that is not to be looked at."""

    async def make(name: str) -> None:
        await client.put_object(Bucket=BUCKET, Key=name, Body=b"x")

    await _at_once(make, [f"many/{index:05}" for index in range(LISTED)])

    async def pages() -> None:
        pager = client.get_paginator("list_objects_v2")
        found = [page async for page in pager.paginate(Bucket=BUCKET, Prefix="many/", Delimiter="/")]
        assert sum(page["KeyCount"] for page in found) == LISTED

    async def listing() -> None:
        assert len([info async for info in files.list_directory("/many")]) == LISTED

    async def get() -> None:
        answer = await client.get_object(Bucket=BUCKET, Key="many/00042")
        assert await answer["Body"].read() == b"x"

    async def read() -> None:
        assert [piece async for piece in files.read("/many/00042", 0, None)] == [b"x"]

    listed, listed_sdk = await _both(listing, pages, ROUNDS)
    opened, opened_sdk = await _both(read, get, OPENS)
    return [
        Row(
            f"s3: listing of {LISTED:,} objects",
            "its pages with the SDK",
            "ms",
            listed,
            listed_sdk,
            "<= 1.5x",
            listed <= 1.5 * listed_sdk,
        ),
        Row(
            "s3: opening one of them, p50",
            "get_object of the SDK",
            "ms",
            opened,
            opened_sdk,
            "<= 1.5x",
            opened <= 1.5 * opened_sdk,
        ),
    ]


async def _both(ours: Callable[[], Awaitable[None]], theirs: Callable[[], Awaitable[None]], rounds: int) -> Any:
    """The medians in ms, in turn."""
    times: dict[Any, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for work, taken in times.items():
            began_monotonic = time.monotonic()
            await work()
            taken.append((time.monotonic() - began_monotonic) * 1000)
    return p50(times[ours]), p50(times[theirs])


async def _at_once(work: Callable[[str], Awaitable[None]], names: list[str]) -> float:
    """Seconds for all of them, `PARALLEL` at a time."""
    waiting = iter(names)

    async def worker() -> None:
        for name in waiting:
            await work(name)

    began_monotonic = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(PARALLEL)))
    return time.monotonic() - began_monotonic
