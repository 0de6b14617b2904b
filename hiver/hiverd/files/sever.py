"""From native to governed: a folder is rebuilt so that nothing opened through its native mount leads to it any more.

Rules that come later must hold for those who have files and directories of the native mount open: as a working
directory, mapped, or hidden in a socket's queue. So every directory is made anew and its entries are moved over, and
every file that is restricted is copied. What was open then is a removed directory, or a file that nobody else sees.

Beside the folder lies its trash while that goes on. It is flat, so that trees of any depth need few descriptors:

    root-<inode>    the new folder with that inode, until it has changed places with the old one
    old-<handle>    a directory of the old tree, with all below it. Processes may go on changing what is in it.
    out-<handle>    its entries: taken out by renaming, so that nobody but us can name them any more
    new-, copy-     directories and files that are being made
    dead-           directories that somebody keeps filling; nothing that is served leads there
    kept-           the old folder itself: a mount of it may lie below the one to come, and where a mount's own
                    directory was removed, the kernel takes away what is mounted over it

`handle` is the file handle of the new directory that the entries go to, so a crash loses nothing: an entry is in the
new tree or in the trash at every moment, and the next call goes on where this one stopped. Each step is one name below
one open directory, and none follows a link.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from hiverd.files import handles, linux
from hiverd.files.copies import copy_file, copy_metadata

log = logging.getLogger(__name__)

Restricted = Callable[[str], bool]
"""Whether a file is not fully open under the rules to come. The path is relative to the folder."""
Progress = Callable[[int], None]
"""Told how many entries have been moved, now and then."""

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BATCH: Final = 500
_EMPTYING_SECONDS: Final = 5.0
"""How long a directory is emptied that somebody keeps filling."""
_TEMPORARY: Final = ("new-", "copy-")


def trash_of(folder: Path) -> Path:
    """Where the old tree of a folder goes. No mount's folder can have this name (`mounts._folder_name`)."""
    return folder.with_name(f"~{folder.name}")


def sever(folder: Path, restricted: Restricted, progress: Progress = lambda _: None) -> None:
    """Rebuilds a folder that is no longer mounted, or finishes what an earlier call began. Blocks.

    Owners, modes, times and extended attributes stay; files with several names become several files. Must be called
    before the folder is served: what is left in the trash replaces what is in the folder. Raises `OSError`, after which
    it can be called again. The trash stays, with the old folder in it, for as long as the sandbox.
    """
    trash = trash_of(folder)
    with suppress(FileExistsError):
        trash.mkdir(mode=0o700)
    with _opened(trash) as trash_fd:
        severing = _Severing(folder, trash_fd, restricted, progress)
        severing.begin()
        severing.finish()


class _Job(NamedTuple):
    handle: bytes
    """Of the new directory."""
    path: str
    """Of the new directory, below the folder."""


