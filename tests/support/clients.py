"""The published Python clients, each release in a folder of its own, and a process that drives one of them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

from support.server import REPOSITORY, clean_environment

CLIENTS: Final = REPOSITORY / ".clients"
DISTRIBUTION: Final = "hiver-py"
SELECT_VARIABLE: Final = "HIVER_TEST_CLIENTS"

DEFAULT_VERSIONS: Final = ("0.1.15", "0.1.18", "0.1.20", "0.1.23", "0.1.24", "0.1.35", "0.1.36", "0.1.45")
"""The ends of every stretch of releases between two changes on the wire (PROTOCOL 1.4)."""

ALL_VERSIONS: Final = tuple(f"0.1.{patch}" for patch in range(15, 46) if patch != 19)
"""Every release; 0.1.19 was never made (PROTOCOL 1.1)."""

NO_AUTHORITIES: Final = {"SSL_CERT_FILE": "", "SSL_CERT_DIR": "/dev/null"}
"""For a client that only speaks plain HTTP: to read the world's authorities takes longer than most scenarios."""

INSIDE: Final = ("pip", "requests", "httpx", "websockets")
"""What sandboxes of tests are given besides the client."""


def selected_versions() -> tuple[str, ...]:
    """The releases to test: `HIVER_TEST_CLIENTS` is `all` or a list such as `0.1.22,0.1.45`; default the ends."""
    chosen = os.environ.get(SELECT_VARIABLE, "").strip()
    if not chosen:
        return DEFAULT_VERSIONS
    if chosen == "all":
        return ALL_VERSIONS
    return tuple(version.strip() for version in chosen.split(",") if version.strip())


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Several test workers install at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(version: str) -> Path:
    """The folder that holds this release, installed from the package index on first use."""
    folder = CLIENTS / version
    with _locked(CLIENTS / ".lock"):
        if not (folder / "hiver" / "__init__.py").is_file():
            _install_into(version, folder)
    return folder


def _install_into(version: str, folder: Path) -> None:
    _pip_install(folder, "--no-deps", f"{DISTRIBUTION}=={version}")


def _pip_install(folder: Path, *arguments: str) -> None:
    with tempfile.TemporaryDirectory(dir=CLIENTS) as scratch:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                *("--no-compile", "--target", f"{scratch}/target", *arguments),
            ],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(f"{scratch}/target", folder)


def install_inside() -> Path:
    """A folder of packages for the Python that sandboxes see, `/usr/bin/python3`: the newest client, and programs of
    other people that speak HTTP."""
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.run(["/usr/bin/python3", "-c", asked], check=True, capture_output=True, text=True).stdout
    folder = CLIENTS / f"inside-{version.strip()}"
    with _locked(CLIENTS / ".lock"):
        if not folder.is_dir():
            binary = ("--only-binary", ":all:", "--python-version", version.strip())
            _pip_install(folder, *binary, f"{DISTRIBUTION}=={ALL_VERSIONS[-1]}", *INSIDE)
    return folder


def helper_rules(call: str) -> list[dict[str, Any]]:
    """What a helper of the newest client returns, as it goes over the wire: `allowed_npm_packages("left-pad")`."""
    script = (
        f"import json; from hiver import *; from hiver.schemas import *; rules = {call}\n"
        "print(json.dumps([rule.model_dump(exclude_none=True, by_alias=True) for rule in rules]))"
    )
    environment = clean_environment({"PYTHONPATH": str(install(ALL_VERSIONS[-1]))})
    command = [sys.executable, "-P", "-c", script]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    rules: list[dict[str, Any]] = json.loads(output)
    return rules


class ScenarioFailed(AssertionError):  # noqa: N818 -- it is an assertion, made in another process
    """A scenario failed inside the client's process; the message is its traceback."""


class Driver:
    """A process with one release on its path. Runs scenarios by name, one after the other."""

    def __init__(self, version: str, gateway_url: str) -> None:
        self.version = version
        self._gateway_url = gateway_url
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, scenario: str, *, seconds: float) -> None:
        """Runs one scenario; `ScenarioFailed` with its traceback, or when it takes longer than `seconds`."""
        process = self._ensure_started()
        assert process.stdin is not None
        request = {"scenario": scenario, "gateway_url": self._gateway_url, "seconds": seconds}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer = self._read_answer(process, seconds + 10)
        if not answer["ok"]:
            raise ScenarioFailed(f"client {self.version}, scenario {scenario}\n{answer['traceback']}")

    def _ensure_started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            path = os.pathsep.join([str(install(self.version)), str(REPOSITORY / "tests")])
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "contract.driver", self.version],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=clean_environment({"PYTHONPATH": path, **NO_AUTHORITIES}),
            )
        return self._process

    def _read_answer(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert process.stdout is not None
        deadline_monotonic = time.monotonic() + seconds
        received = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, deadline_monotonic - time.monotonic())):
                    self.close()
                    raise ScenarioFailed(f"client {self.version}: no answer within {seconds:g} s")
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise ScenarioFailed(f"client {self.version}: its process ended (exit code {process.wait()})")
                received += piece
        answer = json.loads(received)
        assert isinstance(answer, dict)
        return answer

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Installs every selected release, so that the tests themselves need no network."""
    for version in selected_versions():
        install(version)
    install_inside()


if __name__ == "__main__":
    main()
