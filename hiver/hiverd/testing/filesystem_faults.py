# ruff: noqa: S101 -- a test suite
"""Conformance while the service misbehaves. Runs where the harness has `faults`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from hiverd.contracts.filesystem import ABSENT, FileSystem, VersionConflictError

from .filesystem_harness import (
    DEADLINE_SECONDS,
    FailureKind,
    Faults,
    Harness,
    entries,
    get,
    put,
    refused,
    require_transient,
    shown,
    tree,
)

Call = Callable[[FileSystem], Coroutine[Any, Any, Any]]

LOOKS: dict[str, Call] = {
    "stat": lambda files: files.stat("/d/file"),
    "list": lambda files: entries(files, "/d"),
    "read": lambda files: get(files, "/d/file"),
}
CHANGES: dict[str, Call] = {
    "write": lambda files: put(files, "/d/new", b"new"),
    "make_directory": lambda files: files.make_directory("/made"),
    "symlink": lambda files: files.symlink("/link", "x"),
    "delete": lambda files: files.delete("/d/file"),
    "move": lambda files: files.move("/d/file", "/moved"),
}
REFUSALS: list[FailureKind] = ["429", "500", "503", "cut", "lost-answer"]


class FaultSuite:
    """Uses the fixtures `harness` and `files`."""

    @pytest.fixture
    async def faults(self, files: FileSystem, harness: Harness) -> Faults:
        if harness.faults is None:
            pytest.skip("the harness has no faults to give")
        await put(files, "/d/file", b"content")
        return harness.faults

    @pytest.mark.parametrize("kind", REFUSALS)
    @pytest.mark.parametrize("call", LOOKS)
    async def test_looks_are_repeated(self, files: FileSystem, faults: Faults, kind: FailureKind, call: str) -> None:
        expected = await LOOKS[call](files)
        faults.fail(kind, 2)
        assert await asyncio.wait_for(LOOKS[call](files), DEADLINE_SECONDS) == expected

    @pytest.mark.parametrize("kind", REFUSALS)
    @pytest.mark.parametrize("call", CHANGES)
    async def test_a_change_is_made_or_an_error_is_told(
        self, files: FileSystem, faults: Faults, kind: FailureKind, call: str
    ) -> None:
        """Never a wrong error, and what is repeated by the caller ends well."""
        faults.fail(kind, 1)
        try:
            await asyncio.wait_for(CHANGES[call](files), DEADLINE_SECONDS)
        except OSError as error:
            require_transient(error)
            faults.fail(kind, 0)
            if call == "move" and (await tree(files)).get("/moved"):
                return
            await CHANGES[call](files)
        found = await tree(files)
        assert found.get("/d/file") == (None if call in {"delete", "move"} else b"content")
        if call == "write":
            assert found["/d/new"] == b"new"

    async def test_a_lost_answer_is_no_conflict(self, files: FileSystem, faults: Faults) -> None:
        """The service has written, we do not know: asking again must not meet our own write."""
        version = (await files.stat("/d/file")).version
        for path, expected in (("/d/fresh", ABSENT), ("/d/file", version)):
            faults.fail("lost-answer", 1)
            try:
                await asyncio.wait_for(put(files, path, b"ours", expected), DEADLINE_SECONDS)
            except VersionConflictError as error:
                raise AssertionError("our own write was taken for another's") from error
            except OSError as error:
                require_transient(error)
            faults.fail("lost-answer", 0)
            assert await get(files, path) == b"ours"

    async def test_a_cut_read_is_never_short(self, files: FileSystem, faults: Faults) -> None:
        body = random.Random(3).randbytes(1 << 20)  # noqa: S311 -- not a secret
        await put(files, "/big", body)
        for count in (1, 100):
            faults.fail("short-body", count)
            try:
                assert await asyncio.wait_for(get(files, "/big"), DEADLINE_SECONDS) == body
            except OSError as error:
                require_transient(error)
            faults.fail("short-body", 0)
        assert await get(files, "/big") == body

    async def test_a_cut_listing_is_never_short(self, files: FileSystem, faults: Faults) -> None:
        for name in ("a", "b", "c"):
            await put(files, f"/d/{name}")
        faults.fail("short-body", 1)
        assert len(await asyncio.wait_for(entries(files, "/d"), DEADLINE_SECONDS)) == 4

    @pytest.mark.parametrize("kind", ["429", "503", "cut"])
    @pytest.mark.parametrize("call", [*LOOKS, *CHANGES])
    async def test_endless_trouble_ends_in_an_error(
        self,
        files: FileSystem,
        faults: Faults,
        harness: Harness,
        caplog: pytest.LogCaptureFixture,
        kind: FailureKind,
        call: str,
    ) -> None:
        """One that tells that a later attempt may succeed, after some seconds."""
        caplog.set_level("DEBUG", "hiver")
        faults.fail(kind, 1_000_000)
        with refused() as caught:
            await asyncio.wait_for((LOOKS | CHANGES)[call](files), DEADLINE_SECONDS)
        faults.fail(kind, 0)
        require_transient(caught[0])
        harness.require_no_secret(shown(caught[0]) + caplog.text)
        assert await get(files, "/d/file") == b"content"

    @pytest.mark.parametrize("call", [*LOOKS, *CHANGES])
    async def test_a_refused_credential_is_a_permission_error(
        self, files: FileSystem, faults: Faults, harness: Harness, caplog: pytest.LogCaptureFixture, call: str
    ) -> None:
        faults.revoke()
        with pytest.raises(PermissionError) as caught:
            await asyncio.wait_for((LOOKS | CHANGES)[call](files), DEADLINE_SECONDS)
        harness.require_no_secret(shown(caught.value) + caplog.text)

    @pytest.mark.parametrize("call", [*LOOKS, *CHANGES])
    async def test_a_fresh_token_is_fetched(self, files: FileSystem, faults: Faults, call: str) -> None:
        if not faults.expire_token():
            pytest.skip("there are no tokens that expire")
        await asyncio.wait_for((LOOKS | CHANGES)[call](files), DEADLINE_SECONDS)
