"""What the FUSE side asks of whatever stands behind a mount's folder (docs/files.md)."""

from __future__ import annotations

from typing import Protocol


class Content(Protocol):
    """Called around each change or look at the folder, by the threads that serve the kernel. Every call may wait for
    the network, and may raise `OSError`, which the workload then gets instead.

    Paths are absolute relative to the mount (`/a/b`), with odd bytes as surrogates (`os.fsdecode`).
    """

    def look_up(self, path: str) -> None:
        """Before the folder is asked about `path`: it is to have that entry if the backend has it."""

    def list(self, path: str) -> None:
        """Before a directory of the folder is read: it is to be complete."""

    def open(self, path: str, *, write: bool, truncate: bool) -> bool:
        """Before a file is opened. True: the content is the one of the last time, so that cached pages are good.

        With `write` and without `truncate` the whole content is there afterwards.
        """

    def read(self, path: str, offset: int, size: int) -> None:
        """Before these bytes are read from the folder's file: they are to be there."""

    def modify(self, path: str) -> None:
        """Before the content of a file changes (write, truncate, allocate): from now on it is pending.

        What changes without a handle (`truncate(2)`) is an `open`, a `modify` and a `close`.
        """

    def close(self, path: str, *, written: bool) -> None:
        """One of the handles that `open` or `created` stand for has gone; `written` if it changed anything.

        Not called for handles whose file was removed or replaced by `unlink` or `rename` meanwhile.
        """

    def created(self, path: str) -> None:
        """A new, empty file is in the folder and open for writing."""

    def make_directory(self, path: str) -> None:
        """Before the folder gets a directory."""

    def symlink(self, path: str, target: str) -> None:
        """Before the folder gets a link."""

    def unlink(self, path: str) -> None:
        """Before a file or a link of the folder goes."""

    def remove_directory(self, path: str) -> None:
        """Before a directory of the folder goes; it is complete then, so `ENOTEMPTY` is the folder's to say."""

    def rename(self, source: str, target: str) -> None:
        """Before the folder renames; what is at `target` is replaced."""
