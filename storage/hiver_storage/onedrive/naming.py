"""What OneDrive's items look like in a mount. Pure.

- Characters and words that OneDrive does not take in names are mapped one to one, as told in `hiver_storage.names`.
- A symbolic link `name` is a file `name.symlink` that holds the target (PROTOCOL 6.4). It is not shown itself; if there
  is a file or folder `name` as well, that one is shown. A mount's own name that ends so gets another end in OneDrive.
- Folders whose name ends so, and files too large to hold a target, are not shown.
- Notebooks, and folders of other people that were added to the drive, are shown as files without content.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

from msgspec import Struct

from hiver_storage.names import CONTROLS, UNDECODABLE, Names
from hiverd.contracts.filesystem import Info

LINK_SUFFIX: Final = ".symlink"
LINK_BYTES: Final = 16 << 10
"""More than a path's 4095 bytes; whatever is larger is no link."""
_WORDS: Final = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9]|\.lock|desktop\.ini)\Z|~\$", re.IGNORECASE)

SELECT: Final = "id,name,size,eTag,cTag,lastModifiedDateTime,file,folder"

_names = Names(
    '"*:<>?/\\|' + CONTROLS + UNDECODABLE,
    first=" ",
    last=" .",
    reserved=lambda name: _WORDS.match(name) is not None,
    inside=("_v", "ti_"),
    reserved_end=lambda name: name.casefold().endswith(LINK_SUFFIX),
)


def encode(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the mount as OneDrive's."""
    return tuple(map(_names.encode, names))


def decode(name: str) -> str:
    """The inverse, of one."""
    return _names.decode(name)


def quoted(names: Sequence[str]) -> str:
    """OneDrive's names as a path in a URL."""
    return "/".join(quote(name, safe="") for name in names)


class Item(Struct, frozen=True):
    """A `driveItem`."""

    id: str
    name: str
    size: int
    modified: datetime
    is_dir: bool
    etag: str
    """Changes with everything; what conditions are about."""
    version: str
    """The `cTag`, which changes with the content alone."""
    download_url: str | None

    @property
    def is_link(self) -> bool:
        """Whether it may be: a target is never empty nor that large."""
        return self.has_link_name and not self.is_dir and 0 < self.size <= LINK_BYTES

    @property
    def has_link_name(self) -> bool:
        return self.name.casefold().endswith(LINK_SUFFIX)


def parse(resource: Mapping[str, Any]) -> Item:
    """`OSError` EIO for what is no `driveItem`."""
    try:
        is_dir = "folder" in resource
        etag = str(resource.get("eTag", ""))
        return Item(
            id=str(resource["id"]),
            name=str(resource.get("name", "")),
            size=0 if is_dir else int(resource.get("size") or 0),
            modified=datetime.fromisoformat(resource["lastModifiedDateTime"]),
            is_dir=is_dir,
            etag=etag,
            version=str(resource.get("cTag") or etag or resource["lastModifiedDateTime"]),
            download_url=resource.get("@microsoft.graph.downloadUrl"),
        )
    except (KeyError, TypeError, ValueError):
        raise OSError(errno.EIO, "OneDrive described an item in a way that is not understood") from None


def info(item: Item, path: str, target: str | None = None) -> Info:
    if target is not None:
        return Info(path, 0, item.modified, is_dir=False, link_target=target, version=item.version)
    return Info(path, item.size, item.modified, item.is_dir, None, None if item.is_dir else item.version)
