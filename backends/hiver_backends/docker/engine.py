"""The Engine's API, as far as we use it: bounded in time, and with errors of our own tree."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import Awaitable, Mapping
from typing import Any, Final, TypeVar

import aiodocker
import aiohttp

from hiverd.contracts.errors import (
    BackendError,
    ConflictError,
    HiverError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from hiverd.contracts.isolation import Progress

_T = TypeVar("_T")
_PULL_IDLE_SECONDS: Final = 120.0
"""A pull that says nothing for so long has died."""
_REMOVAL_SECONDS: Final = 60.0
_UNKNOWN_IMAGE: Final = (
    "manifest unknown", "name unknown", "not found", "does not exist", "denied", "unauthorized", "no basic auth",
)  # fmt: skip
_NO_CONNECTION: Final = 900
"""The client's own status for an Engine that it cannot reach."""
_MAX_FILE_BYTES: Final = 8 * 1024 * 1024


class EngineApi:
    """One session for all calls. Every call raises `UnavailableError` when the Engine does not answer."""

    def __init__(self, endpoint: str, timeout_seconds: float) -> None:
        self.endpoint: Final = endpoint
        self._timeout_seconds = timeout_seconds
        self._client: aiodocker.Docker | None = None

    async def close(self) -> None:
        """Closes the session; the next call would open another one."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The Engine's documents /info and /version."""
        info = await self._call(self._docker().system.info(), "tell about itself")
        version = await self._call(self._docker().version(), "tell its version")
        return dict(info), version

    async def create(self, name: str, config: Mapping[str, Any]) -> str:
        """The new container's id. Raises `NotFoundError` without the image, `ConflictError` if the name is taken."""
        docker = self._docker()
        container = await self._call(docker.containers.create(dict(config), name=name), "create a container")
        return container.id

    async def start(self, container_id: str) -> None:
        """Starts a created container."""
        await self._call(self._docker().containers.container(container_id).start(), "start a container")

    async def inspect(self, container: str) -> dict[str, Any]:
        """By id or name. Raises `NotFoundError`."""
        return await self._call(self._docker().containers.container(container).show(), "describe a container")

    async def remove(self, container: str) -> None:
        """Kills and removes; returns once it is gone. No error if there is none such."""
        deadline = asyncio.get_running_loop().time() + _REMOVAL_SECONDS
        while True:
            try:
                handle = self._docker().containers.container(container)
                await self._call(handle.delete(force=True, v=True), "remove a container")
            except NotFoundError:
                return
            except ConflictError:
                # Someone else is at it already.
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def labelled(self, label: str, value: str) -> list[dict[str, str]]:
        """The labels of all containers, running or not, that have a certain one."""
        filters = json.dumps({"label": [f"{label}={value}"]})
        listing = self._docker().containers.list(all=1, filters=filters)
        return [dict(container["Labels"] or {}) for container in await self._call(listing, "list containers")]

    async def image(self, reference: str) -> dict[str, Any]:
        """An image that the Engine has. Raises `NotFoundError`."""
        return await self._call(self._docker().images.inspect(reference), "describe an image")

    async def load(self, archive: bytes) -> None:
        """Loads images from an archive in the form of `docker save`."""
        await self._call(_drained(self._docker().images.import_image(io.BytesIO(archive))), "load an image")

    async def pull(self, reference: str, credentials: Mapping[str, str] | None, progress: Progress) -> None:
        """Pulls by name with a tag or digest. Raises `NotFoundError` if there is no such image to be had, and
        `InvalidError` if its registry fails."""
        auth = dict(credentials) if credentials else None
        if auth and "/" not in reference:
            reference = f"library/{reference}"  # the same image; the client wants a slash where it sends credentials
        lines = self._docker().images.pull(reference, auth=auth, stream=True)
        iterator = aiter(lines)
        while True:
            try:
                async with asyncio.timeout(_PULL_IDLE_SECONDS):
                    entry = await anext(iterator)
            except StopAsyncIteration:
                return
            except aiodocker.exceptions.DockerError as error:
                raise _pull_error(error, reference) from error
            except Exception as error:
                raise _translated(error, f"pull {reference}", _PULL_IDLE_SECONDS) from error
            progress(_progress_line(entry))

    async def read_file(self, image_id: str, name: str, labels: Mapping[str, str], paths: tuple[str, ...]) -> bytes:
        """The first of `paths` that an image holds, read through a container `name` that is never started.

        Raises `NotFoundError` if there is none of them.
        """
        host_config = {"NetworkMode": "none"}
        config: dict[str, Any] = {
            "Image": image_id, "Entrypoint": ["/"], "Labels": dict(labels), "HostConfig": host_config
        }  # fmt: skip
        container = await self._call(self._docker().containers.create(config, name=name), "create a container")
        try:
            for path in paths:
                try:
                    archive = await self._call(container.get_archive(path), "read an image's file")
                except NotFoundError:
                    continue
                content = _only_file(archive)
                if content is not None:
                    return content
            raise NotFoundError(f"the image has no {paths[0]}")
        finally:
            await self.remove(container.id)

    def _docker(self) -> aiodocker.Docker:
        if self._client is None:
            timeout = aiohttp.ClientTimeout(total=None, connect=self._timeout_seconds)
            self._client = aiodocker.Docker(url=self.endpoint, timeout=timeout)
        return self._client

    async def _call(self, call: Awaitable[_T], what: str) -> _T:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call
        except Exception as error:
            raise _translated(error, what, self._timeout_seconds) from error


def _translated(error: Exception, what: str, seconds: float) -> Exception:
    if isinstance(error, aiodocker.exceptions.DockerError):
        return _api_error(error, what)
    if isinstance(error, TimeoutError):
        return UnavailableError(f"Docker has not managed to {what} within {seconds:.0f} s")
    if isinstance(error, aiohttp.ClientError | OSError):
        return UnavailableError(f"Docker cannot be reached to {what}: {error}")
    return error


def _api_error(error: aiodocker.exceptions.DockerError, what: str) -> HiverError:
    text = f"Docker cannot {what}: {error.message}"
    if error.status == 404:
        return NotFoundError(text)
    if error.status == 409:
        return ConflictError(text)
    return UnavailableError(text) if error.status in {503, _NO_CONNECTION} else BackendError(text)


def _pull_error(error: aiodocker.exceptions.DockerError, reference: str) -> HiverError:
    """The Engine has 500 for most of what a registry answers."""
    reason = error.message
    if error.status in {503, _NO_CONNECTION}:
        return UnavailableError(f"Docker cannot pull {reference}: {reason}")
    if error.status in {401, 403, 404} or any(sign in reason.lower() for sign in _UNKNOWN_IMAGE):
        return NotFoundError(reason)
    return InvalidError(f"image {reference!r} cannot be pulled: {reason}", field="image")


def _progress_line(entry: Mapping[str, Any]) -> str:
    parts = (entry.get("id"), entry.get("status"), entry.get("progress"))
    return " ".join(str(part) for part in parts if part)


def _only_file(archive: tarfile.TarFile) -> bytes | None:
    for member in archive.getmembers():
        file = archive.extractfile(member) if member.isreg() else None
        if file is not None:
            return file.read(_MAX_FILE_BYTES)
    return None


async def _drained(lines: Any) -> None:
    await lines
