"""Runs in a process that is killed: `crash_writer.py BASE BACKEND COUNT` writes files through a mount, and says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hiverd.remote.settings import RemoteSettings
from hiverd.testing.filesystem_directory import DirectoryFileSystem
from unit.remote.rig import mounted


def content_of(number: int) -> bytes:
    """Longer than a page, so that a torn one is seen."""
    return b"%06d " % number * 1500


def main() -> None:
    base, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    settings = RemoteSettings(quiet_seconds=0.1, longest_seconds=0.3)
    with mounted(base, DirectoryFileSystem(folder, 0.002), settings) as mount:
        for number in range(count):
            name = f"/f{number:04d}"
            if number % 3 == 0:
                mount.write(name + ".tmp", content_of(number))
                mount.rename(name + ".tmp", name)
            else:
                mount.write(name, content_of(number))
            os.write(1, b"%d\n" % number)
        sys.stdin.read()


if __name__ == "__main__":
    main()
