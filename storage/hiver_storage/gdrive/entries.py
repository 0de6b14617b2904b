"""What Drive's files look like in a mount: their names, links, and documents without bytes. Pure.

Drive knows files by id. A folder may hold several of one name, and a name may hold anything. A mount shows

- each file once: of several with one name the one made last has it, the others are `name (id).ext`, and so is every
  file whose name has more than 255 bytes (a rule that denies `name` should deny `name (*` as well);
- a slash (and NUL, and the names `.` and `..`) as told in `hiver_storage.names`;
- documents of Google's own (`application/vnd.google-apps.*`), which have no bytes, and shortcuts as small read-only
  JSON files that say where the document is (`Plan.gdoc`), as Drive for desktop does;
- symbolic links, which are empty files with the target in their `properties`. Those are seen by every program that uses
  the drive; `appProperties` would be hidden from a mount with another OAuth client.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from msgspec import Struct

from hiver_storage.names import UNDECODABLE, Names
from hiverd.contracts.filesystem import Info

FOLDER: Final = "application/vnd.google-apps.folder"
FIELDS: Final = (
    "id,name,mimeType,size,modifiedTime,createdTime,md5Checksum,headRevisionId,version,parents,trashed,properties,"
    "webViewLink"
)
_GOOGLE: Final = "application/vnd.google-apps."
_SUFFIXES: Final = {
    "document": ".gdoc",
    "spreadsheet": ".gsheet",
    "presentation": ".gslides",
    "drawing": ".gdraw",
    "form": ".gform",
    "map": ".gmap",
    "site": ".gsite",
    "script": ".gscript",
    "shortcut": ".gshortcut",
}
_OTHER_SUFFIX: Final = ".glink"
SUFFIXES: Final = (*_SUFFIXES.values(), _OTHER_SUFFIX)

_NAME_BYTES: Final = 255
_WITH_ID: Final = re.compile(r" \(([A-Za-z0-9_-]{8,})\)(?:\.[^. ]{1,16})?\Z")

_LINK_KEYS: Final = tuple(f"hiverLink{number:02}" for number in range(30))
"""Drive's limits: 30 properties, 124 bytes for the key and the value of each."""
_LINK_BYTES: Final = 124 - len(_LINK_KEYS[0])

_bytes = Names(UNDECODABLE)
_posix = Names("/\0", reserved=lambda name: name in {"", ".", ".."})


def to_drive(shown: str) -> str:
    """The name in Drive of what has this name in the mount."""
    return _posix.decode(_bytes.encode(shown))


def from_drive(name: str) -> str:
    """The inverse of `to_drive`."""
    return _bytes.decode(_posix.encode(name))


class Entry(Struct, frozen=True):
    """A file of Drive."""

    id: str
    name: str
    """In Drive."""
    mime_type: str
    size: int
    modified: datetime
    created: str
    parents: tuple[str, ...]
    trashed: bool
    version: str
    md5: str | None
    link: str | None
    body: bytes | None
    """Of a document of Google's own: what the mount shows."""
    link_keys: tuple[str, ...] = ()

    @property
    def is_dir(self) -> bool:
        return self.mime_type == FOLDER

    @property
    def suffix(self) -> str:
        """What the mount adds to the name."""
        if self.body is None:
            return ""
        return _SUFFIXES.get(self.mime_type.removeprefix(_GOOGLE), _OTHER_SUFFIX)

    @property
    def plain(self) -> str:
        """The name in the mount if no other file claims it."""
        return from_drive(self.name) + self.suffix


