"""What the client's own documentation shows: its quick start word for word, and its two examples."""

from __future__ import annotations

import asyncio
import io
import re
import textwrap
from contextlib import redirect_stdout
from importlib import metadata
from typing import Any

from contract.scenarios.context import Context, collect_output, eventually, read_until
from contract.scenarios.registry import scenario

QUICK_START_KEY = "my-sandbox"


def quick_start() -> str:
    """The Python block of the README's section "Quick start", as shipped with the release."""
    readme = metadata.metadata("hiver-py").json["description"]
    found = re.search(r"Quick start\s+```python\n(.*?)```", str(readme), re.DOTALL)
    assert found, "the release has no quick start"
    return found.group(1)


@scenario(since=(0, 1, 20), seconds=90)
async def the_quick_start_word_for_word(context: Context) -> None:
    """Its loop over events ends when the sandbox does, and its last line calls a function that left the client with
    0.1.20; so the test removes the sandbox when it has seen enough, and lends the name."""
    context.track(QUICK_START_KEY)
    source = quick_start().replace("asyncio.run(main())", "")
    namespace: dict[str, Any] = {}
    exec(compile(source, "README", "exec"), namespace)  # noqa: S102 -- the client's documentation
    printed = io.StringIO()
    reached_shutdown = asyncio.Event()

    async def shutdown(sandbox: Any) -> None:
        assert sandbox.key == QUICK_START_KEY
        reached_shutdown.set()

    async def remove_when_told() -> None:
        async def told() -> bool:
            return "hello from the sandbox" in printed.getvalue() and "event" in printed.getvalue()

        await eventually(told, seconds=30, what="the quick start printed an event")
        async with context.http() as http:
            assert (await http.post(f"/controller/v1/shutdown/{QUICK_START_KEY}")).status_code == 204

    namespace["hiver"] = _Lending(context, shutdown)
    with redirect_stdout(printed):
        await asyncio.gather(namespace["main"](), remove_when_told())
    assert reached_shutdown.is_set()
    assert "hello from the sandbox\n 0\n" in printed.getvalue()
    assert "sandbox id: " in printed.getvalue()


class _Lending:
    """The client's module, with this server's address and the function that its README still names."""

    def __init__(self, context: Context, shutdown: Any) -> None:
        self._context = context
        self.shutdown = shutdown

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context.hiver, name)

    async def get_or_create_sandbox(self, key: str, config: Any) -> Any:
        return await self._context.hiver.get_or_create_sandbox(key, config, gateway_url=self._context.gateway_url)


FUNCTION = textwrap.dedent(
    """
    import sys, time

    def count(limit):
        for number in range(limit):
            print("step", number, flush=True)
            time.sleep(0.05)
        print("finished", file=sys.stderr, flush=True)
        return limit

    sys.exit(count(5))
    """
)


@scenario()
async def a_function_with_streamed_output(context: Context) -> None:
    sandbox = await context.create()
    await context.write(sandbox, "/workspace/count.py", FUNCTION)
    process = await sandbox.exec_stream("python3 /workspace/count.py", cwd="/workspace")
    assert await read_until(process, "step 0\n") == "step 0\n"
    assert not process.exit_code.done(), "output must come before the end"
    stdout, stderr, code = await collect_output(process)
    assert stdout == "".join(f"step {number}\n" for number in range(1, 5))
    assert stderr == "finished\n"
    assert code == 5


@scenario()
async def an_interactive_python_on_a_terminal(context: Context) -> None:
    sandbox = await context.create()
    process = await sandbox.exec_stream("python3", cwd="/workspace", tty=True)
    await process.write_stdin("print('the answer is', 6 * 7)\r")
    await process.write_stdin("exit()\r")
    stdout, stderr, code = await collect_output(process)
    assert ">>> " in stdout
    assert "the answer is 42\r\n" in stdout
    assert stderr == ""
    assert code == 0
