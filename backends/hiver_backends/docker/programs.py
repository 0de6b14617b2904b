"""The runtimes below the Engine, each with what runs commands through it. Made when first needed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

from hiver_backends.linux.conmon import Conmon, ConmonProgram
from hiver_backends.linux.execs import Execs
from hiver_backends.linux.runtime import RuntimeCalls
from hiver_backends.linux.workload import Shared

from . import below
from .workload import Identity, Tools


class _Kept(NamedTuple):
    calls: RuntimeCalls
    tools: Tools


class Programs:
    """`folder` is for the files of commands that are being started. Safe in threads; blocking."""

    def __init__(self, folder: Path, conmon: ConmonProgram, shared: Shared, log_max_bytes: int) -> None:
        self._folder = folder
        self._conmon = conmon
        self._shared = shared
        self._log_max_bytes = log_max_bytes
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, str], _Kept] = {}

    def prepare(self) -> None:
        """Empties the folder of what a killed server has left there."""
        Execs.clear(self._folder)

    def of(self, identity: Identity) -> Tools:
        """For the runtime that knows a container."""
        key = (identity.runtime, identity.state_dir)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._make(identity)
            return self._kept[key].tools

    def close(self) -> None:
        """Frees what the runtimes run from."""
        with self._lock:
            for kept in self._kept.values():
                kept.calls.close()
            self._kept.clear()

    def _make(self, identity: Identity) -> _Kept:
        shared = self._shared
        calls = RuntimeCalls(below.runtime(identity.runtime), Path(identity.state_dir), shared.children)
        execs = Execs(self._folder, calls, shared.children, shared.pool)
        conmon = Conmon(self._conmon, calls, shared.children, self._log_max_bytes)
        return _Kept(calls, Tools(conmon=conmon, execs=execs, shared=shared))