def parse(resource: Mapping[str, Any]) -> Entry:
    """A `files` resource with `FIELDS`. `OSError` EIO if it is not one."""
    try:
        mime_type = str(resource.get("mimeType", ""))
        properties = resource.get("properties") or {}
        body = _document(resource) if mime_type.startswith(_GOOGLE) and mime_type != FOLDER else None
        link = _join_link(properties)
        return Entry(
            id=str(resource["id"]),
            name=str(resource["name"]),
            mime_type=mime_type,
            size=0 if link is not None else len(body) if body is not None else int(resource.get("size") or 0),
            modified=datetime.fromisoformat(resource["modifiedTime"]),
            created=str(resource.get("createdTime", "")),
            parents=tuple(resource.get("parents") or ()),
            trashed=bool(resource.get("trashed")),
            version=_version(resource, link),
            md5=resource.get("md5Checksum"),
            link=link,
            body=body,
            link_keys=tuple(key for key in properties if key in _LINK_KEYS),
        )
    except (KeyError, TypeError, ValueError):
        raise OSError(errno.EIO, "Drive described a file in a way that is not understood") from None


def _version(resource: Mapping[str, Any], link: str | None) -> str:
    """Of the content: a rename keeps it. A file that took the place of another one has another version in any case."""
    content = resource.get("headRevisionId") or resource.get("md5Checksum") or f"v{resource.get('version')}"
    return f"{resource['id']}-{content}" + ("" if link is None else f"-link-{link}")


def _document(resource: Mapping[str, Any]) -> bytes:
    shown = {"url": resource.get("webViewLink", ""), "doc_id": resource["id"], "type": resource["mimeType"]}
    return json.dumps(shown, ensure_ascii=False).encode() + b"\n"


def info(entry: Entry, path: str) -> Info:
    version = None if entry.is_dir else entry.version
    return Info(path, 0 if entry.is_dir else entry.size, entry.modified, entry.is_dir, entry.link, version)


# -- links ------------------------------------------------------------------------------------------------------------


def link_properties(target: str) -> dict[str, str]:
    """The target as properties. `OSError` ENAMETOOLONG beyond some 3 KB."""
    data = _bytes.encode(target).encode()
    parts: list[str] = []
    while data:
        end = min(_LINK_BYTES, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:  # not within a character
            end -= 1
        parts.append(data[:end].decode())
        data = data[end:]
    if len(parts) > len(_LINK_KEYS):
        raise OSError(errno.ENAMETOOLONG, "the target of the link is longer than Drive can hold")
    return dict(zip(_LINK_KEYS, parts or [""], strict=False))


def _join_link(properties: Mapping[str, str]) -> str | None:
    if _LINK_KEYS[0] not in properties:
        return None
    return _bytes.decode("".join(properties.get(key, "") for key in _LINK_KEYS))


# -- names ------------------------------------------------------------------------------------------------------------


def by_shown_name(entries: Iterable[Entry]) -> dict[str, Entry]:
    """The files of a folder, or all of some names in it, by what the mount calls them."""
    newest_first = sorted(entries, key=lambda entry: (entry.created, entry.id), reverse=True)
    shown: dict[str, Entry] = {}
    others: list[Entry] = []
    for entry in newest_first:
        if entry.plain in shown or len(os_bytes(entry.plain)) > _NAME_BYTES:
            others.append(entry)
        else:
            shown[entry.plain] = entry
    for entry in others:
        shown.setdefault(_name_with_id(entry), entry)
    return shown


def _name_with_id(entry: Entry) -> str:
    stem, dot, extension = entry.plain.rpartition(".")
    if not stem or " " in extension or not 0 < len(extension) <= 16:
        stem, dot, extension = entry.plain, "", ""
    end = f" ({entry.id}){dot}{extension}"
    kept = os_bytes(stem)[: _NAME_BYTES - len(os_bytes(end))]
    return kept.decode(errors="ignore") + end


def id_in_name(shown: str) -> str | None:
    """The id, if the name could be one that was given one."""
    found = _WITH_ID.search(shown)
    return found[1] if found else None


def drive_names(shown: str) -> list[str]:
    """What a file of this name in the mount can be called in Drive."""
    stems = [shown, *(shown.removesuffix(suffix) for suffix in SUFFIXES if shown.endswith(suffix))]
    return [to_drive(stem) for stem in stems]


def os_bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
