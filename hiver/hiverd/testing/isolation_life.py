# ruff: noqa: S101 -- a test suite
"""Conformance of a sandbox's life: entrypoint, end, adoption, removal."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import msgspec
import pytest

from hiverd.contracts.errors import InvalidError, NotFoundError, SandboxGoneError
from hiverd.contracts.isolation import Isolation, LogChunk, Workload, WorkloadExit

from .isolation_harness import Harness, eventually, has_gone, read_until, run, start


def shell(script: str) -> tuple[str, ...]:
    """An entrypoint."""
    return ("/bin/sh", "-c", script)


async def read_log(workload: Workload, position: str | None = None) -> list[LogChunk]:
    """The entrypoint's output until the sandbox ends."""
    async with asyncio.timeout(30):
        return [chunk async for chunk in workload.entrypoint_output(position)]


def joined(chunks: list[LogChunk], stream: str = "stdout") -> bytes:
    """The bytes of one stream."""
    return b"".join(chunk.data for chunk in chunks if chunk.stream == stream)


class LifeSuite:
    """Uses the fixtures `harness` and `isolation` (started)."""

    async def test_probe_is_satisfied(self, isolation: Isolation) -> None:
        findings = await isolation.probe()
        assert findings
        assert [finding for finding in findings if finding.required and not finding.ok] == []
        assert all(finding.remedy for finding in findings if not finding.ok)

    async def test_unknown_image_is_the_callers_error(self, isolation: Isolation) -> None:
        for name in ("dir:/no/such/folder", "No Such Image!", ""):
            with pytest.raises((NotFoundError, InvalidError)) as caught:
                await isolation.resolve_image(name, lambda _: None)
            assert 400 <= caught.value.status < 500

    async def test_nothing_runs_before_begin(self, harness: Harness, isolation: Isolation) -> None:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        async with harness.created(isolation, harness.spec(image, argv=shell("echo ran"))) as workload:
            assert workload.sandbox_id in await isolation.list_owned()
            reading = asyncio.create_task(read_log(workload), name="log")
            await asyncio.sleep(0.2)
            assert not reading.done()
            await workload.begin()
            assert joined(await reading) == b"ran\n"

    async def test_entrypoint_end_is_the_sandboxes(self, harness: Harness, isolation: Isolation) -> None:
        script = "echo out; echo err >&2; exit 5"
        async with harness.sandbox(isolation, argv=shell(script)) as workload:
            first, second = await asyncio.gather(workload.wait(), workload.wait())
            assert first == second == WorkloadExit(exit_code=5)
            chunks = await read_log(workload)
            assert (joined(chunks), joined(chunks, "stderr")) == (b"out\n", b"err\n")
            assert await has_gone(workload)

    @pytest.mark.parametrize(("program", "code"), [("no-such-program", 127), ("/etc/passwd", 126)])
    async def test_entrypoint_that_cannot_run(
        self, harness: Harness, isolation: Isolation, program: str, code: int
    ) -> None:
        async with harness.sandbox(isolation, argv=(program,)) as workload:
            assert (await asyncio.wait_for(workload.wait(), 30)).exit_code == code
            assert joined(await read_log(workload), "stderr") != b""

    async def test_entrypoint_environment(self, harness: Harness, isolation: Isolation) -> None:
        script = 'echo "$NAME $(pwd) $(cat /proc/sys/kernel/hostname)"; cat; echo x > /dev/stderr'
        changes: dict[str, Any] = {"argv": shell(script), "env": {"NAME": "value"}, "cwd": "/made/for/me"}
        async with harness.sandbox(isolation, **changes) as workload:
            chunks = await read_log(workload)
            assert (joined(chunks), joined(chunks, "stderr")) == (b"value /made/for/me box\n", b"x\n")

    async def test_log_resumes_behind_any_chunk(self, harness: Harness, isolation: Isolation) -> None:
        script = "for i in 1 2 3 4 5 6; do echo out $i; echo err $i >&2; sleep 0.02; done; printf 'no newline\\r'"
        async with harness.sandbox(isolation, argv=shell(script)) as workload:
            chunks = await read_log(workload)
            whole = [(chunk.stream, chunk.data) for chunk in chunks]
            assert joined(chunks).startswith(b"out 1\nout 2\n")
            assert b"no newline\r" in joined(chunks)
            for index, chunk in enumerate(chunks):
                rest = await read_log(workload, chunk.position)
                assert joined(rest) == b"".join(data for stream, data in whole[index + 1 :] if stream == "stdout")

    async def test_no_entrypoint_keeps_the_sandbox_alive(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation) as workload:
            assert workload.terminal() is None
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(workload.wait(), 0.3)
            assert (await run(workload, "echo alive")).stdout == b"alive\n"

    async def test_orphans_are_reaped(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation) as workload:
            await run(workload, "for i in 1 2 3 4 5; do (sleep 0.05 &) ; done")
            look = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z ' || true"
            await eventually(lambda: run(workload, look), lambda output: output.stdout.strip() == b"0")

    async def test_stop_asks_first(self, harness: Harness, isolation: Isolation) -> None:
        script = "trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
        async with harness.sandbox(isolation, argv=shell(script)) as workload:
            async for chunk in workload.entrypoint_output(None):
                if b"ready" in chunk.data:
                    break
            await workload.stop(20)
            assert (await workload.wait()).exit_code == 3
            assert joined(await read_log(workload)) == b"ready\nasked\n"
            await workload.stop(20)

    async def test_stop_insists_after_the_grace(self, harness: Harness, isolation: Isolation) -> None:
        script = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
        async with harness.sandbox(isolation, argv=shell(script)) as workload:
            background = await start(workload, "trap '' TERM HUP; echo up; sleep 7775")
            await read_until(background.output(), b"up")
            began_monotonic = time.monotonic()
            await workload.stop(0.5)
            assert 0.4 < time.monotonic() - began_monotonic < 10
            assert (await workload.wait()).exit_code == 128 + signal.SIGKILL
            assert await background.wait() == 128 + signal.SIGKILL
            await background.close()

    async def test_exec_in_an_ended_sandbox_says_gone(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation) as workload:
            await workload.stop(0)
            with pytest.raises(SandboxGoneError):
                await run(workload, "true")
            with pytest.raises(SandboxGoneError):
                workload.open_root()

    async def test_destroy_leaves_nothing_and_can_be_repeated(self, harness: Harness, isolation: Isolation) -> None:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        spec = harness.spec(image, argv=shell("sleep 1000 & sleep 1000"))
        workload = await isolation.create(spec)
        await workload.begin()
        await isolation.destroy(spec.sandbox_id, workload.state)
        assert spec.sandbox_id not in await isolation.list_owned()
        await isolation.destroy(spec.sandbox_id, workload.state)
        await isolation.destroy(spec.sandbox_id, None)
        await workload.close()

    async def test_destroy_of_an_unknown_id_is_fine(self, isolation: Isolation) -> None:
        await isolation.destroy("11111111-2222-3333-4444-555555555555", None)

    async def test_a_key_can_be_used_again(self, harness: Harness, isolation: Isolation) -> None:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        spec = harness.spec(image)
        for _ in range(2):
            workload = await isolation.create(spec)
            await workload.begin()
            assert (await run(workload, "echo again")).stdout == b"again\n"
            await isolation.destroy(spec.sandbox_id, workload.state)
            await workload.close()

    async def test_adopt_takes_over(self, harness: Harness) -> None:
        async with harness.started() as first:
            image = await first.resolve_image(harness.image, lambda _: None)
            script = "mkfifo /tmp/gate; echo one; read x < /tmp/gate; echo two; sleep 0.5; exit 9"
            spec = harness.spec(image, argv=shell(script))
            workload = await first.create(spec)
            await workload.begin()
            state = msgspec.json.decode(msgspec.json.encode(workload.state))
            await workload.close()
        async with harness.started() as second:
            assert spec.sandbox_id in await second.list_owned()
            adopted = await second.adopt(spec, state)
            try:
                log = adopted.entrypoint_output(None)
                position = (await anext(log)).position
                assert (await run(adopted, "echo hello > /tmp/gate; echo done")).stdout == b"done\n"
            finally:
                ended = await asyncio.wait_for(adopted.wait(), 30)
                rest = await read_log(adopted, position)
                await adopted.close()
            assert joined(rest).endswith(b"two\n")
            assert b"one" not in joined(rest)
            assert ended.exit_code == 9
            with pytest.raises(SandboxGoneError):
                await second.adopt(spec, state)
            await second.destroy(spec.sandbox_id, state)

    async def test_adopt_of_a_destroyed_sandbox_says_gone(self, harness: Harness, isolation: Isolation) -> None:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        spec = harness.spec(image)
        workload = await isolation.create(spec)
        state = workload.state
        await workload.close()
        await isolation.destroy(spec.sandbox_id, state)
        with pytest.raises(SandboxGoneError):
            await isolation.adopt(spec, state)
