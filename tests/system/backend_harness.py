"""What the harnesses of the real isolation plug-ins have in common."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hiverd.contracts.isolation import BackendContext
from hiverd.testing.isolation import Harness


def missing(plugin: str, programs: Sequence[str]) -> str:
    """Why the tests of a plug-in cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return f"the {plugin} plug-in's system tests need root"
    absent = [name for name in programs if shutil.which(name) is None]
    return f"the {plugin} plug-in's system tests need {' and '.join(absent)}" if absent else ""


class BackendHarness(Harness):
    """Folders below `folder`, and a run folder with a short path."""

    mark: ClassVar[str]
    """Begins the run folder's name."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder)
        self.options = options
        self.aliases: dict[str, str] = {}
        self.instance = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        self.run_dir = Path("/run", f"{self.mark}-{self.instance}")

    @property
    def context(self) -> BackendContext:
        return BackendContext(
            instance=self.instance,
            data_dir=self.folder / "data",
            run_dir=self.run_dir,
            options=self.options,
            image_aliases=self.aliases,
        )

    def make_folders(self) -> None:
        for folder in (self.context.data_dir, self.context.run_dir):
            folder.mkdir(mode=0o700, exist_ok=True)

    def remove(self) -> None:
        """Once no sandbox is left."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
