"""Programs and privileges that a plug-in needs of its host. Blocking calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from hiverd.contracts.isolation import Finding

from .conmon import ConmonProgram
from .runtime import ENVIRONMENT

_MAX_RUN_DIR_BYTES: Final = 52
"""What sockets below it leave of the 107 bytes of unix(7)."""


def find_program(name: str) -> str | None:
    """An absolute path; programs of the system's administrator (`sbin`) are found as well."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{ENVIRONMENT['PATH']}")


def privileges() -> Finding:
    """Whether we are root."""
    root = os.geteuid() == 0
    detail = "running as root" if root else f"running as user {os.geteuid()}"
    return Finding("privileges", root, detail, remedy="" if root else "start the server as root: sudo hiver serve ...")


def run_folder(run_dir: Path) -> Finding:
    """Whether sockets fit below the run folder."""
    fits = len(os.fsencode(run_dir)) <= _MAX_RUN_DIR_BYTES
    remedy = "" if fits else f"choose a run folder whose path has at most {_MAX_RUN_DIR_BYTES} bytes"
    return Finding("run folder", fits, str(run_dir), remedy=remedy)


def program_finding(title: str, wanted: str, found: str | None, package: str) -> Finding:
    """What to tell about a program that is needed."""
    if found is not None:
        return Finding(title, ok=True, detail=found)
    return Finding(title, ok=False, detail=f"{wanted} is not installed", remedy=f"apt-get install {package}")


def find_conmon(name: str) -> ConmonProgram | None:
    """conmon and what it can do; None if it is not there."""
    path = find_program(name)
    if path is None:
        return None
    return ConmonProgram(
        path=path, version=output_of(path, "--version"), skips_log_sync="--no-sync-log" in output_of(path, "--help")
    )


def output_of(*argv: str) -> str:
    """Standard output of a short run; empty if it fails."""
    try:
        result = subprocess.run(
            argv, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
