"""A governed mount with three rules and events, beside libfuse's C passthrough and the folder itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.report import Row, Unit, p50
from support.fuse_mount import FuseFixture, RuleList
from support.waiting import until

RULES: Final[RuleList] = (("/**", "rw"), ("/docs/**", "ro"), ("/secret/**", "deny"))
FILES: Final = 5000
FILE_BYTES: Final = 1024
ROUNDS: Final = 3
LARGE_MIB: Final = 1024
MB: Final = 1_000_000
PASSTHROUGH: Final = "libfuse passthrough_ll"
SOURCE: Final = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")

Figures = dict[str, float]


def measure(folder: Path) -> list[Row]:
    archive = _archive(folder)
    program = _passthrough(folder)
    ours: list[Figures] = []
    theirs: list[Figures] = []
    native: list[Figures] = []
    for number in range(ROUNDS):
        at = folder / f"fuse{number}"
        at.mkdir()
        native.append(_large(_made(at / "native")))
        if program is not None:
            with _passthrough_mount(program, at) as mounted:
                theirs.append(_tree(mounted, archive))
        with FuseFixture(at / "folder", at / "mount", RULES) as fixture:
            ours.append(_tree(fixture.path, archive) | _large(fixture.path))
        shutil.rmtree(at)
    rows = [
        _row(f"unpack {FILES:,} files on a governed mount", "unpack", "s", ours, theirs, 1 / 0.35),
        _row("grep them, second time", "grep", "ms", ours, theirs, 1 / 0.8),
        _row("find -size, second time", "find", "ms", ours, theirs, 1 / 0.8),
        _row("remove them", "remove", "s", ours, theirs, 1 / 0.35),
    ]
    for what in ("write", "read"):
        measured, baseline = (p50([one[what] for one in figures]) for figures in (ours, native))
        name = f"{what} {LARGE_MIB:,} MiB on a governed mount"
        rows.append(Row(name, "the folder itself", "MB/s", measured, baseline, ">= 0.3x", measured >= 0.3 * baseline))
    return rows


def _row(what: str, key: str, unit: Unit, ours: list[Figures], theirs: list[Figures], bound: float) -> Row:
    scale = 1000 if unit == "ms" else 1
    measured = scale * p50([one[key] for one in ours])
    reach = f"<= {bound:.2f}x"
    if not theirs:
        note = f"no baseline: {PASSTHROUGH} needs gcc, pkg-config and {SOURCE} (libfuse3-dev)"
        return Row(what, PASSTHROUGH, unit, measured, None, reach, reached=True, note=note)
    baseline = scale * p50([one[key] for one in theirs])
    return Row(what, PASSTHROUGH, unit, measured, baseline, reach, measured <= bound * baseline)


def _archive(folder: Path) -> Path:
    tree = folder / "tree"
    for number in range(FILES):
        path = tree / f"d{number // 50}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(FILE_BYTES // 2).hex().encode())
    archive = folder / "tree.tar"
    subprocess.run(["tar", "-C", folder, "-cf", archive, "tree"], check=True)
    shutil.rmtree(tree)
    return archive


def _tree(at: Path, archive: Path) -> Figures:
    tree = at / "tree"

    def grep() -> None:
        _run("grep", "-r", "such-text-is-nowhere", tree, expect=1)

    def find() -> None:
        _run("find", tree, "-type", "f", "-size", "+0")

    figures = {"unpack": _seconds(lambda: _run("tar", "-C", at, "-xf", archive))}
    grep()
    find()
    figures["grep"] = min(_seconds(grep) for _ in range(3))
    figures["find"] = min(_seconds(find) for _ in range(3))
    figures["remove"] = _seconds(lambda: _run("rm", "-r", tree))
    return figures


def _large(at: Path) -> Figures:
    file = at / "large"
    size = LARGE_MIB * 2**20 / MB
    write = _seconds(lambda: _run("dd", "if=/dev/zero", f"of={file}", "bs=1M", f"count={LARGE_MIB}", "status=none"))
    read = _seconds(lambda: _run("dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"))
    file.unlink()
    return {"write": size / write, "read": size / read}


def _run(*command: str | Path, expect: int = 0) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode != expect:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}")


def _seconds(work: Callable[[], None]) -> float:
    began_monotonic = time.monotonic()
    work()
    return time.monotonic() - began_monotonic


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _passthrough(folder: Path) -> Path | None:
    """Compiles libfuse's example; None where its source or a compiler is missing."""
    program = folder / "passthrough_ll"
    try:
        flags = subprocess.run(
            ["pkg-config", "fuse3", "--cflags", "--libs"], check=True, capture_output=True, text=True
        ).stdout.split()
        subprocess.run(["gcc", "-O2", SOURCE, "-o", program, *flags], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return program


@contextmanager
def _passthrough_mount(program: Path, at: Path) -> Iterator[Path]:
    source, mounted = _made(at / "passthrough-source"), _made(at / "passthrough")
    options = f"source={source},allow_other,default_permissions"
    with subprocess.Popen([program, "-f", "-o", options, mounted], stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: os.path.ismount(mounted), seconds=10, what="passthrough_ll is mounted")
            yield mounted
        finally:
            subprocess.run(["umount", "-l", mounted], check=False)
            server.wait(10)
