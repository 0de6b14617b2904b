"""`make bench`: measures the server beside bare tools in one run, prints a table, writes .build/bench.json.

Options: names of measures to make only those. The exit code tells whether measuring worked, not how fast it was.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Self

from bench import buckets, docker, egress, fuse, measures, snapshots, trees
from bench.bare import BareRuntime
from bench.report import Row, table, write_json
from support.leaks import marks_of, wait_until_clean
from support.server import REPOSITORY, Server

RESULT: Final = REPOSITORY / ".build" / "bench.json"


class CpuTimes(NamedTuple):
    """Of all processors since boot, in ticks (proc(5), /proc/stat)."""

    busy: int
    steal: int

    @classmethod
    def now(cls) -> Self:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
        return cls(user + nice + system + irq + softirq + steal, steal)

    def stolen_since(self, before: Self) -> float:
        """The share of what was wanted that another virtual machine got: figures of such a run say less."""
        return (self.steal - before.steal) / max(1, self.busy - before.busy)


def environment(runtime: BareRuntime) -> dict[str, str]:
    version = subprocess.run([runtime.program, "--version"], check=True, capture_output=True, text=True).stdout
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "runtime": version.splitlines()[0],
    }


def main() -> int:
    chosen = set(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="hiver-bench-") as scratch:
        folder = Path(scratch)
        runtime = BareRuntime(folder / "bare")
        server = Server(folder / "server")
        without_server: dict[str, Callable[[], list[Row]]] = {
            "start": lambda: measures.start_up(folder),
            "memory": lambda: measures.memory(folder),
            "egress": lambda: egress.measure(folder),
            "fuse": lambda: fuse.measure(folder),
            "buckets": buckets.measure,
            "docker": lambda: docker.measure(folder),
        }
        with_server: dict[str, Callable[[], list[Row]]] = {
            "create": lambda: measures.create_to_first_exec(server, runtime),
            "exec": lambda: measures.exec_true(server, runtime),
            "parallel": lambda: measures.creates_at_once(server, runtime),
            "proxy": lambda: measures.proxied_requests(server),
            "files": lambda: measures.transfers(server, folder),
            "trees": lambda: trees.measure(server, runtime),
            "snapshots": lambda: snapshots.measure(server, folder),
            "stream": lambda: measures.streamed_output(server),
        }
        known = without_server | with_server
        if not chosen <= set(known):
            print(f"unknown: {', '.join(chosen - set(known))}; there are {', '.join(known)}")
            return 2
        rows: list[Row] = []
        failures: list[str] = []

        def make(every: dict[str, Callable[[], list[Row]]]) -> None:
            for name, measure in every.items():
                if not chosen or name in chosen:
                    print(f"measuring: {name}", file=sys.stderr, flush=True)
                    try:
                        rows.extend(measure())
                    except Exception as error:  # noqa: BLE001 -- one measure that fails must not hide the others
                        failures.append(f"{name}: {type(error).__name__}: {error}")

        marks = marks_of(server.data_dir)
        before = CpuTimes.now()
        make(without_server)
        with server:
            make(with_server)
        stolen = CpuTimes.now().stolen_since(before)
        wait_until_clean(marks)
    print(table(rows))
    for failure in failures:
        print(f"NOT MEASURED {failure}")
    print(f"\n{stolen:.0%} of the busy processor time went to this machine's neighbours (steal)")
    write_json(RESULT, rows, environment(runtime) | {"steal": f"{stolen:.3f}"})
    print(f"\nwritten to {RESULT.relative_to(REPOSITORY)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
