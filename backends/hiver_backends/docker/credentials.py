"""Registry credentials from the user's Docker configuration (`docker login`), helper programs included."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_DEFAULT_REGISTRY: Final = "https://index.docker.io/v1/"
_HELPER_SECONDS: Final = 20.0
_TOKEN_USER: Final = "<token>"  # noqa: S105 -- what helpers say instead of a name


def config_file() -> Path:
    """DOCKER_CONFIG names the folder."""
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")


async def find(registry: str) -> dict[str, str] | None:
    """Credentials for a registry (`host` or `host:port`, empty for the default one); None without any.

    A helper that fails is as good as no credentials: many images need none.
    """
    config = await asyncio.to_thread(_read, config_file())
    helper = helper_for(config, registry)
    if helper is not None:
        return await _ask(helper, registry or _DEFAULT_REGISTRY)
    return stored(config, registry)


def helper_for(config: Mapping[str, Any], registry: str) -> str | None:
    """The program that keeps a registry's credentials."""
    helpers = config.get("credHelpers")
    if isinstance(helpers, Mapping):
        for name in _names(registry):
            if name in helpers:
                return f"docker-credential-{helpers[name]}"
    store = config.get("credsStore")
    return f"docker-credential-{store}" if store else None


def stored(config: Mapping[str, Any], registry: str) -> dict[str, str] | None:
    """Credentials in the file itself."""
    entries = config.get("auths")
    for name in _names(registry):
        entry = entries.get(name) if isinstance(entries, Mapping) else None
        if isinstance(entry, Mapping):
            return _decoded(entry, name)
    return None


def _names(registry: str) -> tuple[str, ...]:
    if not registry:
        return (_DEFAULT_REGISTRY,)
    return (registry, f"https://{registry}", f"http://{registry}", f"https://{registry}/", f"https://{registry}/v1/")


def _decoded(entry: Mapping[str, Any], server: str) -> dict[str, str] | None:
    if entry.get("identitytoken"):
        return {"identitytoken": str(entry["identitytoken"]), "serveraddress": server}
    try:
        name, colon, word = base64.b64decode(str(entry.get("auth", ""))).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return {"username": name, "password": word.rstrip("\0"), "serveraddress": server} if colon else None


def _read(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


async def _ask(helper: str, server: str) -> dict[str, str] | None:
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            helper, "get", stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(_HELPER_SECONDS):
            answer, _ = await process.communicate(server.encode())
        document = json.loads(answer) if process.returncode == 0 else {}
    except (TimeoutError, ValueError):
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _from_helper(document, server)


def _from_helper(document: object, server: str) -> dict[str, str] | None:
    if not isinstance(document, Mapping) or not document.get("Secret"):
        return None
    if document.get("Username") == _TOKEN_USER:
        return {"identitytoken": str(document["Secret"]), "serveraddress": server}
    return {"username": str(document.get("Username")), "password": str(document["Secret"]), "serveraddress": server}
