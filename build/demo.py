"""`make demo`: the published client's quick start, and an agent behind egress rules, against a server of their own.

Nothing is left afterwards, which is checked: no process, mount, cgroup, namespace, loop device or file. Only the
client's own environment stays in `.clients/demo`, so that the next time is quick.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.clients import ALL_VERSIONS, CLIENTS, DISTRIBUTION  # noqa: E402 -- the folder is on the path only now
from support.leaks import marks_of, wait_until_clean  # noqa: E402
from support.server import Server, ServerFailed, clean_environment  # noqa: E402

CLIENT_VERSION: Final = ALL_VERSIONS[-1]
EXAMPLES: Final = {
    "The client's documented quick start": REPOSITORY / "examples" / "quickstart.py",
    "An agent that may reach one API, with a key that it never sees": REPOSITORY / "examples" / "egress.py",
}
EXAMPLE_SECONDS: Final = 120


class Narrator:
    """Tells people what happens, step by step."""

    def __init__(self) -> None:
        self._number = 0
        self._began_monotonic = time.monotonic()
        self._bold, self._plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")

    def step(self, text: str) -> None:
        self._number += 1
        print(f"\n{self._bold}{self._number}. {text}{self._plain}", flush=True)

    def detail(self, text: str) -> None:
        for line in text.rstrip().splitlines():
            print(f"   {line}", flush=True)

    def done(self) -> None:
        seconds = time.monotonic() - self._began_monotonic
        print(f"\n{self._bold}All of it works.{self._plain} ({seconds:.1f} s in all)", flush=True)


def client_python() -> Path:
    """The Python of an environment that holds the published client and its dependencies, nothing of ours."""
    folder = CLIENTS / "demo"
    python = folder / "bin" / "python"
    stamp = folder / ".version"
    if stamp.is_file() and stamp.read_text() == CLIENT_VERSION:
        return python
    venv.create(folder, with_pip=False, clear=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"),
            *("--disable-pip-version-check", f"{DISTRIBUTION}=={CLIENT_VERSION}"),
        ],
        check=True,
    )
    stamp.write_text(CLIENT_VERSION)
    return python


def run_example(example: Path, python: Path, server: Server, narrator: Narrator) -> None:
    environment = clean_environment({"HIVER_GATEWAY_URL": server.url, "PYTHONUNBUFFERED": "1"})
    with subprocess.Popen(
        [str(python), "-I", str(example)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            narrator.detail(line)
        code = process.wait(EXAMPLE_SECONDS)
    if code != 0:
        raise ServerFailed(f"{example.name} failed with exit code {code}; the server said:\n{server.log_tail()}")


def demonstrate(folder: Path, narrator: Narrator) -> None:
    narrator.step(f"The published client, {DISTRIBUTION} {CLIENT_VERSION}, in an environment of its own")
    python = client_python()
    narrator.detail(str(python.parent.parent.relative_to(REPOSITORY)))

    server = Server(folder)
    marks = marks_of(server.data_dir)
    narrator.step("A server on a free port, with a data folder that goes away")
    narrator.detail(" ".join(["hiver", *server.command()[1:]]))
    try:
        seconds = server.start()
        narrator.detail(f"answers at {server.url} after {seconds:.1f} s")
        for title, example in EXAMPLES.items():
            narrator.step(f"{title} ({example.relative_to(REPOSITORY)})")
            run_example(example, python, server, narrator)
    finally:
        narrator.step("The server stops")
        server.stop()
    shutil.rmtree(folder)
    narrator.step("Nothing is left")
    wait_until_clean(marks)
    narrator.detail("no process, mount, cgroup, namespace, loop device or file")


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    narrator = Narrator()
    folder = Path(tempfile.mkdtemp(prefix="hiver-demo-"))
    try:
        demonstrate(folder, narrator)
    except KeyboardInterrupt:
        print("\ninterrupted; everything was stopped")
        return 130
    except (ServerFailed, AssertionError, subprocess.CalledProcessError) as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    narrator.done()
    return 0


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
