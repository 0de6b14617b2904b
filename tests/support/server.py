"""A `hiver serve` in a process of its own, on a free port, with its own data folder."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

REPOSITORY: Final = Path(__file__).resolve().parents[2]
HIVER: Final = os.environ.get("HIVER_TEST_COMMAND") or str(Path(sys.executable).parent / "hiver")
"""The command under test; `HIVER_TEST_COMMAND` names another one, such as the single binary."""
START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 60.0
LOG_TAIL_BYTES: Final = 8000

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)

DEFAULT_CONFIG: Final = """\
[images]
"hiversh/python:3.13-alpine" = "host"
"""
"""The documentation's image, mapped to the one that needs no download."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody held a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


def _die_with_parent() -> None:
    """A test run that is killed must not leave a server behind."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of the server or the client."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HIVER_", "HIVE_"))}
    return {**kept, **(extra or {})}


class Backend(NamedTuple):
    """An isolation plug-in that servers of tests are told to use."""

    name: str
    docker_host: str = ""
    """The Engine that `docker` is to use."""

    @property
    def environment(self) -> dict[str, str]:
        return {"DOCKER_HOST": self.docker_host} if self.docker_host else {}


OCI: Final = Backend("oci")


class ServerFailed(Exception):  # noqa: N818 -- the name says what happened
    """The server did not start, or did not stop; the message ends with its log."""


class Server:
    """One server process. `start` returns when it answers; `stop` when it has ended."""

    def __init__(
        self,
        folder: Path,
        *,
        ephemeral: bool = True,
        config: str = DEFAULT_CONFIG,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        backend: Backend = OCI,
    ) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.log_path = folder / "server.log"
        self.config_path = folder / "config.toml"
        self.ephemeral = ephemeral
        self.port = free_port()
        self._config = config
        self._arguments = tuple(arguments)
        self.backend = backend
        self._environment = clean_environment({**backend.environment, **(environment or {})})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def command(self) -> list[str]:
        """The argv of the server."""
        argv = [HIVER, "serve", "--port", str(self.port), "--data-dir", str(self.data_dir)]
        argv += ["--config", str(self.config_path), "--container-backend", self.backend.name]
        if self.ephemeral:
            argv.append("--ephemeral")
        return [*argv, *self._arguments]

    def start(self) -> float:
        """Starts and waits for the first answer; returns the seconds that took."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(self._config)
        began_monotonic = time.monotonic()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 -- one prctl, safe between fork and exec
            )
        self._wait_until_answering(began_monotonic + START_SECONDS)
        return time.monotonic() - began_monotonic

    def _wait_until_answering(self, deadline_monotonic: float) -> None:
        while not self.answers():
            if not self.running:
                raise ServerFailed(f"the server ended before it answered\n{self.log_tail()}")
            if time.monotonic() > deadline_monotonic:
                self.kill()
                raise ServerFailed(f"the server gave no answer within {START_SECONDS:g} s\n{self.log_tail()}")
            time.sleep(0.02)

    def answers(self) -> bool:
        """True when the list of sandboxes can be read."""
        try:
            with urllib.request.urlopen(f"{self.url}/controller/v1/sandboxes", timeout=5) as response:  # noqa: S310
                return bool(response.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except (OSError, urllib.error.URLError):
            return False

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """SIGTERM; returns the exit code. `ServerFailed` when it had to be killed."""
        process = self._process
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerFailed(f"the server did not stop within {seconds:g} s\n{self.log_tail()}") from None

    def kill(self) -> None:
        """SIGKILL: what a crash looks like."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def log_tail(self) -> str:
        """The newest part of the server's log."""
        if not self.log_path.exists():
            return "(no log)"
        return self.log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")

    def open_descriptors(self) -> int:
        """How many file descriptors the server process holds."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def keys_of(server: Server) -> list[str]:
    """The keys that the server lists."""
    with urllib.request.urlopen(f"{server.url}/controller/v1/sandboxes", timeout=10) as response:  # noqa: S310
        return sorted(entry["key"] for entry in json.load(response))
