"""What this host offers: programs, privileges, and a runtime that works. Blocking calls."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from hiver_backends.linux.conmon import ConmonProgram
from hiver_backends.linux.runtime import Runtime, kind_of
from hiver_backends.linux.tools import find_conmon, find_program, output_of, privileges, program_finding, run_folder
from hiver_backends.linux.trial import Trial, TrialError, VulnerableRuntimeError
from hiverd.contracts.isolation import Finding

from .settings import Settings

_PREFERENCE: Final = ("crun", "runc")
"""The fastest first. gVisor's runsc has to be named: it does not pass all of our conformance suite yet."""


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


def look(settings: Settings, run_dir: Path, memory: Path, trial: Trial) -> Offer:
    """Looks for everything. `memory` is the file in which the answer of the probing run is kept."""
    findings = [privileges(), run_folder(run_dir)]
    conmon = find_conmon(settings.conmon)
    init = find_program(settings.init)
    findings.append(program_finding("conmon", settings.conmon, conmon.path if conmon else None, "conmon"))
    findings.append(program_finding("init", settings.init, init, "catatonit"))
    runtime = None
    if all(finding.ok for finding in findings):
        runtime, finding = _runtime(settings, init or "", memory, trial)
        findings.append(finding)
    if runtime is not None:
        findings.append(_userns(settings, runtime))
    findings.append(_image_tools())
    return Offer(runtime=runtime, conmon=conmon, init=init, findings=findings)


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
    return output_of(path, "--version").partition("\n")[0]


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
