"""Scripts in real worker processes: limits that hold, workers that end, and requests that do not wait for others'."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hiverd.egress import script_pool, script_process
from hiverd.egress.script import ScriptError
from hiverd.egress.script_frames import CPU_SECONDS, MAX_BODY_BYTES, Answer, Call, frame
from hiverd.egress.script_pool import MAX_OF_ONE_SANDBOX, ScriptPool
from hiverd.egress.script_process import SUBCOMMAND
from support.waiting import until, until_async

PR_SET_CHILD_SUBREAPER = 36
HANG = "while true do end"


def call(script: str, body: bytes = b"body") -> Call:
    return Call(script.encode(), body, [(b"X-A", b"1")], b"POST", b"h.test", b"/", b"")


@pytest.fixture
async def pool() -> AsyncIterator[ScriptPool]:
    pool = ScriptPool()
    yield pool
    pids = pool.pids
    await pool.close()
    assert pool.pids == frozenset()
    assert not [pid for pid in pids if status_of(pid)]


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status; empty if there is no such process, not even a zombie."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def lives(pid: int) -> bool:
    return status_of(pid).get("State", "Z")[0] not in "ZX"


async def run_of(pool: ScriptPool) -> tuple[int, int]:
    """The only worker and its fork, once there is one."""

    async def find() -> tuple[int, int] | None:
        for pid in pool.pids:
            for child in children_of(pid):
                return pid, child
        return None

    return await until_async(find, seconds=10, what="a worker with a fork")


async def idle_run_of(pool: ScriptPool) -> tuple[int, int]:
    """The only worker and the fork that waits for the next call, ready for it."""
    await pool.run(call(""))
    await until_async(lambda: _settled(pool), seconds=10, what="an idle worker")
    worker, fork = await run_of(pool)

    async def sealed() -> bool:
        return status_of(fork).get("Seccomp") == "2"

    await until_async(sealed, seconds=10, what="a fork that is ready")
    return worker, fork


async def _settled(pool: ScriptPool) -> bool:
    return pool.idle_count == 1


async def test_a_script_runs(pool: ScriptPool) -> None:
    answer = await pool.run(call('body = b64encode(body) headers["X-B"] = "2"'))
    assert answer.body == b"Ym9keQ=="
    assert sorted(answer.headers) == [(b"X-A", b"1"), (b"X-B", b"2")]


async def test_the_largest_body_goes_there_and_back(pool: ScriptPool) -> None:
    body = os.urandom(1 << 20) * (MAX_BODY_BYTES >> 20)
    assert (await pool.run(call("local x = #body", body))).body == body


async def test_no_run_finds_a_trace_of_another(pool: ScriptPool) -> None:
    await pool.run(call("leak = body string.leak = body math.leak = body _G.leak2 = body", b"s3cret"))
    answer = await pool.run(call("body = tostring(leak) .. tostring(string.leak) .. tostring(math.leak or leak2)"))
    assert answer.body == b"nilnilnil"


async def test_a_worker_is_used_again_and_each_run_is_a_process_of_its_own(pool: ScriptPool) -> None:
    worker, first = await idle_run_of(pool)
    again, second = await idle_run_of(pool)
    assert worker == again
    assert first != second


@pytest.mark.parametrize(
    "script",
    [
        HANG,
        "while true do pcall(function() while true do end end) end",
        'string.find(("a"):rep(1e5), ("a-"):rep(50) .. "b")',
        'while true do local s = ("x"):rep(1e6) end',
        "local t = {} for i = 1, 1e5 do t[i] = -i end while true do table.sort(t, function(a, b) return a < b end) end",
        "setmetatable(headers, {__index = function() while true do end end}) local x = headers.nothing",
    ],
)
async def test_processor_time_is_bounded_whatever_it_is_spent_in(pool: ScriptPool, script: str) -> None:
    await pool.run(call(""))
    pids = pool.pids
    began = time.monotonic()
    assert await pool.run(call(script)) == Answer(failure="time")
    assert time.monotonic() - began >= CPU_SECONDS * 0.9
    assert (await pool.run(call("body = 'next'"))).body == b"next"
    assert pool.pids == pids  # the worker itself is not lost over it


@pytest.mark.parametrize("script", ["local t = {} for i = 1, 1e9 do t[i] = {} end", "body = ('x'):rep(1e9)"])
async def test_memory_is_bounded(pool: ScriptPool, script: str) -> None:
    answer = await pool.run(call(script))
    assert answer.failure in {"memory", "time"}
    assert (await pool.run(call("body = 'next'"))).body == b"next"


async def test_deep_recursion_of_the_interpreter_ends_in_a_failure(pool: ScriptPool) -> None:
    assert (await pool.run(call("local s = ('('):rep(1e5) return s:find(s)"))).failure == "error"
    assert (await pool.run(call("return " + "(" * 100_000))).failure == "syntax"
    assert (await pool.run(call("local function f() return 1 + f() end f()"))).failure in {"error", "memory", "time"}


async def test_workers_have_no_privileges(pool: ScriptPool) -> None:
    worker, fork = await idle_run_of(pool)
    for pid in (worker, fork):
        status = status_of(pid)
        assert status["NoNewPrivs"] == "1"
        if os.geteuid() == 0:
            assert status["Uid"].split() == ["65534"] * 4
            assert status["Gid"].split() == ["65534"] * 4
            assert status["Groups"] == ""
            assert {status[f"Cap{kind}"].strip("0") for kind in ("Inh", "Prm", "Eff", "Amb")} == {""}
    assert os.getsid(worker) == worker


@pytest.mark.skipif(os.geteuid() != 0, reason="other users' descriptors and limits are shown to root only")
async def test_workers_have_no_descriptors_no_environment_and_limits(pool: ScriptPool) -> None:
    worker, fork = await idle_run_of(pool)
    assert sorted(os.listdir(f"/proc/{worker}/fd")) == ["0", "1", "2"]
    assert sorted(os.listdir(f"/proc/{fork}/fd")) == ["0", "2"]
    assert Path(f"/proc/{worker}/environ").read_bytes() == b""
    limits = Path(f"/proc/{fork}/limits").read_text()
    for name, value in (("Max address space", 256 << 20), ("Max processes", 0), ("Max file size", 0), ("Max core", 0)):
        line = next(line for line in limits.splitlines() if line.startswith(name))
        assert f" {value} " in line, line


def test_a_fork_can_do_nothing_but_read_write_and_compute() -> None:
    """As seen by code that has broken out of the interpreter."""
    code = """
    import os, socket, sys
    from hiverd.egress import script_jail
    script_jail.enter()
    script_jail.enter_run()
    refused = 0
    for attempt in (
        lambda: os.open("/etc/hostname", os.O_RDONLY), lambda: socket.socket(), lambda: os.fork(),
        lambda: os.kill(os.getppid(), 0), lambda: os.execv("/bin/true", ["true"]), lambda: os.stat("/"),
        lambda: os.pipe(), lambda: os.setsid(), lambda: os.dup(1),
    ):
        try:
            attempt()
        except OSError as error:
            refused += error.errno in (1, 11)
    os.write(1, b"%d" % refused)
    os._exit(0)
    """
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        timeout=30,
        check=False,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (answer.stdout, answer.stderr) == (b"9", b"")


async def test_nothing_of_a_call_is_on_a_command_line(pool: ScriptPool) -> None:
    task = asyncio.create_task(pool.run(call(HANG + " -- s3cret")))
    worker, fork = await run_of(pool)
    for pid in (worker, fork):
        assert b"s3cret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    await task


async def test_a_worker_killed_in_mid_run_fails_that_call_and_is_replaced(pool: ScriptPool) -> None:
    task = asyncio.create_task(pool.run(call(HANG)))
    worker, fork = await run_of(pool)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ScriptError, match="died"):
        await task
    assert (await pool.run(call("body = 'next'"))).body == b"next"
    await gone(worker, fork)


async def test_a_run_killed_in_mid_run_fails_that_call(pool: ScriptPool) -> None:
    task = asyncio.create_task(pool.run(call(HANG)))
    worker, fork = await run_of(pool)
    os.kill(fork, signal.SIGKILL)
    with pytest.raises(ScriptError, match="died"):
        await task
    assert (await pool.run(call("body = 'next'"))).body == b"next"
    await gone(worker, fork)


async def gone(*pids: int) -> None:
    """No process has such a number, not even a zombie of ours."""

    async def check() -> bool:
        return not any(status_of(pid) and int(status_of(pid)["PPid"]) == os.getpid() for pid in pids) and not any(
            lives(pid) for pid in pids
        )

    await until_async(check, seconds=10, what=f"{pids} are gone")


@pytest.fixture
def subreaper() -> Iterator[None]:
    """As the `oci` plug-in makes the server."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


