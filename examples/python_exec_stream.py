"""Runs a Python function inside a sandbox and shows its output while it comes.

pip install hiver-py
HIVER_GATEWAY_URL=http://localhost:10000 python examples/python_exec_stream.py
"""

import asyncio
import inspect
import sys

import hiver


def primes(limit: int) -> None:
    """Runs inside the sandbox, so it can use nothing from this file."""
    import time  # noqa: PLC0415

    for number in range(2, limit):
        if all(number % divisor for divisor in range(2, number)):
            print(number, "is prime", flush=True)
            time.sleep(0.1)


async def main() -> None:
    sandbox = await hiver.get_or_create_sandbox("example-stream")
    async with sandbox:
        program = f"{inspect.getsource(primes)}\n\nprimes(30)\n"
        await sandbox.write_file("/workspace/primes.py", program)

        process = await sandbox.exec_stream(["python3", "/workspace/primes.py"], cwd="/workspace")
        async for pipe in process.pipes:
            sys.stdout.write(pipe.get("stdout", ""))
            sys.stderr.write(pipe.get("stderr", ""))
        print("exit code:", await process.exit_code)

        await sandbox.shutdown()


asyncio.run(main())
