"""Volumes on disk, one at a time and blocking: what exists, who owns it, how it comes and goes.

    <base>/template-<bytes>.img   what images are copied from
    <base>/images/<id>.img        the disk of a volume of kind `loop`; kind `plain` has none
    <base>/live/<id>/             where it is mounted, or the folder itself
    <base>/owners/<sandbox id>    a symbolic link whose text is the volume's id

A volume belongs to a sandbox exactly while the link exists. It is made last and removed last, so that after a crash at
any moment each volume is either owned and whole, or not owned and removed by the next start.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from hiverd.contracts.errors import InvalidError
from hiverd.files import ext4, loop

Kind = Literal["loop", "plain"]

_SAFE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REMOVE_SECONDS: Final = 600


class VolumeStore:
    """Synchronous and stateless but for the folder it works in; safe from several threads for different volumes."""

    def __init__(self, base: Path, kind: Kind, disk_bytes: int) -> None:
        self.base = base
        self.kind: Kind = kind
        self._disk_bytes = disk_bytes
        self._images = base / "images"
        self._live = base / "live"
        self._owners = base / "owners"
        self._template: ext4.Template | None = None

    def prepare(self) -> None:
        """Makes the folders, and the template for images."""
        for folder in (self.base, self._images, self._live, self._owners):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        path = self._template_path
        for stale in self.base.glob("template-*"):
            if stale != path:
                stale.unlink(missing_ok=True)
        if self.kind == "loop":
            if not path.exists():
                ext4.make_template(path, self._disk_bytes)
            self._loaded_template()

    @property
    def _template_path(self) -> Path:
        return self.base / f"template-{ext4.TEMPLATE_VERSION}-{self._disk_bytes}.img"

    def build(self) -> str:
        """A new volume, mounted and empty but for its folders; its id. On an error nothing is left."""
        volume_id = secrets.token_hex(8)
        folder = self.folder(volume_id)
        try:
            folder.mkdir(mode=0o700)
            if self.kind == "loop":
                image = self._image(volume_id)
                self._loaded_template().copy_to(image)
                loop.mount_new_image(image, folder)
                with suppress(OSError):
                    (folder / "lost+found").rmdir()
                folder.chmod(0o700)
            for name in ("root", "mounts"):
                (folder / name).mkdir(mode=0o700)
        except BaseException:
            self.discard(volume_id)
            raise
        return volume_id

    def _loaded_template(self) -> ext4.Template:
        if self._template is None:
            self._template = ext4.read_template(self._template_path)
        return self._template

    def discard(self, volume_id: str) -> None:
        """Removes a volume whatever is there of it. Idempotent; raises OSError if something stays."""
        folder, image = self.folder(volume_id), self._image(volume_id)
        loop.discard_mounts(folder)
        image.unlink(missing_ok=True)
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            _remove_tree(folder)

    def folder(self, volume_id: str) -> Path:
        return self._live / volume_id

    def used_bytes(self, volume_id: str) -> int:
        """What an image takes on the host's disk."""
        return self._image(volume_id).stat().st_blocks * 512

    def _image(self, volume_id: str) -> Path:
        return self._images / f"{volume_id}.img"

    def own(self, sandbox_id: str, volume_id: str) -> None:
        """Gives a volume to a sandbox. FileExistsError if the sandbox has one."""
        os.symlink(volume_id, self._owner(sandbox_id))

    def disown(self, sandbox_id: str) -> None:
        self._owner(sandbox_id).unlink(missing_ok=True)

    def owned(self, sandbox_id: str) -> str | None:
        """The id of a sandbox's volume."""
        try:
            return os.readlink(self._owner(sandbox_id))
        except FileNotFoundError:
            return None

    def owners(self) -> dict[str, str]:
        """Sandbox id to volume id."""
        found = {}
        for name in os.listdir(self._owners) if self._owners.is_dir() else ():
            volume_id = self.owned(name)
            if volume_id is not None:
                found[name] = volume_id
        return found

    def existing(self) -> set[str]:
        """Ids of all volumes of which anything is left."""
        if not self._images.is_dir() or not self._live.is_dir():
            return set()
        return {name.removesuffix(".img") for name in (*os.listdir(self._images), *os.listdir(self._live))}

    def revive(self, volume_id: str) -> Path | None:
        """The folder of an owned volume, mounted again if it is not (after a reboot); None if its data are gone."""
        folder, image = self.folder(volume_id), self._image(volume_id)
        if not image.exists():
            return folder if (folder / "root").is_dir() else None
        if not loop.is_mount_point(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            loop.mount_image(image, folder)
        return folder

    def _owner(self, sandbox_id: str) -> Path:
        if not _SAFE_ID.fullmatch(sandbox_id):
            raise InvalidError("not a sandbox id")
        return self._owners / sandbox_id


def _remove_tree(folder: Path) -> None:
    """Removes a hostile tree of any depth without following links; `rm` walks by descriptors, like fts(3)."""
    argv = ["rm", "-rf", "--one-file-system", "--", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_REMOVE_SECONDS, check=False)
    if done.returncode:
        raise OSError(f"cannot remove {folder}: {done.stderr.strip()[-300:]}")
