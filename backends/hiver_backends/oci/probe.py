"""What this host offers: programs, privileges, and a runtime that works. Blocking calls."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from hiver_backends.linux.conmon import ConmonProgram
from hiver_backends.linux.runtime import ENVIRONMENT, Runtime, kind_of
from hiver_backends.linux.trial import Trial, TrialError, VulnerableRuntimeError
from hiverd.contracts.isolation import Finding

from .settings import Settings

_PREFERENCE: Final = ("crun", "runc")
"""The fastest first. gVisor's runsc has to be named: it does not pass all of our conformance suite yet."""
_MAX_RUN_DIR_BYTES: Final = 52
"""What sockets below it leave of the 107 bytes of unix(7)."""


class Offer(Struct, frozen=True, kw_only=True):
    """The outcome of probing; parts that are missing are None, and a finding says why."""

    runtime: Runtime | None
    conmon: ConmonProgram | None
    init: str | None
    findings: list[Finding]


class Remembered(Struct, frozen=True):
    """The stored answer of a probing run: valid as long as nothing that matters has changed."""

    key: str
    runtime: Runtime
    refusals: list[str]
    """What was tried before it, and why it did not work."""


def find_program(name: str) -> str | None:
    """An absolute path; programs of the system's administrator (`sbin`) are found as well."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{ENVIRONMENT['PATH']}")


def look(settings: Settings, run_dir: Path, memory: Path, trial: Trial) -> Offer:
    """Looks for everything. `memory` is the file in which the answer of the probing run is kept."""
    findings = [_privileges(), _run_dir(run_dir)]
    conmon = _conmon(settings)
    init = find_program(settings.init)
    findings.append(_program("conmon", settings.conmon, conmon.path if conmon else None, "conmon"))
    findings.append(_program("init", settings.init, init, "catatonit"))
    runtime = None
    if all(finding.ok for finding in findings):
        runtime, finding = _runtime(settings, init or "", memory, trial)
        findings.append(finding)
    if runtime is not None:
        findings.append(_userns(settings, runtime))
    findings.append(_image_tools())
    return Offer(runtime=runtime, conmon=conmon, init=init, findings=findings)


def _privileges() -> Finding:
    root = os.geteuid() == 0
    detail = "running as root" if root else f"running as user {os.geteuid()}"
    return Finding("privileges", root, detail, remedy="" if root else "start the server as root: sudo hiver serve ...")


def _run_dir(run_dir: Path) -> Finding:
    fits = len(os.fsencode(run_dir)) <= _MAX_RUN_DIR_BYTES
    remedy = "" if fits else f"choose a run folder whose path has at most {_MAX_RUN_DIR_BYTES} bytes"
    return Finding("run folder", fits, str(run_dir), remedy=remedy)


def _program(title: str, wanted: str, found: str | None, package: str) -> Finding:
    if found is not None:
        return Finding(title, ok=True, detail=found)
    return Finding(title, ok=False, detail=f"{wanted} is not installed", remedy=f"apt-get install {package}")


def _conmon(settings: Settings) -> ConmonProgram | None:
    path = find_program(settings.conmon)
    if path is None:
        return None
    return ConmonProgram(
        path=path, version=_output(path, "--version"), skips_log_sync="--no-sync-log" in _output(path, "--help")
    )


def _output(*argv: str) -> str:
    try:
        result = subprocess.run(
            argv, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _candidates(settings: Settings) -> list[Runtime]:
    """In the order of preference: with user namespaces first, then, if the option allows it, without."""
    names = _PREFERENCE if settings.runtime == "auto" else (settings.runtime,)
    paths = [path for path in map(find_program, names) if path is not None]
    modes = {"auto": (True, False), "required": (True,), "off": (False,)}[settings.userns]
    found = []
    for userns in modes:
        for path in paths:
            kind = kind_of(path)
            # gVisor's kernel is the boundary there, and its file server does not know id-mapped mounts.
            if not (kind == "runsc" and userns):
                found.append(Runtime(path, kind, _version(path), userns))
    return found


def _version(path: str) -> str:
    return _output(path, "--version").partition("\n")[0]


def _runtime(settings: Settings, init: str, memory: Path, trial: Trial) -> tuple[Runtime | None, Finding]:
    candidates = _candidates(settings)
    if not candidates:
        wanted = "no OCI runtime" if settings.runtime == "auto" else settings.runtime
        return None, Finding("runtime", ok=False, detail=f"{wanted} is not installed", remedy="apt-get install runc")
    key = _key(settings, candidates, init)
    known = _recall(memory, key)
    if known is not None:
        return known.runtime, _good(known.runtime, known.refusals)
    refusals: list[str] = []
    for candidate in candidates:
        try:
            trial.run(candidate)
        except TrialError as error:
            refusals.append(f"{candidate.kind}{' with user namespaces' if candidate.userns else ''}: {error}")
        except VulnerableRuntimeError as error:
            refusals.append(f"{candidate.kind}: {error.__doc__}")
        else:
            memory.write_bytes(msgspec.json.encode(Remembered(key, candidate, refusals)))
            return candidate, _good(candidate, refusals)
    return None, Finding("runtime", ok=False, detail="; ".join(refusals), remedy=_remedy(refusals))


def _remedy(refusals: list[str]) -> str:
    if any("CVE" in refusal for refusal in refusals):
        return "apt-get install --only-upgrade runc crun"
    return "install another runtime (apt-get install runc crun), or change the host as the messages say"


def _good(runtime: Runtime, refusals: list[str]) -> Finding:
    others = f"; does not work here: {'; '.join(refusals)}" if refusals else ""
    return Finding("runtime", ok=True, detail=f"{runtime.version} ({runtime.path}){others}")


def _userns(settings: Settings, runtime: Runtime) -> Finding:
    required = settings.userns == "required"
    if runtime.userns:
        return Finding("user namespaces", ok=True, detail="root of a sandbox is nobody on this host", required=required)
    return Finding(
        "user namespaces",
        ok=False,
        detail=f"not used with {runtime.kind}: root of a sandbox has this host's root ids, without its privileges",
        required=required,
        remedy="" if settings.userns == "off" else "a kernel from 6.1 on and runc or crun make them possible",
    )


def _image_tools() -> Finding:
    missing = [name for name in ("skopeo", "umoci") if find_program(name) is None]
    if not missing:
        return Finding("image tools", ok=True, detail="skopeo and umoci", required=False)
    return Finding(
        "image tools",
        ok=False,
        detail=f"{' and '.join(missing)} not installed: only the image 'host' and folders can be used",
        required=False,
        remedy=f"apt-get install {' '.join(missing)}",
    )


def _key(settings: Settings, candidates: list[Runtime], init: str) -> str:
    parts = [os.uname().release, settings.userns, settings.seccomp, str(settings.userns_base), *_stamp(init)]
    for candidate in candidates:
        parts += [candidate.path, candidate.version, str(candidate.userns), *_stamp(candidate.path)]
    parts.append(Path("/proc/self/cgroup").read_text() if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _stamp(path: str) -> list[str]:
    status = os.stat(path)
    return [str(status.st_size), str(status.st_mtime_ns)]


def _recall(memory: Path, key: str) -> Remembered | None:
    try:
        remembered = msgspec.json.decode(memory.read_bytes(), type=Remembered)
    except (OSError, msgspec.MsgspecError):
        return None
    return remembered if remembered.key == key else None
