"""The baselines: an OCI runtime without anything around it, and other bare tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

IMPORTS: Final = "litestar, uvicorn, aiohttp"
"""What a server of this kind cannot do without; aiohttp is left out where it is not installed."""


def run_quietly(argv: Sequence[str]) -> None:
    """Runs a program to its end; its output goes nowhere; `CalledProcessError` if it fails."""
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class BareRuntime:
    """Containers made by the runtime alone, with the root of the image `host`: this machine's /usr."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = self._find()

    def _find(self) -> str:
        """The first runtime that works here: some refuse some hosts."""
        for name in ("crun", "runc"):
            self.program = shutil.which(name) or ""
            if not self.program:
                continue
            try:
                container = self.start()
            except subprocess.CalledProcessError:
                continue
            self.remove(container)
            return self.program
        raise RuntimeError("neither crun nor runc runs a container here")

    @property
    def name(self) -> str:
        return Path(self.program).name

    def _bundle(self) -> Path:
        bundle = self.folder / uuid.uuid4().hex[:12]
        root = bundle / "rootfs"
        for name in ("usr", "etc", "root", "tmp", "proc", "sys", "dev", "var", "run"):
            (root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{name}"):
                (root / name).symlink_to(f"usr/{name}")
        (bundle / "config.json").write_text(json.dumps(self._config()))
        return bundle

    def _config(self) -> dict[str, Any]:
        spec = subprocess.run([self.program, "spec"], cwd=self._scratch(), check=True, capture_output=True)
        assert spec.returncode == 0
        config: dict[str, Any] = json.loads((self._scratch() / "config.json").read_text())
        (self._scratch() / "config.json").unlink()
        config["process"].update(args=["sleep", "infinity"], terminal=False)
        config["root"] = {"path": "rootfs", "readonly": False}
        config["mounts"].append(
            {"destination": "/usr", "source": "/usr", "type": "bind", "options": ["rbind", "ro", "nosuid", "nodev"]}
        )
        return config

    def _scratch(self) -> Path:
        scratch = self.folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        return scratch

    def prepare(self) -> Path:
        """A bundle that `start` can use; making it is not part of what is measured."""
        return self._bundle()

    def start(self, bundle: Path | None = None) -> str:
        """`run -d`; the name of the container."""
        bundle = bundle or self._bundle()
        name = f"bench-{bundle.name}"
        run_quietly([self.program, "run", "--detach", "--bundle", str(bundle), name])
        return name

    def exec_true(self, container: str) -> None:
        run_quietly([self.program, "exec", container, "true"])

    def remove(self, container: str) -> None:
        run_quietly([self.program, "delete", "--force", container])


def imports() -> tuple[float, float]:
    """(seconds, resident MiB) of a Python that only imports what every such server needs."""
    script = (
        "import importlib.util\n"
        f"for name in {IMPORTS.split(', ')!r}:\n"
        "    if importlib.util.find_spec(name): __import__(name)\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')][0])\n"
    )
    began_monotonic = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return time.monotonic() - began_monotonic, int(done.stdout) / 1024


def copy_file(source: Path, target: Path) -> float:
    """Seconds that `cp` takes."""
    target.unlink(missing_ok=True)
    began_monotonic = time.monotonic()
    run_quietly(["cp", "--reflink=never", str(source), str(target)])
    return time.monotonic() - began_monotonic


def pipe(shell_command: str) -> float:
    """Seconds until all output of a command has gone through `cat` and a pipe."""
    began_monotonic = time.monotonic()
    with subprocess.Popen(["sh", "-c", f"{shell_command} | cat"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        buffer = bytearray(1 << 16)
        while process.stdout.readinto(buffer):  # type: ignore[attr-defined]
            pass
    return time.monotonic() - began_monotonic
