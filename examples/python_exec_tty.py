"""Talks to an interactive Python inside a sandbox, on a terminal.

pip install hiver-py
HIVER_GATEWAY_URL=http://localhost:10000 python examples/python_exec_tty.py
"""

import asyncio
import sys

import hiver

LINES = ["import platform", "platform.system()", "print('the answer is', 6 * 7)", "exit()"]


async def main() -> None:
    sandbox = await hiver.get_or_create_sandbox("example-tty")
    async with sandbox:
        process = await sandbox.exec_stream("python3", cwd="/workspace", tty=True)
        await process.write_stdin("\x1b[8;24;80t")  # 24 rows of 80 columns
        for line in LINES:
            await process.write_stdin(line + "\r")

        async for pipe in process.pipes:
            sys.stdout.write(pipe.get("stdout", ""))
        print("exit code:", await process.exit_code)

        await sandbox.shutdown()


asyncio.run(main())
