"""The part `docker`: the plug-in of that name against the command `docker`, with one image, on an Engine of its own."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from bench.bare import run_quietly
from bench.caller import Caller
from bench.report import Row, p50
from support import leaks
from support.docker import IMAGE, Engine
from support.leaks import marks_of, wait_until_clean
from support.server import Backend, Server

CREATE_ROUNDS: Final = 20
EXEC_ROUNDS: Final = 60
PARALLEL: Final = 50


class BareDocker:
    """The command-line program, which is how people use an Engine."""

    def __init__(self, engine: Engine) -> None:
        program = shutil.which("docker")
        if program is None:
            raise RuntimeError("the command docker is not installed: build/setup.sh --tests")
        self._docker = [program, "--host", engine.host]

    def run(self) -> str:
        """`run -d`, with no network as a sandbox; the name of the container."""
        name = f"bench-{uuid.uuid4().hex[:12]}"
        options = ["--detach", "--network", "none", "--name", name]
        run_quietly([*self._docker, "run", *options, IMAGE, "/bin/sleep", "1000000"])
        return name

    def exec_true(self, container: str) -> None:
        run_quietly([*self._docker, "exec", container, "/bin/true"])

    def remove(self, *containers: str) -> None:
        run_quietly([*self._docker, "rm", "--force", *containers])


def measure(folder: Path) -> list[Row]:
    """Rows for create to first exec, exec, and creates at once."""
    engine = Engine(f"bench-{os.getpid()}")
    try:
        engine.start()
        leaks.engines.append(engine)
        config = f'[sandbox]\ndefault_image = "{IMAGE}"\n'
        server = Server(folder / "docker", config=config, backend=Backend("docker", engine.host))
        bare = BareDocker(engine)
        with server:
            rows = [_create_to_first_exec(server, bare), _exec_true(server, bare), _creates_at_once(server, bare)]
        wait_until_clean(marks_of(server.data_dir), seconds=60)
        return rows
    finally:
        leaks.engines.clear()
        engine.stop()


def _milliseconds_since(began_monotonic: float) -> float:
    return (time.monotonic() - began_monotonic) * 1000


def _create_to_first_exec(server: Server, bare: BareDocker) -> Row:
    ours: list[float] = []
    theirs: list[float] = []
    with Caller(server) as caller:
        for _ in range(CREATE_ROUNDS):
            began_monotonic = time.monotonic()
            container = bare.run()
            bare.exec_true(container)
            theirs.append(_milliseconds_since(began_monotonic))
            bare.remove(container)
            began_monotonic = time.monotonic()
            sandbox = caller.create()
            caller.exec(sandbox, ["true"])
            ours.append(_milliseconds_since(began_monotonic))
            caller.remove(sandbox)
    reached = p50(ours) <= 1.1 * p50(theirs)
    against = "docker run -d + docker exec"
    return Row("docker: create to first exec, p50", against, "ms", p50(ours), p50(theirs), "<= 1.1x", reached)


def _exec_true(server: Server, bare: BareDocker) -> Row:
    ours: list[float] = []
    theirs: list[float] = []
    container = bare.run()
    with Caller(server) as caller:
        sandbox = caller.create()
        for _ in range(EXEC_ROUNDS):
            began_monotonic = time.monotonic()
            bare.exec_true(container)
            theirs.append(_milliseconds_since(began_monotonic))
            began_monotonic = time.monotonic()
            caller.exec(sandbox, ["true"])
            ours.append(_milliseconds_since(began_monotonic))
        caller.remove(sandbox)
    bare.remove(container)
    mine, base = p50(ours), p50(theirs)
    return Row("docker: exec true, p50", "docker exec", "ms", mine, base, "<= 1.0x", mine <= base)


def _creates_at_once(server: Server, bare: BareDocker) -> Row:
    with ThreadPoolExecutor(PARALLEL) as pool:
        began_monotonic = time.monotonic()
        containers = list(pool.map(lambda _: bare.run(), range(PARALLEL)))
        theirs = time.monotonic() - began_monotonic
        bare.remove(*containers)
        began_monotonic = time.monotonic()
        made = list(pool.map(lambda _: _create(server), range(PARALLEL)))
        ours = time.monotonic() - began_monotonic
        list(pool.map(lambda sandbox: _remove(server, sandbox), made))
    against = f"{PARALLEL} x docker run -d at once"
    return Row(f"docker: {PARALLEL} creates at once", against, "s", ours, theirs, "<= 1.2x", ours <= 1.2 * theirs)


def _create(server: Server) -> str:
    with Caller(server) as caller:
        return caller.create()


def _remove(server: Server, sandbox: str) -> None:
    with Caller(server) as caller:
        caller.remove(sandbox)
