"""Folders to capture, and captures of them."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from hiverd.snapshots.capture import Capture, Part
from hiverd.snapshots.extracting import Extractor, Limits, Outcome
from hiverd.snapshots.inflating import Inflater
from hiverd.snapshots.reading import TarReader
from hiverd.snapshots.selection import Selection
from hiverd.snapshots.spool import Compression, Span, Spool

LIMITS = Limits(max_members=10_000, max_bytes=1 << 40)


class Taking:
    """A capture under way, of one folder."""

    def __init__(
        self,
        folder: Path,
        archive: Path,
        *,
        place: str = "",
        include: tuple[str, ...] = (),
        compression: Compression = "zstd",
        parts: list[Part] | None = None,
        max_members: int = 10_000,
        max_bytes: int = 1 << 40,
    ) -> None:
        self._archive = archive
        self._file = os.open(archive.with_suffix(".spool"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        spool = Spool(self._file, compression, 1, 2, max_bytes)
        parts = parts or [Part(place=place, folder=str(folder), first_id=os.getuid(), id_count=1)]
        self.capture = Capture(parts, Selection(include), spool, max_members)

    def first(self) -> Taking:
        self.capture.read_all()
        return self

    def again(self) -> Taking:
        self.capture.take(self.capture.compare())
        return self

    def finish(self) -> Path:
        spans: list[Span] = self.capture.finish()
        self._archive.write_bytes(b"".join(os.pread(self._file, span.length, span.offset) for span in spans))
        self.close()
        return self._archive

    def close(self) -> None:
        self.capture.close()
        os.close(self._file)


def extract(archive: Path, target: Path, include: tuple[str, ...] = (), limits: Limits = LIMITS) -> Outcome:
    target.mkdir(exist_ok=True)
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    extractor = Extractor(root, Selection(include), limits)
    try:
        with archive.open("rb", buffering=0) as file, closing(Inflater(file.fileno())) as inflater:
            extractor.extract(TarReader(inflater))
    finally:
        extractor.close()
        os.close(root)
    return extractor.outcome


def look(folder: Path) -> dict[str, tuple[object, ...]]:
    """What there is to see, by name."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (
            oct(status.st_mode),
            status.st_mtime_ns,
            status.st_nlink if path.is_file() else None,
            content,
        )
    return found
