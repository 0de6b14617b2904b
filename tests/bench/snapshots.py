"""A snapshot of many files, beside `tar | zstd -1` of the same and its reverse."""

from __future__ import annotations

import os
import random
import re
import shutil
import statistics
import subprocess
import time
import uuid
from pathlib import Path
from typing import Final

from bench.caller import Caller
from bench.report import Row
from support.server import Server

FILES: Final = 10_000
FILE_BYTES: Final = 30_000
FILES_PER_FOLDER: Final = 50
ROUNDS: Final = 3
REACH: Final = 1.3
REACH_CREATE: Final = 1.2
PAUSE_MS: Final = 100.0
_PAUSED: Final = re.compile(r"paused for (\d+) ms")
_TREE: Final = """
import os, random
rnd = random.Random(1)
words = [b"%x" % rnd.getrandbits(32) for _ in range(3000)]
for number in range({files}):
    folder = "/workspace/tree/%d" % (number // {per_folder})
    os.makedirs(folder, exist_ok=True)
    with open(folder + "/%d" % number, "wb") as file:
        file.write(b" ".join(rnd.choices(words, k={size} // 9))[:{size}])
"""


def measure(server: Server, folder: Path) -> list[Row]:
    tree = _tree(folder / "tree")
    captures: list[float] = []
    pauses: list[float] = []
    restores: list[float] = []
    tars: list[float] = []
    untars: list[float] = []
    creates: list[float] = []
    with Caller(server) as caller:
        sandbox = caller.create()
        script = _TREE.format(files=FILES, per_folder=FILES_PER_FOLDER, size=FILE_BYTES)
        caller.exec(sandbox, ["python3", "-c", script])
        caller.exec(
            sandbox, "setsid sh -c 'while :; do date > /workspace/tree/changing; sleep 0.1; done' > /dev/null 2>&1 &"
        )
        for number in range(ROUNDS):
            archive = folder / "reference.tar.zst"
            os.sync()
            tars.append(_timed(f"tar -C {tree} -cf - . | zstd -1 -q -f -o {archive}"))
            os.sync()
            key = f"bench-{number}"
            began = time.monotonic()
            body = {"files": {"key": key, "include": ["/workspace/**"]}}
            status, answer = caller.call("POST", f"{sandbox}/snapshot", body)
            captures.append(time.monotonic() - began)
            if status != 200 or "files" not in answer:
                raise RuntimeError(f"snapshot answered {status}: {answer}")
            pauses.append(float(_PAUSED.findall(server.log_path.read_text())[-1]))
            os.sync()
            out = folder / f"out{number}"
            out.mkdir()
            untars.append(_timed(f"zstd -q -dc {archive} | tar -C {out} -xf -"))
            shutil.rmtree(out)
            os.sync()
            creates.append(_create(caller, {}))
            restores.append(_create(caller, {"snapshot": {"files": {"key": key}}}))
        caller.remove(sandbox)
    capture, tar = statistics.median(captures), statistics.median(tars)
    restore, untar, create = statistics.median(restores), statistics.median(untars), statistics.median(creates)
    size = f"{FILES:,} files, {FILES * FILE_BYTES // 1_000_000} MB"
    pause = max(pauses)
    return [
        Row(f"capture {size}", "tar | zstd -1", "s", capture, tar, f"<= {REACH}x", capture <= REACH * tar),
        Row("longest pause of the sandbox", "", "ms", pause, None, f"< {PAUSE_MS:.0f} ms", pause < PAUSE_MS),
        Row(
            f"restore {size}", "zstd -d | tar x", "s", restore - create, untar, f"<= {REACH}x",
            restore - create <= REACH * untar,
        ),
        Row(
            "create with restore", "create, then zstd -d | tar x", "s", restore, create + untar, f"<= {REACH_CREATE}x",
            restore <= REACH_CREATE * (create + untar),
        ),
    ]  # fmt: skip


def _create(caller: Caller, config: dict[str, object]) -> float:
    key = f"bench-{uuid.uuid4().hex[:12]}"
    began = time.monotonic()
    status, document = caller.call("POST", f"/v1/sandboxes/{key}", {"ttl": 0, **config})
    took = time.monotonic() - began
    if status != 201:
        raise RuntimeError(f"create answered {status}: {document}")
    caller.remove(f"/sandbox/{document['id']}/v1/{key}")
    return took


def _tree(tree: Path) -> Path:
    chance = random.Random(1)
    words = [b"%x" % chance.getrandbits(32) for _ in range(3000)]
    for number in range(FILES):
        folder = tree / str(number // FILES_PER_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(number)).write_bytes(b" ".join(chance.choices(words, k=FILE_BYTES // 9))[:FILE_BYTES])
    return tree


def _timed(command: str) -> float:
    began = time.monotonic()
    subprocess.run(["sh", "-c", command], check=True)
    return time.monotonic() - began
