"""Which URLs a remote store takes, and what a library for one is installed with. Pure but for the look at what is
installed."""

from __future__ import annotations

import importlib.util
from typing import Final
from urllib.parse import urlsplit

from msgspec import Struct

from hiverd.contracts.errors import InvalidError, UnsupportedError

FIELD: Final = "snapshots.url"
_EXTRAS: Final = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
"""Scheme -> the module that serves it, and our distribution's extra that brings it."""
WITHOUT_FOLDERS: Final = frozenset({"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oss", "memory"})
"""Where a folder is a part of a name and need not, or must not, be made."""


class Location(Struct, frozen=True):
    """Where snapshots are kept. Holds no credential, so all of it may be shown."""

    url: str
    scheme: str


def location(url: str, *, memory: bool = False) -> Location:
    """Judges a URL. Raises `InvalidError`, or `UnsupportedError` where a library is missing. `memory`: for tests."""
    if not url:
        raise InvalidError(f"{FIELD}: is missing; the store remote needs one, such as gs://bucket/prefix", field=FIELD)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidError(f"{FIELD}: is not a URL, such as gs://bucket/prefix", field=FIELD) from None
    if not parts.scheme or "://" not in url or "::" in url:
        raise InvalidError(f"{FIELD}: is not a URL of the form scheme://place/prefix", field=FIELD)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidError(
            f"{FIELD}: must hold no user, password, ? or #: credentials come from the environment that the library"
            f" for {parts.scheme}:// reads",
            field=FIELD,
        )
    if ".." in parts.path.split("/") or not (parts.netloc + parts.path).strip("/"):
        raise InvalidError(f"{FIELD}: names no place below {parts.scheme}://", field=FIELD)
    if parts.scheme == "file" and (parts.netloc not in {"", "localhost"} or not parts.path.startswith("/")):
        raise InvalidError(f"{FIELD}: must be of the form file:///absolute/path", field=FIELD)
    if parts.scheme == "memory" and not memory:
        raise InvalidError(f"{FIELD}: memory:// forgets everything when the server stops; choose another", field=FIELD)
    _require_library(parts.scheme)
    return Location(url=url.rstrip("/"), scheme=parts.scheme)


def _require_library(scheme: str) -> None:
    module, extra = _EXTRAS.get(scheme, ("fsspec", ""))
    if importlib.util.find_spec(module) is None:
        remedy = f"pip install 'hiver[{extra}]'" if extra else "pip install fsspec"
        raise UnsupportedError(f"{FIELD}: {scheme}:// needs the Python module {module}: {remedy}", field=FIELD)
    from fsspec.registry import get_filesystem_class, known_implementations  # noqa: PLC0415 -- may be missing

    try:
        get_filesystem_class(scheme)
    except ImportError:
        advice = known_implementations.get(scheme, {}).get("err", f"install what serves {scheme}://")
        raise UnsupportedError(f"{FIELD}: {scheme}:// cannot be used yet: {advice}", field=FIELD) from None
    except ValueError:
        raise InvalidError(
            f'{FIELD}: unknown scheme "{scheme[:40]}"; usual ones are gs, s3 and file', field=FIELD
        ) from None
