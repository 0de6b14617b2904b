from __future__ import annotations

import asyncio
import threading

import pytest

from hiverd.contracts.errors import UnavailableError
from hiverd.files import threads as module
from hiverd.files.threads import FileThreads, Guarded
from unit.files.rig import eventually


class Resource:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_guarded_closes_when_the_last_user_leaves() -> None:
    resource = Resource()
    guarded = Guarded(resource)
    inside, leave = threading.Event(), threading.Event()

    def use(_: Resource) -> None:
        inside.set()
        leave.wait(5)

    thread = threading.Thread(target=lambda: guarded.use(use))
    thread.start()
    assert inside.wait(5)
    guarded.close()
    guarded.close()
    assert resource.closed == 0
    leave.set()
    thread.join()
    assert resource.closed == 1
    with pytest.raises(UnavailableError):
        guarded.use(lambda _: None)


async def test_what_a_cancelled_caller_opened_is_closed() -> None:
    threads = FileThreads()
    resource, leave = Resource(), threading.Event()

    def open_slowly() -> Resource:
        leave.wait(5)
        return resource

    opening = asyncio.create_task(threads.open("s", open_slowly))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    leave.set()
    await eventually(lambda: resource.closed == 1)
    threads.close()


async def test_a_hung_sandbox_does_not_take_the_others_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.1)
    threads = FileThreads(threads=3, threads_per_sandbox=2)
    leave = threading.Event()
    hung = [asyncio.create_task(threads.run("hung", lambda: leave.wait(10))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError):
        await threads.run("hung", lambda: None)
    for task in hung:  # the callers leave, the threads stay busy
        task.cancel()
    await asyncio.wait(hung)
    with pytest.raises(UnavailableError):
        await threads.run("hung", lambda: None)
    assert await threads.run("fine", lambda: 42) == 42
    leave.set()
    await eventually(lambda: not threads._shares)
    assert await threads.run("hung", lambda: 43) == 43
    threads.close()


async def test_errors_come_through() -> None:
    threads = FileThreads()
    with pytest.raises(ZeroDivisionError):
        await threads.run("s", lambda: 1 // 0)
    await eventually(lambda: not threads._shares)
    threads.close()