class _Severing:
    def __init__(self, folder: Path, trash_fd: int, restricted: Restricted, progress: Progress) -> None:
        self._folder = folder
        self._trash = trash_fd
        self._restricted = restricted
        self._progress = progress
        self._jobs: list[_Job] = []
        self._moved = 0

    # -- beginning ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Exchanges the folder for a new one, unless an earlier call has."""
        left = os.listdir(self._trash)
        for name in left:
            if name.startswith(_TEMPORARY):
                _remove(self._trash, name)
        roots = [name for name in left if name.startswith("root-")]
        handles_left = {name[4:] for name in left if name.startswith(("old-", "out-"))}
        exchanged = [name for name in roots if not self._is_new_root(name)]
        if not exchanged and not handles_left:
            for name in roots:
                os.rmdir(name, dir_fd=self._trash)
            exchanged = [self._exchange()]
        with _opened(self._folder) as new:
            for name in exchanged:
                self._queue(name, self._trash, new, "")
            self._jobs += [
                _Job(handle, self._path_of(handle, new)) for handle in map(bytes.fromhex, sorted(handles_left))
            ]

    def _is_new_root(self, name: str) -> bool:
        found = os.stat(name, dir_fd=self._trash, follow_symlinks=False)
        return found.st_ino == int(name.removeprefix("root-"))

    def _exchange(self) -> str:
        with _opened(self._folder) as old:
            made = self._make_directory(old)
        inode = os.stat(made, dir_fd=self._trash, follow_symlinks=False).st_ino
        name = f"root-{inode}"
        os.rename(made, name, src_dir_fd=self._trash, dst_dir_fd=self._trash)
        linux.exchange(self._trash, name, self._folder)
        return name

    def _queue(self, name: str, directory: int, new: int, path: str) -> None:
        """A directory of the old tree gets its turn later: it goes to the trash, named after its new one."""
        job = _Job(handles.of(new), path)
        os.rename(name, f"old-{job.handle.hex()}", src_dir_fd=directory, dst_dir_fd=self._trash)
        self._jobs.append(job)

    def _path_of(self, handle: bytes, root: int) -> str:
        """By going up, which in the new tree nobody interferes with."""
        names: list[str] = []
        top = os.fstat(root).st_ino
        current = handles.open_directory(root, handle)
        try:
            while (inode := os.fstat(current).st_ino) != top:
                parent = os.open("..", _DIRECTORY, dir_fd=current)
                os.close(current)
                current = parent
                names.append(next(entry.name for entry in _entries(current) if entry.inode() == inode))
        finally:
            os.close(current)
        return "/".join(reversed(names))

    # -- moving over --------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        while self._jobs:
            job = self._jobs.pop()
            new = handles.open_directory(self._trash, job.handle)
            try:
                self._move_over(job, new)
            finally:
                os.close(new)

    def _move_over(self, job: _Job, new: int) -> None:
        old_name, out_name = f"old-{job.handle.hex()}", f"out-{job.handle.hex()}"
        with suppress(FileExistsError):
            os.mkdir(out_name, 0o700, dir_fd=self._trash)
        before = os.fstat(new)
        with _opened(out_name, self._trash) as out:
            self._take_out(old_name, out, keep=not job.path)
            for name in _names(out):
                self._place(job, name, out, new)
                self._moved += 1
            self._progress(self._moved)
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.rmdir(out_name, dir_fd=self._trash)

    def _take_out(self, old_name: str, out: int, *, keep: bool) -> None:
        """Empties a directory in which others may go on making entries, and removes it, or keeps it out of the way."""
        try:
            old = os.open(old_name, _DIRECTORY, dir_fd=self._trash)
        except FileNotFoundError:  # done before a crash
            return
        try:
            give_up_at = time.monotonic() + _EMPTYING_SECONDS
            while not (self._is_kept(old_name, old) if keep else self._is_removed(old_name)):
                for name in _names(old):
                    _take(name, old, out)
                    if time.monotonic() > give_up_at:
                        log.warning("a process keeps filling a directory that was removed")
                        self._put_aside(old_name, "kept" if keep else "dead")
                        return
        finally:
            os.close(old)

    def _is_removed(self, name: str) -> bool:
        try:
            os.rmdir(name, dir_fd=self._trash)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            return False
        return True

    def _is_kept(self, name: str, directory: int) -> bool:
        if next(_names(directory), None) is not None:
            return False
        self._put_aside(name, "kept")
        return True

    def _put_aside(self, name: str, kind: str) -> None:
        os.rename(name, f"{kind}-{secrets.token_hex(8)}", src_dir_fd=self._trash, dst_dir_fd=self._trash)

    def _place(self, job: _Job, name: str, out: int, new: int) -> None:
        """Moves one entry into its new directory. Done again after a crash, it does the same."""
        found = os.stat(name, dir_fd=out, follow_symlinks=False)
        path = f"{job.path}/{name}" if job.path else name
        if stat.S_ISDIR(found.st_mode):
            self._place_directory(name, path, out, new)
            return
        if stat.S_ISREG(found.st_mode) and (found.st_nlink > 1 or self._restricted(path)):
            copy = f"copy-{secrets.token_hex(8)}"
            copy_file(name, out, copy, self._trash)
            os.rename(copy, name, src_dir_fd=self._trash, dst_dir_fd=new)
            os.unlink(name, dir_fd=out)
            return
        os.rename(name, name, src_dir_fd=out, dst_dir_fd=new)

    def _place_directory(self, name: str, path: str, out: int, new: int) -> None:
        try:
            made_fd = os.open(name, _DIRECTORY, dir_fd=new)  # before a crash
        except FileNotFoundError:
            with _opened(name, out) as old:
                made = self._make_directory(old)
            os.rename(made, name, src_dir_fd=self._trash, dst_dir_fd=new)
            made_fd = os.open(name, _DIRECTORY, dir_fd=new)
        try:
            self._queue(name, out, made_fd, path)
        finally:
            os.close(made_fd)

    def _make_directory(self, like: int) -> str:
        """An empty directory in the trash, with another one's metadata; its name."""
        name = f"new-{secrets.token_hex(8)}"
        os.mkdir(name, 0o700, dir_fd=self._trash)
        with _opened(name, self._trash) as made:
            copy_metadata(like, made)
        return name


def _take(name: str, old: int, out: int) -> None:
    """What was made anew after it had been taken out replaces what was taken, as `mv` would; a file and a directory
    of one name both stay."""
    target = name
    while True:
        try:
            os.rename(name, target, src_dir_fd=old, dst_dir_fd=out)
        except FileNotFoundError:  # its owner was faster
            return
        except OSError as error:
            if error.errno not in {errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST}:
                raise
            target = f"{name[:80]} ({secrets.token_hex(4)})"
        else:
            return


def _names(directory: int) -> Iterator[str]:
    """The names in a directory from which entries are taken meanwhile; those that come meanwhile may be among them."""
    while names := [entry.name for entry in islice(_entries(directory), _BATCH)]:
        yield from names


def _entries(directory: int) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        yield from entries


def _remove(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        os.rmdir(name, dir_fd=directory)


@contextmanager
def _opened(path: str | Path, directory: int | None = None) -> Iterator[int]:
    fd = os.open(path, _DIRECTORY, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)
