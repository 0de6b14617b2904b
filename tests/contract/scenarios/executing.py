"""Commands, buffered and streamed (PROTOCOL 3.11, 3.12, 0.7, 0.8)."""

from __future__ import annotations

import asyncio
import time

import httpx

from contract.scenarios.context import Context, collect_output, eventually, read_until
from contract.scenarios.registry import scenario

SINCE_LISTS = (0, 1, 20)


@scenario()
async def exec_of_a_string_uses_a_shell(context: Context) -> None:
    sandbox = await context.create()
    result = await sandbox.exec("echo out; echo err >&2; exit 3")
    assert result == {"stdout": "out\n", "stderr": "err\n", "exit_code": 3}


@scenario(since=SINCE_LISTS)
async def exec_of_a_list_is_a_true_argv(context: Context) -> None:
    sandbox = await context.create()
    result = await sandbox.exec(["printf", "%s|", "$HOME", "a b", "'", ""])
    assert result == {"stdout": "$HOME|a b|'||", "stderr": "", "exit_code": 0}


@scenario()
async def exec_takes_cwd_and_env(context: Context) -> None:
    sandbox = await context.create(env={"KEPT": "config", "REPLACED": "config"})
    result = await sandbox.exec(
        'pwd; echo "$KEPT $REPLACED $ADDED"', cwd="/usr", env={"REPLACED": "call", "ADDED": "new"}
    )
    assert result["stdout"] == "/usr\nconfig call new\n"
    missing = await sandbox.exec("true", cwd="/no/such/folder")
    assert missing["exit_code"] != 0
    assert missing["stderr"]


@scenario()
async def exit_codes_are_the_shells(context: Context) -> None:
    sandbox = await context.create()
    assert (await sandbox.exec("kill -9 $$"))["exit_code"] == 128 + 9
    missing = await sandbox.exec("no-such-program-at-all")
    assert missing["exit_code"] == 127
    assert "no-such-program-at-all" in missing["stderr"]
    assert (await sandbox.exec("/etc/passwd"))["exit_code"] == 126
    if context.version >= SINCE_LISTS:
        assert (await sandbox.exec(["no-such-program-at-all"]))["exit_code"] == 127
        assert (await sandbox.exec(["/etc/passwd"]))["exit_code"] == 126


@scenario()
async def exec_output_is_byte_faithful(context: Context) -> None:
    sandbox = await context.create()
    assert (await sandbox.exec("printf x"))["stdout"] == "x"
    assert (await sandbox.exec(r"printf 'a\r\nb'"))["stdout"] == "a\r\nb"
    assert (await sandbox.exec(r"printf '\377ok'"))["stdout"] == "�ok"
    assert (await sandbox.exec("printf 'grüße 😀'"))["stdout"] == "grüße 😀"
    long_line = await sandbox.exec("head -c 300000 /dev/zero | tr '\\0' x")
    assert long_line["stdout"] == "x" * 300_000


@scenario()
async def exec_reads_nothing(context: Context) -> None:
    sandbox = await context.create()
    assert (await sandbox.exec("cat; echo end"))["stdout"] == "end\n"


@scenario(waits=True, seconds=30)
async def exec_may_take_longer_than_the_clients_patience(context: Context) -> None:
    """Every client gives up after 3 s without a byte (PROTOCOL 0.7)."""
    sandbox = await context.create()
    assert await sandbox.exec("sleep 5; echo done") == {"stdout": "done\n", "stderr": "", "exit_code": 0}


@scenario(waits=True, seconds=120, slow=True)
async def exec_may_take_a_minute(context: Context) -> None:
    sandbox = await context.create()
    assert (await sandbox.exec("sleep 60; echo done"))["stdout"] == "done\n"


@scenario()
async def execs_run_side_by_side(context: Context) -> None:
    sandbox = await context.create()
    began_monotonic = time.monotonic()
    results = await asyncio.gather(*(sandbox.exec(f"sleep 1; echo {number}") for number in range(5)))
    assert [result["stdout"] for result in results] == [f"{number}\n" for number in range(5)]
    assert time.monotonic() - began_monotonic < 4.5


