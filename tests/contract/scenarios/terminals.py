"""Commands on a terminal, and the entrypoint's own terminal (PROTOCOL 3.12)."""

from __future__ import annotations

import asyncio
from typing import Any

from contract.scenarios.context import Context, collect_output, read_until
from contract.scenarios.registry import scenario


def resize(rows: int, cols: int) -> str:
    """The control sequence by which clients change a terminal's size."""
    return f"\x1b[8;{rows};{cols}t"


@scenario()
async def a_command_gets_a_terminal(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream(
        "test -t 0 && test -t 1 && test -t 2 && echo all three; echo e >&2; exit 4", tty=True
    )
    stdout, stderr, code = await collect_output(process)
    assert stdout == "all three\r\ne\r\n"
    assert stderr == ""
    assert code == 4


@scenario()
async def a_terminal_can_be_resized(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream("sh", tty=True)
    await process.write_stdin(resize(40, 100))
    await process.write_stdin("stty size; echo e''nd\r")
    text = await read_until(process, "end\r\n")
    assert "40 100\r\n" in text
    assert "\x1b[8;" not in text, "the sequence reached the program"
    await process.write_stdin(resize(25, 81))
    await process.write_stdin("stty size; exit\r")
    stdout, _, code = await collect_output(process)
    assert "25 81\r\n" in stdout
    assert code == 0


@scenario()
async def end_of_file_and_interrupt_are_keys(context: Context) -> None:
    sandbox = await context.create()
    reader = await sandbox.exec_stream("cat; echo over", tty=True)
    await reader.write_stdin("line\r")
    await read_until(reader, "line\r\nline\r\n")
    await reader.write_stdin("\x04")
    assert "over\r\n" in (await collect_output(reader))[0]
    sleeper = await sandbox.exec_stream("echo up; exec sleep 1000", tty=True)
    await read_until(sleeper, "up\r\n")
    await sleeper.write_stdin("\x03")
    assert (await collect_output(sleeper))[2] == 128 + 2


@scenario()
async def terminal_text_is_not_cut_inside_characters(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream("yes 'aé€😀' | head -n 5000", tty=True)
    stdout, _, code = await collect_output(process)
    assert stdout == "aé€😀\r\n" * 5000
    assert code == 0


async def _attach(sandbox: Any) -> Any:
    return await sandbox.exec_stream("", tty=True)


@scenario()
async def viewers_attach_to_the_entrypoint(context: Context) -> None:
    sandbox = await context.create(tty=True, entrypoint="/bin/sh", env={"PS1": "prompt> "})
    first = await _attach(sandbox)
    await first.write_stdin("echo $((40 + 2))-answer\r")
    await read_until(first, "42-answer\r\n")
    second = await _attach(sandbox)
    await read_until(second, "42-answer\r\n")
    await second.write_stdin("echo $((50 + 5))-both\r")
    await asyncio.gather(read_until(first, "55-both\r\n"), read_until(second, "55-both\r\n"))
    await first.write_stdin(resize(33, 99))
    await first.write_stdin("stty size\r")
    await read_until(first, "33 99\r\n")


@scenario()
async def attached_viewers_see_the_end(context: Context) -> None:
    sandbox = await context.create(tty=True, entrypoint="/bin/sh")
    viewer = await _attach(sandbox)
    await viewer.write_stdin("exit 5\r")
    _, _, code = await asyncio.wait_for(collect_output(viewer), 20)
    assert code == 0
    assert await context.listed(sandbox.key) is not None, "a sandbox with a terminal outlives its entrypoint"
    assert (await sandbox.exec("echo alive"))["stdout"] == "alive\n"


@scenario()
async def attaching_without_a_terminal_is_refused(context: Context) -> None:
    sandbox = await context.create()
    error = await context.error_of(sandbox.exec_stream(""))
    assert error.status == 400
    assert "tty" in str(error).lower()


@scenario(since=(0, 1, 20))
async def attaching_without_an_entrypoint_terminal_gives_a_shell(context: Context) -> None:
    sandbox = await context.create()
    process = await _attach(sandbox)
    await process.write_stdin("echo $((6 * 7))-shell\r")
    await read_until(process, "42-shell\r\n")
    await process.write_stdin("exit 3\r")
    assert (await collect_output(process))[2] == 3
