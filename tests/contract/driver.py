"""Runs scenarios with the client release that is on this process's path. Speaks one JSON line per request.

`python -m contract.driver 0.1.45`, with `.clients/0.1.45` and `tests` on PYTHONPATH. Requests come on standard input,
answers go to standard output; whatever a client prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from typing import Any

from contract.scenarios import registry
from contract.scenarios.context import Context


def _render(error: BaseException) -> str:
    """A traceback with local variables, since assertions are not rewritten here."""
    exception = traceback.TracebackException.from_exception(error, capture_locals=True)
    link: traceback.TracebackException | None = exception
    while link is not None:
        # The frames of the scenario and of the client say what happened; the event loop's and httpx's do not.
        told = [frame for frame in link.stack if "/scenarios/" in frame.filename or "/hiver/" in frame.filename]
        link.stack = traceback.StackSummary.from_list(told)
        link = link.__cause__ or link.__context__
    return "".join(exception.format())[-6000:]


async def _run_one(version: str, request: dict[str, Any]) -> None:
    context = Context(version=version, gateway_url=request["gateway_url"], scenario=request["scenario"])
    scenario = registry.load()[request["scenario"]]
    try:
        async with asyncio.timeout(request["seconds"]):
            await scenario.run(context)
    finally:
        await context.clean_up()


def _answer(version: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        asyncio.run(_run_one(version, request))
    except Exception as error:  # noqa: BLE001 -- every failure is reported to the test
        return {"ok": False, "traceback": _render(error)}
    return {"ok": True}


def main() -> None:
    version = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(version, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
