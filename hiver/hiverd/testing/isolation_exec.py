# ruff: noqa: S101 -- a test suite
"""Conformance of `Workload.exec`."""

from __future__ import annotations

import asyncio
import hashlib
import resource
import time

import pytest

from hiverd.contracts.errors import NotFoundError
from hiverd.contracts.isolation import Workload

from .isolation_harness import collect, eventually, read_until, run, start


class ExecSuite:
    """Uses the fixture `workload`: a running sandbox with the entrypoint `()` and the environment GREETING=hello."""

    async def test_streams_and_exit_code_are_kept_apart(self, workload: Workload) -> None:
        assert await run(workload, "printf out; printf err >&2; exit 7") == (7, b"out", b"err")

    async def test_argv_is_not_expanded(self, workload: Workload) -> None:
        assert (await run(workload, "echo", "$HOME", "*", "a b")).stdout == b"$HOME * a b\n"

    async def test_bytes_pass_unchanged(self, workload: Workload) -> None:
        script = r"printf '\000\377\r\n\303'"
        assert (await run(workload, script)).stdout == b"\x00\xff\r\n\xc3"

    async def test_death_by_signal_is_128_plus_n(self, workload: Workload) -> None:
        assert (await run(workload, "kill -9 $$")).code == 137
        assert (await run(workload, "kill -TERM $$")).code == 143

    @pytest.mark.parametrize("program", ["no-such-program", "/no/such/program", "./no-such-program"])
    async def test_missing_program_is_127(self, workload: Workload, program: str) -> None:
        code, stdout, stderr = await run(workload, program, "argument")
        assert (code, stdout) == (127, b"")
        assert program.encode() in stderr

    async def test_program_that_is_not_executable_is_126(self, workload: Workload) -> None:
        await run(workload, "echo data > /tmp/data; mkdir -p /tmp/folder")
        for program in ("/tmp/data", "/tmp/folder"):  # noqa: S108 -- inside the sandbox
            code, _, stderr = await run(workload, program, "argument")
            assert code == 126
            assert program.encode() in stderr

    @pytest.mark.parametrize("cwd", ["/no/such/folder", "/etc/passwd"])
    async def test_bad_working_directory_is_an_exit_code(self, workload: Workload, cwd: str) -> None:
        code, stdout, stderr = await run(workload, "true", cwd=cwd)
        assert code != 0
        assert stdout == b""
        assert cwd.encode() in stderr

    async def test_cwd_defaults_to_the_sandboxes_and_can_be_given(self, workload: Workload) -> None:
        assert (await run(workload, "pwd")).stdout == b"/\n"
        assert (await run(workload, "pwd", cwd="/usr")).stdout == b"/usr\n"

    async def test_env_is_merged_over_the_sandboxes(self, workload: Workload) -> None:
        script = 'echo "$GREETING $EXTRA $HOME"'
        assert (await run(workload, script, env={"EXTRA": "more"})).stdout == b"hello more /root\n"
        assert (await run(workload, script, env={"GREETING": "bye", "EXTRA": "$x"})).stdout == b"bye $x /root\n"

    async def test_runs_as_root_without_new_privileges(self, workload: Workload) -> None:
        script = "id -u; id -g; grep NoNewPrivs /proc/self/status; ulimit -n"
        # Several at once, as runtimes have set limits in a race.
        for output in await asyncio.gather(*(run(workload, script) for _ in range(16))):
            assert output.stdout.split() == [b"0", b"0", b"NoNewPrivs:", b"1", b"1024"]

    async def test_standard_input_is_empty_unless_asked_for(self, workload: Workload) -> None:
        assert await run(workload, "cat; echo end") == (0, b"end\n", b"")

    async def test_standard_input_arrives(self, workload: Workload) -> None:
        process = await start(workload, "head -n 2 | tr a-z A-Z", stdin=True)
        await process.write(b"one\n")
        await process.write(b"two\n")
        assert await collect(process) == {"stdout": b"ONE\nTWO\n", "stderr": b""}
        assert await process.wait() == 0
        await process.close()
        with pytest.raises(NotFoundError):
            await process.write(b"three\n")

    async def test_write_waits_for_a_reader(self, workload: Workload) -> None:
        process = await start(workload, "read go < /tmp/gate; wc -c", stdin=True)
        await run(workload, "rm -f /tmp/gate; mkfifo /tmp/gate")
        await process.close()
        process = await start(workload, "read go < /tmp/gate; head -c 8388608 | wc -c", stdin=True)
        writing = asyncio.create_task(process.write(b"x" * 8 * 1024 * 1024), name="write")
        await run(workload, "echo go > /tmp/gate")
        assert (await collect(process))["stdout"].strip() == b"8388608"
        await writing
        await process.close()

    async def test_standard_streams_can_be_opened_by_name(self, workload: Workload) -> None:
        script = "echo out > /dev/stdout; echo err > /dev/stderr"
        assert await run(workload, script) == (0, b"out\n", b"err\n")

    async def test_large_output_is_whole_and_memory_stays_flat(self, workload: Workload) -> None:
        size_bytes = 100 * 1024 * 1024
        peak_before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        process = await start(workload, f"head -c {size_bytes} /dev/zero")
        digest, total = hashlib.sha256(), 0
        async for stream, data in process.output():
            assert stream == "stdout"
            digest.update(data)
            total += len(data)
        assert total == size_bytes
        assert digest.digest() == hashlib.sha256(bytes(size_bytes)).digest()
        await process.close()
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before_kib
        assert grown_kib < 150 * 1024, "includes the 100 MiB that the test itself made to compare"

    async def test_slow_reader_makes_the_command_wait(self, workload: Workload) -> None:
        process = await start(workload, "head -c 33554432 /dev/zero; echo done > /tmp/wrote-all")
        output = process.output()
        await anext(output)
        # The command can be ahead by what fits into the pipe, not by 32 MiB; time does not change that.
        deadline_monotonic = time.monotonic() + 0.5
        while time.monotonic() < deadline_monotonic:
            assert (await run(workload, "test -e /tmp/wrote-all")).code == 1
        async for _ in output:
            pass
        assert await process.wait() == 0
        assert (await run(workload, "cat /tmp/wrote-all")).stdout == b"done\n"
        await process.close()

    async def test_output_lasts_as_long_as_anyone_holds_it(self, workload: Workload) -> None:
        process = await start(workload, "(sleep 0.4; echo late) & echo early")
        assert await process.wait() == 0
        assert (await collect(process))["stdout"] == b"early\nlate\n"
        await process.close()

    async def test_kill_takes_all_descendants(self, workload: Workload) -> None:
        tree = "setsid sh -c 'sleep 7771 & sleep 7771' & (sleep 7771 & sleep 7771) & echo up; sleep 7771"
        process = await start(workload, tree)
        other = await start(workload, "sleep", "7772")
        await read_until(process.output(), b"up")
        await process.kill()
        assert await process.wait() == 137
        assert await _count(workload, "7771") == 0
        assert await _count(workload, "7772") == 1
        await other.close()
        assert await _count(workload, "7772") == 0
        await process.close()

    async def test_kill_reaches_daemons_that_hold_the_output(self, workload: Workload) -> None:
        process = await start(workload, "(setsid sh -c 'sleep 7773 & sleep 7773' &) ; sleep 0.2; echo up")
        assert await process.wait() == 0
        await eventually(lambda: _count(workload, "7773"), lambda count: count >= 1)
        await process.kill()
        assert await _count(workload, "7773") == 0
        await process.close()

    async def test_kill_and_close_are_harmless_after_the_end(self, workload: Workload) -> None:
        process = await start(workload, "exit 3")
        assert await process.wait() == 3
        await process.kill()
        await process.close()
        await process.close()
        assert await process.wait() == 3

    async def test_close_ends_a_waiting_reader(self, workload: Workload) -> None:
        process = await start(workload, "sleep", "7774")
        reading = asyncio.create_task(collect(process), name="collect")
        await asyncio.sleep(0)
        await process.close()
        assert await asyncio.wait_for(reading, 10) == {"stdout": b"", "stderr": b""}
        assert await _count(workload, "7774") == 0

    async def test_many_at_once(self, workload: Workload) -> None:
        outputs = await asyncio.gather(*(run(workload, f"echo {number}; exit {number}") for number in range(24)))
        assert [(output.code, output.stdout) for output in outputs] == [(n, b"%d\n" % n) for n in range(24)]

    async def test_a_terminal_merges_streams_and_has_a_size(self, workload: Workload) -> None:
        process = await start(
            workload, "stty size; test -t 0 && test -t 2 && echo tty $TERM >&2; read x; stty size", tty=True
        )
        output = process.output()
        await read_until(output, b"tty xterm-256color\r\n")
        process.resize(33, 101)
        await process.write(b"\n")
        await read_until(output, b"33 101\r\n")
        assert await process.wait() == 0
        await process.close()

    async def test_every_resize_signals(self, workload: Workload) -> None:
        script = "trap 'echo changed' WINCH; echo ready; while :; do read x && break; done; echo over"
        process = await start(workload, script, tty=True, stdin=True)
        output = process.output()
        await read_until(output, b"ready")
        for _ in range(3):
            process.resize(20, 80)
            await read_until(output, b"changed")
        await process.close()

    async def test_ctrl_c_and_ctrl_d_work_on_a_terminal(self, workload: Workload) -> None:
        process = await start(workload, "trap 'echo caught' INT; echo ready; cat; echo end", tty=True, stdin=True)
        output = process.output()
        await read_until(output, b"ready")
        await process.write(b"here\n")
        await read_until(output, b"here\r\nhere")  # now cat runs: a signal before would reach the waiting shell alone
        await process.write(b"\x03")
        await read_until(output, b"caught")
        await process.close()
        process = await start(workload, "cat; echo end", tty=True, stdin=True)
        output = process.output()
        await process.write(b"line\n")
        await read_until(output, b"line\r\nline")
        await process.write(b"\x04")
        await read_until(output, b"end")
        assert await process.wait() == 0
        await process.close()

    async def test_exec_does_not_inherit_descriptors(self, workload: Workload) -> None:
        output = await run(workload, "ls /proc/self/fd | sort -n | tr '\\n' ' '")
        # 0 to 2, and the one with which `ls` reads the folder.
        assert output.stdout.split() == [b"0", b"1", b"2", b"3"]


async def _count(workload: Workload, marker: str) -> int:
    """How many processes `sleep <marker>` the sandbox has."""
    script = "n=0; for f in /proc/[0-9]*/cmdline; do"
    script += f" case \"$(tr '\\0' ' ' < $f 2>/dev/null)\" in 'sleep {marker} ') n=$((n+1));; esac; done; echo $n"
    return int((await run(workload, script)).stdout)
