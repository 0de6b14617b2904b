"""A tree of small files in a sandbox's /workspace, with every access on record, beside the same on the host's disk."""

from __future__ import annotations

import io
import random
import statistics
import subprocess
import tarfile
from typing import Final

from bench.bare import BareRuntime
from bench.caller import Caller
from bench.report import Row
from support.server import Server

FILES: Final = 5_000
FILES_PER_FOLDER: Final = 20
LARGEST_BYTES: Final = 8_000
ROUNDS: Final = 9
REACH: Final = 0.9
STEPS: Final = {
    "unpack": "mkdir {n}; tar xf /tmp/tree.tar -C {n}",
    "grep -r": "grep -r no-such-word {n} || true",
    "find": "find {n} -type f -size +1 > /dev/null",
    "remove": "rm -r {n}",
}


def measure(server: Server, runtime: BareRuntime) -> list[Row]:
    """Each step is timed where it runs, so that what it takes to start a program inside counts for neither.

    Nothing is removed before all has been made: an ext4 without a journal, as ours are and the host's may be, does not
    give out the inodes of removed files for a minute, and looks at each of them whenever it makes one.
    """
    tree = _tree()
    bundle = runtime.prepare()
    archive = bundle / "rootfs" / "tmp" / "tree.tar"
    archive.write_bytes(tree)
    (bundle / "rootfs" / "workspace").mkdir()
    container = runtime.start(bundle)
    ours: dict[str, list[float]] = {name: [] for name in STEPS}
    theirs: dict[str, list[float]] = {name: [] for name in STEPS}
    with Caller(server) as caller:
        sandbox = caller.create()
        caller.upload(sandbox, "/tmp/tree.tar", archive)
        for name, command in STEPS.items():
            for number in range(ROUNDS):
                script = timed(command.format(n=number))
                theirs[name].append(_milliseconds(_bare(runtime, container, script)))
                ours[name].append(_milliseconds(str(caller.exec(sandbox, script)["stdout"])))
                caller.settle(sandbox)  # which must not weigh on the other side
        caller.remove(sandbox)
    runtime.remove(container)
    return [_row(name, ours[name], theirs[name]) for name in STEPS]


def _row(name: str, ours: list[float], theirs: list[float]) -> Row:
    mine, native = statistics.median(ours[1:]), statistics.median(theirs[1:])
    what = f"{name}, {FILES} files in /workspace"
    return Row(what, "the host's disk", "ms", mine, native, f">= {REACH} of native", native / mine >= REACH)


def timed(command: str) -> str:
    """A script that runs a command in /workspace and prints the nanoseconds that it took."""
    return f"cd /workspace; began=$(date +%s%N); {command}; ended=$(date +%s%N); echo $((ended - began))"


def _milliseconds(printed: str) -> float:
    return int(printed) / 1e6


def _bare(runtime: BareRuntime, container: str, script: str) -> str:
    argv = [runtime.program, "exec", container, "sh", "-c", script]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _tree() -> bytes:
    """An archive like that of a package: small files in folders of folders."""
    numbers = random.Random(1)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for number in range(FILES):
            folder = number // FILES_PER_FOLDER
            entry = tarfile.TarInfo(f"tree/package{folder // 10}/module{folder}/file{number}.py")
            content = b"a line of text, as they are\n" * (numbers.randrange(LARGEST_BYTES) // 28)
            entry.size, entry.mtime = len(content), 1_700_000_000
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