@scenario()
async def a_caller_who_leaves_ends_the_command(context: Context) -> None:
    sandbox = await context.create()
    marker = "31.4159"
    call = asyncio.create_task(sandbox.exec(f"sleep {marker} & sleep {marker}; wait"))
    await eventually(lambda: _running(context, sandbox, marker), seconds=10, what="the command runs")
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)

    async def ended() -> bool:
        return not await _running(context, sandbox, marker)

    await eventually(ended, seconds=15, what="the whole process tree is killed")


async def _running(context: Context, sandbox: object, marker: str) -> bool:
    """Whether a `sleep` with this argument runs inside the sandbox, asked over a connection of its own."""
    script = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"
    async with context.http() as http:
        response = await http.post(context.api(sandbox, "/exec"), json={"command": script})
    return f"sleep {marker}" in response.json()["stdout"]


@scenario()
async def stream_keeps_stdout_and_stderr_apart(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream("echo out; echo err >&2; exit 7")
    assert await collect_output(process) == ("out\n", "err\n", 7)


@scenario()
async def stream_gives_output_as_it_comes(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream("echo first; read line; echo got $line")
    assert await read_until(process, "first\n") == "first\n"
    assert not process.exit_code.done()
    await process.write_stdin("something\n")
    assert await collect_output(process) == ("got something\n", "", 0)


@scenario()
async def stream_stdin_arrives_in_order(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream("head -n 100")
    for number in range(100):
        await process.write_stdin(f"{number} grüße\n")
    stdout, _, code = await collect_output(process)
    assert stdout == "".join(f"{number} grüße\n" for number in range(100))
    assert code == 0


@scenario(since=SINCE_LISTS)
async def stream_of_a_list_is_a_true_argv(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream(["printf", "%s", "$HOME; ls"])
    assert await collect_output(process) == ("$HOME; ls", "", 0)


@scenario()
async def stream_survives_characters_cut_anywhere(context: Context) -> None:
    """Clients decode every network chunk on its own, so only ASCII may be on the wire (PROTOCOL 2)."""
    sandbox = await context.create()
    process = await sandbox.exec_stream("yes 'aé€😀' | head -n 30000", env={"LC_ALL": "C.UTF-8"})
    stdout, _, code = await collect_output(process)
    assert stdout == "aé€😀\n" * 30_000
    assert code == 0


@scenario()
async def stream_passes_megabytes(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream("yes 0123456789abcdef0123456789abcde | head -c 16777216")
    stdout, _, code = await collect_output(process)
    assert len(stdout) == 16_777_216
    assert code == 0


@scenario()
async def stream_tells_signals_and_missing_programs(context: Context) -> None:
    sandbox = await context.create()
    assert (await collect_output(await sandbox.exec_stream("kill -15 $$")))[2] == 128 + 15
    _, stderr, code = await collect_output(await sandbox.exec_stream("no-such-program-at-all"))
    assert code == 127
    assert "no-such-program-at-all" in stderr


@scenario()
async def stdin_of_a_finished_command_is_an_error(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream("true")
    await collect_output(process)

    async def refused() -> bool:
        try:
            await process.write_stdin("x")
        except context.hiver.SandboxError as error:
            return bool(error.status == 404)
        return False

    await eventually(refused, seconds=5, what="stdin answers 404")


@scenario()
async def exit_comes_when_the_sandbox_is_removed(context: Context) -> None:
    """Clients wait for the exit frame for ever (PROTOCOL 3.12)."""
    sandbox = await context.create()
    process = await sandbox.exec_stream("echo up; exec sleep 1000")
    await read_until(process, "up\n")
    async with context.http() as http:
        response = await http.post(f"/controller/v1/shutdown/{sandbox.key}")
    assert response.status_code == 204
    try:
        code = await asyncio.wait_for(process.exit_code, 20)
    except httpx.HTTPError as error:
        raise AssertionError(f"the stream broke instead of ending with an exit frame: {error!r}") from None
    assert code != 0