async def test_orphaned_runs_do_not_become_zombies_of_a_subreaper(subreaper: None, pool: ScriptPool) -> None:
    task = asyncio.create_task(pool.run(call(HANG)))
    worker, fork = await run_of(pool)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ScriptError):
        await task
    await gone(worker, fork)


async def test_other_children_are_left_to_their_owners(subreaper: None, pool: ScriptPool) -> None:
    with subprocess.Popen(["/bin/sh", "-c", "exit 7"]) as other:
        await pool.run(call(""))
        await pool.close()
        assert other.wait(10) == 7


async def test_a_call_that_gets_no_processor_time_is_given_up(
    pool: ScriptPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, fork = await idle_run_of(pool)
    monkeypatch.setattr(script_pool, "RUN_SECONDS", 0.3)
    os.kill(fork, signal.SIGSTOP)
    with pytest.raises(ScriptError, match=r"no answer within 0\.3 s"):
        await pool.run(call(""))
    await gone(worker, fork)
    monkeypatch.setattr(script_pool, "RUN_SECONDS", 10)
    assert (await pool.run(call("body = 'next'"))).body == b"next"


async def test_a_cancelled_call_leaves_no_process(pool: ScriptPool) -> None:
    task = asyncio.create_task(pool.run(call(HANG)))
    worker, fork = await run_of(pool)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(worker, fork)
    assert (await pool.run(call("body = 'next'"))).body == b"next"


async def test_idle_workers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ScriptPool(idle_seconds=0.05)
    await pool.run(call(""))

    async def empty() -> bool:
        return not pool.pids

    await until_async(empty, seconds=10, what="no workers")
    assert (await pool.run(call("body = 'next'"))).body == b"next"
    await pool.close()


async def test_a_worker_that_died_idle_is_not_missed(pool: ScriptPool) -> None:
    for _ in range(3):
        worker, _ = await idle_run_of(pool)
        os.kill(worker, signal.SIGKILL)
        await gone(worker)
    assert (await pool.run(call("body = 'next'"))).body == b"next"


async def test_a_hanging_script_does_not_hold_up_the_others(pool: ScriptPool) -> None:
    share = pool.share()
    await asyncio.gather(*(share.run(call("")) for _ in range(8)))
    hanging = asyncio.create_task(share.run(call(HANG)))
    await run_of(pool)
    began = time.monotonic()
    answers = await asyncio.gather(*(share.run(call("body = 'done'")) for _ in range(50)))
    seconds = time.monotonic() - began
    assert [answer.body for answer in answers] == [b"done"] * 50
    assert (await hanging).failure == "time"
    assert seconds < 50 * CPU_SECONDS / 4


async def test_a_sandbox_takes_no_more_than_its_share(pool: ScriptPool) -> None:
    greedy, modest = pool.share(), pool.share()
    hanging = [asyncio.create_task(greedy.run(call(HANG))) for _ in range(3 * MAX_OF_ONE_SANDBOX)]
    await asyncio.sleep(0)
    assert (await modest.run(call("body = 'done'"))).body == b"done"
    assert not all(task.done() for task in hanging)
    assert len(pool.pids) <= MAX_OF_ONE_SANDBOX + 1
    assert [answer.failure for answer in await asyncio.gather(*hanging)] == ["time"] * len(hanging)


async def test_there_are_never_more_workers_than_allowed() -> None:
    pool = ScriptPool(max_workers=2)
    answers = await asyncio.gather(*(pool.run(call("body = body .. '!'")) for _ in range(20)))
    assert {answer.body for answer in answers} == {b"body!"}
    assert len(pool.pids) == 2
    await pool.close()


async def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_pool, "QUEUE_SECONDS", 0.05)
    pool = ScriptPool(max_workers=1)
    hanging = asyncio.create_task(pool.run(call(HANG)))
    await run_of(pool)
    with pytest.raises(ScriptError, match="no worker was free"):
        await pool.run(call(""))
    assert (await hanging).failure == "time"
    await pool.close()


