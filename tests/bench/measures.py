"""One function per line of the table. Each measures ours and its baseline in turn, in the same run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from bench import bare
from bench.caller import Caller, resident_mib
from bench.report import Row, p50, p95
from support.server import REPOSITORY, Server
from support.waiting import until

CREATE_ROUNDS: Final = 30
EXEC_ROUNDS: Final = 150
PARALLEL: Final = 100
IDLE_SANDBOXES: Final = 50
START_ROUNDS: Final = 5
TRANSFER_ROUNDS: Final = 3
TRANSFER_BYTES: Final = 1 << 30
STREAM_BYTES: Final = 512 << 20
PROXY_PORT: Final = 8080
WRK_SECONDS: Final = 5
MB: Final = 1_000_000


def _seconds(work: Callable[[], object]) -> float:
    began_monotonic = time.monotonic()
    work()
    return time.monotonic() - began_monotonic


def _milliseconds(work: Callable[[], object]) -> float:
    return _seconds(work) * 1000


def create_to_first_exec(server: Server, runtime: bare.BareRuntime) -> list[Row]:
    ours: list[float] = []
    theirs: list[float] = []
    with Caller(server) as caller:
        for _ in range(CREATE_ROUNDS):
            bundle = runtime.prepare()
            container = f"bench-{bundle.name}"
            theirs.append(_milliseconds(lambda at=bundle, name=container: _bare_run(runtime, at, name)))  # type: ignore[misc]
            runtime.remove(container)
            made: list[str] = []
            ours.append(_milliseconds(lambda into=made: _run(caller, into)))  # type: ignore[misc]
            caller.remove(made[0])
    spread = p95(ours) / p50(ours)
    against = f"{runtime.name} run + {runtime.name} exec"
    return [
        Row(
            "create to first exec, p50", against, "ms", p50(ours), p50(theirs), "<= 2.0x", p50(ours) <= 2 * p50(theirs)
        ),
        Row("create to first exec, p95", "its own p50", "ms", p95(ours), p50(ours), "<= 2.0x", spread <= 2),
    ]


def _bare_run(runtime: bare.BareRuntime, bundle: Path, container: str) -> None:
    runtime.start(bundle)
    runtime.exec_true(container)


def _run(caller: Caller, made: list[str]) -> None:
    made.append(caller.create())
    caller.exec(made[0], ["true"])


def exec_true(server: Server, runtime: bare.BareRuntime) -> list[Row]:
    ours: list[float] = []
    theirs: list[float] = []
    container = runtime.start()
    with Caller(server) as caller:
        sandbox = caller.create()
        for _ in range(EXEC_ROUNDS):
            theirs.append(_milliseconds(lambda: runtime.exec_true(container)))
            ours.append(_milliseconds(lambda: caller.exec(sandbox, ["true"])))
        caller.remove(sandbox)
    runtime.remove(container)
    reached = p50(ours) <= 1.5 * p50(theirs)
    return [Row("exec true, p50", f"{runtime.name} exec", "ms", p50(ours), p50(theirs), "<= 1.5x", reached)]


def creates_at_once(server: Server, runtime: bare.BareRuntime) -> list[Row]:
    bundles = [runtime.prepare() for _ in range(PARALLEL)]
    with ThreadPoolExecutor(PARALLEL) as pool:
        began_monotonic = time.monotonic()
        containers = list(pool.map(runtime.start, bundles))
        theirs = time.monotonic() - began_monotonic
        list(pool.map(runtime.remove, containers))
        began_monotonic = time.monotonic()
        outcomes = list(pool.map(lambda _: _try_create(server), range(PARALLEL)))
        ours = time.monotonic() - began_monotonic
        made = [outcome for outcome in outcomes if outcome.startswith("/")]
        list(pool.map(lambda sandbox: _remove(server, sandbox), made))
    failed = [outcome for outcome in outcomes if not outcome.startswith("/")]
    note = f"{len(failed)} failed, first: {failed[0]}" if failed else "none failed"
    reached = not failed and ours <= 1.5 * theirs
    against = f"{PARALLEL} x {runtime.name} run at once"
    return [Row(f"{PARALLEL} creates at once", against, "s", ours, theirs, "<= 1.5x", reached, note)]


def _try_create(server: Server) -> str:
    """The sandbox's API path, or what went wrong."""
    try:
        with Caller(server) as caller:
            return caller.create()
    except (RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def _remove(server: Server, sandbox: str) -> None:
    with Caller(server) as caller:
        caller.remove(sandbox)


def proxied_requests(server: Server) -> list[Row]:
    source = (REPOSITORY / "tests" / "bench" / "inner_server.py").read_text()
    with Caller(server) as caller:
        sandbox = caller.create()
        script = f"cat > /tmp/bench_inner.py <<'END'\n{source}\nEND\n"
        caller.exec(sandbox, script)
        caller.exec(sandbox, f"setsid python3 /tmp/bench_inner.py {PROXY_PORT} >/dev/null 2>&1 </dev/null &")
        pid = until(lambda: pid_of("/tmp/bench_inner.py"), seconds=20, what="the inner server runs")
        url = f"http://127.0.0.1:{server.port}{sandbox}/proxy/{PROXY_PORT}/"
        until(lambda: caller.call("GET", f"{sandbox}/ports")[1] == [PROXY_PORT], seconds=20, what="it listens")
        inside = ["nsenter", "--target", str(pid), "--net"]
        direct_url = f"http://127.0.0.1:{PROXY_PORT}/"
        direct, proxied = _wrk(direct_url, 16, inside), _wrk(url, 16)
        direct_one, proxied_one = _wrk(direct_url, 1, inside), _wrk(url, 1)
        caller.remove(sandbox)
    wanted = min(4000.0, direct[0] / 3)
    added = proxied_one[1] - direct_one[1]
    return [
        Row(
            "proxied requests, 16 connections",
            "straight to the server",
            "requests/s",
            proxied[0],
            direct[0],
            f">= {wanted:,.0f}",
            proxied[0] >= wanted,
        ),
        Row(
            "proxied request, added p50",
            "straight to the server",
            "ms",
            added,
            direct_one[1],
            "< 1 ms added",
            added < 1,
        ),
    ]


def pid_of(argument: str) -> int | None:
    """The host's process id of a process inside a sandbox, by one of its first two arguments."""
    for entry in Path("/proc").iterdir():
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if argument.encode() in argv[:2]:
            return int(entry.name)
    return None


def _wrk(url: str, connections: int, prefix: list[str] | None = None) -> tuple[float, float]:
    """(requests per second, p50 in ms)."""
    argv = [*(prefix or []), "wrk", "-t1", f"-c{connections}", f"-d{WRK_SECONDS}s", "--latency", url]
    return wrk_figures(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def wrk_figures(text: str) -> tuple[float, float]:
    """(requests per second, p50 in ms) of what wrk has printed."""
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"wrk met errors:\n{text}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    half = re.search(r"50%\s+([\d.]+)(us|ms|s)", text)
    assert rate is not None
    assert half is not None
    return float(rate[1]), float(half[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[half[2]]


def transfers(server: Server, folder: Path) -> list[Row]:
    """Each transfer begins with nothing unwritten, no target and enough memory at hand, for all alike: none waits for
    another's disk, or for the host of a virtual machine to give it memory. The first round does not count.
    """
    source, copied, received = folder / "source", folder / "copied", folder / "received"
    block = os.urandom(1 << 24)
    with source.open("wb") as file:
        for _ in range(TRANSFER_BYTES // len(block)):
            file.write(block)
    cp_seconds, up_seconds, down_seconds = [], [], []
    with Caller(server) as caller:
        sandbox = caller.create()
        for _ in range(TRANSFER_ROUNDS + 1):
            _settle()
            cp_seconds.append(bare.copy_file(source, copied))
            copied.unlink()
            _settle()
            up_seconds.append(_seconds(lambda: caller.upload(sandbox, "/workspace/big", source)))
            _settle()
            down_seconds.append(_seconds(lambda: caller.download(sandbox, "/workspace/big", received)))
            assert received.stat().st_size == TRANSFER_BYTES
            received.unlink()
            caller.exec(sandbox, "rm /workspace/big")
        caller.remove(sandbox)
    source.unlink()
    megabytes = TRANSFER_BYTES / MB
    cp, up, down = (megabytes / p50(seconds[1:]) for seconds in (cp_seconds, up_seconds, down_seconds))
    return [
        Row("upload, 1 GiB", "cp", "MB/s", up, cp, ">= 0.33x", up >= cp / 3),
        Row("download, 1 GiB", "cp", "MB/s", down, cp, ">= 0.33x", down >= cp / 3),
    ]


def _settle() -> None:
    """Writes everything back, twice: writing a volume back makes its image on the host's disk have something to be
    written. Then makes sure of free memory that is really there: a virtual machine's may have gone back to its host,
    from where it comes at a fifth of the speed.
    """
    os.sync()
    os.sync()
    populate = "import mmap; mmap.mmap(-1, %d, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
    subprocess.run([sys.executable, "-c", populate % (3 * TRANSFER_BYTES)], check=True)


def streamed_output(server: Server) -> list[Row]:
    command = f"yes {'0123456789abcdef' * 4} | head -c {STREAM_BYTES}"
    with Caller(server) as caller:
        sandbox = caller.create()
        began_monotonic = time.monotonic()
        total = caller.stream_output(sandbox, command)
        ours = STREAM_BYTES / MB / (time.monotonic() - began_monotonic)
        caller.remove(sandbox)
    assert total == STREAM_BYTES
    theirs = STREAM_BYTES / MB / bare.pipe(command)
    return [Row("exec-stream stdout", "cat through a pipe", "MB/s", ours, theirs, ">= 100 MB/s", ours >= 100)]


def memory(folder: Path) -> list[Row]:
    _, imports_mib = bare.imports()
    with Server(folder / "memory") as server, Caller(server) as caller:
        idle = resident_mib(server.pid)
        for _ in range(3):
            caller.remove(caller.create())
        before = resident_mib(server.pid)
        sandboxes = [caller.create() for _ in range(IDLE_SANDBOXES)]
        each = (resident_mib(server.pid) - before) / IDLE_SANDBOXES
        for sandbox in sandboxes:
            caller.remove(sandbox)
    return [
        Row("idle server, resident", "the imports alone", "MiB", idle, imports_mib, "<= 110 MiB", idle <= 110),
        Row("each idle sandbox, in the server", "-", "MiB", each, None, "<= 0.5 MiB", each <= 0.5),
    ]


def start_up(folder: Path) -> list[Row]:
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(START_ROUNDS):
        theirs.append(bare.imports()[0])
        server = Server(folder / f"start{number}")
        ours.append(server.start())
        server.stop()
    reached = p50(ours) <= 1.5
    return [
        Row("hiver serve to first answer, p50", "the imports alone", "s", p50(ours), p50(theirs), "<= 1.5 s", reached)
    ]