async def test_a_caller_that_leaves_the_queue_takes_no_worker_along() -> None:
    pool = ScriptPool(max_workers=1)
    hanging = asyncio.create_task(pool.run(call(HANG)))
    await run_of(pool)
    for passes in range(3):
        waiting = asyncio.create_task(pool.run(call("")))
        for _ in range(passes):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert (await hanging).failure == "time"
    await until_async(lambda: _settled(pool), seconds=10, what="an idle worker")
    busy = asyncio.create_task(pool.run(call("")))
    leaving = asyncio.create_task(pool.run(call("")))
    await asyncio.sleep(0)
    while pool._queue:
        await asyncio.sleep(0)
    leaving.cancel()  # it has been given the worker, and does not know yet
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert (await busy).failure is None
    assert pool.idle_count == 1
    assert (await pool.run(call("body = 'next'"))).body == b"next"
    await pool.close()


async def test_a_closed_pool_fails_what_runs_and_what_comes(pool: ScriptPool) -> None:
    running = asyncio.create_task(pool.run(call(HANG)))
    worker, fork = await run_of(pool)
    await pool.close()
    with pytest.raises(ScriptError):
        await running
    with pytest.raises(ScriptError, match="the server stops"):
        await pool.run(call(""))
    await gone(worker, fork)


async def test_a_program_that_cannot_be_started_is_a_failure(pool: ScriptPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_process, "command", lambda: ["/nonexistent"])
    for _ in range(10):
        with pytest.raises(ScriptError, match="could not be started"):
            await pool.run(call(""))


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.write(0, bytes([255, 255, 255, 255])); os.read(0, 1 << 20); os.read(0, 1)",  # too much
        "import os; os.write(0, bytes([0, 0, 0, 1, 193])); os.read(0, 1 << 20); os.read(0, 1)",  # no msgpack
        "pass",
    ],
)
async def test_a_worker_that_does_not_keep_to_the_protocol_is_ended(
    pool: ScriptPool, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(script_process, "command", lambda: [sys.executable, "-c", program])
    with pytest.raises(ScriptError, match="died"):
        await pool.run(call(""))

    async def empty() -> bool:
        return not pool.pids

    await until_async(empty, seconds=10, what="no workers")


async def test_what_comes_unasked_is_not_taken_for_an_answer(pool: ScriptPool, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = frame(Answer(body=b"forged"))
    program = f"import os; os.read(0, 1 << 20); os.write(0, {forged!r} * 2); os.write(1, b'RR'); os.read(0, 1)"
    monkeypatch.setattr(script_process, "command", lambda: [sys.executable, "-c", program])
    assert (await pool.run(call(""))).body == b"forged"
    first = pool.pids
    await until_async(lambda: _settled(pool), seconds=10, what="an idle worker")
    monkeypatch.undo()
    assert (await pool.run(call("body = 'real'"))).body == b"real"
    assert not first & pool.pids or not any(lives(pid) for pid in first)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_server(sign: signal.Signals) -> None:
    code = """
    import asyncio
    from hiverd.egress.script_frames import Call
    from hiverd.egress.script_pool import ScriptPool

    async def main():
        pool = ScriptPool()
        await pool.run(Call(b"", b"", [], b"GET", b"h", b"/", b""))
        task = asyncio.create_task(pool.run(Call(b"while true do end", b"", [], b"GET", b"h", b"/", b"")))
        print(*pool.pids, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
    """
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env=environment, text=True
    ) as server:
        assert server.stdout is not None
        (worker,) = map(int, server.stdout.readline().split())
        family = [worker, *children_of(worker)]
        assert lives(worker)
        server.send_signal(sign)
        server.wait(10)
    until(lambda: not any(lives(pid) for pid in family), seconds=10, what="the workers end")


def test_every_way_of_starting_the_server_can_start_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert script_process.command()[0] == sys.executable
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert script_process.command() == [sys.executable, SUBCOMMAND]


@pytest.mark.parametrize("argv", [[sys.executable, "-m", "hiverd"], [str(Path(sys.executable).parent / "hiver")]])
async def test_the_hidden_subcommand_is_a_worker(
    pool: ScriptPool, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setattr(script_process, "command", lambda: [*argv, SUBCOMMAND])
    assert (await pool.run(call("body = 'from the command line'"))).body == b"from the command line"


def test_a_worker_imports_next_to_nothing() -> None:
    code = "import sys; import hiverd.egress.script_worker; print(*sys.modules)"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=30, check=True, env=environment
    ).stdout.split()
    assert not {"litestar", "click", "asyncio", "socket", "ssl", "uvloop", "logging", "hiverd.cli"} & set(loaded)
    assert {name for name in loaded if name.startswith("hiverd")} == {
        "hiverd",
        "hiverd.egress",
        *(f"hiverd.egress.script_{part}" for part in ("frames", "jail", "vm", "worker")),
    }
