"""The image `host`: this machine's /usr, read-only, under a generated skeleton. Nothing is downloaded.

From the host come /usr and a short list of system files of /etc. Nothing of a user's: /home, /root, /var, /srv,
/opt, /tmp are new and empty, and of /etc no account, key, network or service configuration is taken. With user
namespaces the host's files belong to a stranger, so only what everybody may read can be read.

/usr/local is the host's unless `host_usr_local = false`: it often holds the very interpreters that people want, but an
operator who keeps private tools there can hide it. Blocking calls.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Final

from hiverd.contracts.isolation import Progress

_VERSION: Final = "1"
_FOLDERS: Final = {
    "boot": 0o755, "dev": 0o755, "etc": 0o755, "home": 0o755, "media": 0o755, "mnt": 0o755, "opt": 0o755,
    "proc": 0o555, "root": 0o700, "run": 0o755, "run/lock": 0o1777, "srv": 0o755, "sys": 0o555, "tmp": 0o1777,
    "usr": 0o755, "var": 0o755, "var/cache": 0o755, "var/lib": 0o755, "var/log": 0o755, "var/spool": 0o755,
    "var/tmp": 0o1777, "workspace": 0o755,
}  # fmt: skip
_LINKS: Final = {"var/run": "/run", "var/lock": "/run/lock", "etc/mtab": "../proc/self/mounts"}
_TOP_LEVEL: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Links into /usr on merged-/usr hosts; folders of their own on others."""
_ETC_ALLOWED: Final = (
    "alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "debian_version", "ethertypes", "fonts",
    "gai.conf", "host.conf", "inputrc", "java-*", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias",
    "locale.conf", "localtime", "lsb-release", "magic", "mailcap", "mime.types", "networks", "os-release",
    "pki/ca-trust/extracted", "pki/tls/certs", "pki/tls/cert.pem", "pki/tls/openssl.cnf", "protocols", "python3",
    "python3.*", "rpc", "services", "shells", "ssl/cert.pem", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone",
)  # fmt: skip
_ACCOUNTS: Final = """\
root:x:0:0:root:/root:/bin/{shell}
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP: Final = """\
root:x:0:
daemon:x:1:
adm:x:4:
tty:x:5:
mail:x:8:
shadow:x:42:
utmp:x:43:
staff:x:50:
users:x:100:
nogroup:x:65534:
"""
_NSSWITCH: Final = """\
passwd: files
group: files
shadow: files
hosts: files dns
networks: files
protocols: files
services: files
"""
_PROFILE: Final = """\
export PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"
if [ -n "$BASH_VERSION" ] && [ -r /etc/bash.bashrc ]; then . /etc/bash.bashrc; fi
"""
_MAX_FILE_BYTES: Final = 4 * 1024 * 1024


class HostImage:
    """`folder` is this plug-in's own; the skeleton is made there, and anew whenever the host's /etc files change."""

    def __init__(self, folder: Path, *, usr_local: bool) -> None:
        self._folder = folder
        self._usr_local = usr_local

    @property
    def _root(self) -> Path:
        return self._folder / "root"

    def layers(self) -> tuple[tuple[Path, str], ...]:
        """The skeleton, and the host's folders that are shown read-only on top of it."""
        layers = [(self._root, ""), (Path("/usr"), "usr"), *self._top_level]
        if not self._usr_local and Path("/usr/local").is_dir():
            layers.append((self._folder / "empty-local", "usr/local"))
        return tuple(layers)

    @functools.cached_property
    def _top_level(self) -> list[tuple[Path, str]]:
        """Looked up once: a machine is not turned into a merged-/usr one under a running server."""
        return [(Path("/", name), name) for name in _TOP_LEVEL if _is_plain_folder(Path("/", name))]

    def prepare(self, progress: Progress) -> None:
        """Makes the skeleton if there is none that fits. Whole or not at all."""
        fingerprint = _fingerprint()
        mark = self._folder / "fingerprint"
        if self._root.is_dir() and mark.is_file() and mark.read_text() == fingerprint:
            return
        progress("preparing the image host from this machine's /usr")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._folder / "empty-local").mkdir(mode=0o755, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="new-", dir=self._folder))
        try:
            fresh.chmod(0o755)
            _fill(fresh)
            mark.unlink(missing_ok=True)
            old = Path(tempfile.mkdtemp(prefix="old-", dir=self._folder))
            if self._root.exists():
                # Running sandboxes keep the old one through their overlays.
                self._root.rename(old / "root")
            fresh.rename(self._root)
            mark.write_text(fingerprint)
        finally:
            for leftover in [*self._folder.glob("new-*"), *self._folder.glob("old-*")]:
                shutil.rmtree(leftover, ignore_errors=True)


def _fill(root: Path) -> None:
    for name, mode in _FOLDERS.items():
        (root / name).mkdir()
        (root / name).chmod(mode)
    for name, target in _LINKS.items():
        (root / name).symlink_to(target)
    for name in _TOP_LEVEL:
        host = Path("/", name)
        if host.is_symlink():
            (root / name).symlink_to(os.readlink(host))
        elif host.is_dir():
            (root / name).mkdir()
    _generate_etc(root / "etc")
    for source in _allowed_files():
        _copy(source, root / source.relative_to("/"))


def _generate_etc(etc: Path) -> None:
    shell = "bash" if Path("/bin/bash").exists() else "sh"
    for name, content in {
        "passwd": _ACCOUNTS.format(shell=shell),
        "group": _GROUP,
        "nsswitch.conf": _NSSWITCH,
        "profile": _PROFILE,
        "hosts": "",
        "hostname": "",
        "resolv.conf": "",
        "environment": "",
        "machine-id": "",
    }.items():
        (etc / name).write_text(content)
    shadow = etc / "shadow"
    shadow.write_text("root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n")
    shadow.chmod(0o600)


def _allowed_files() -> list[Path]:
    etc = Path("/etc")
    return sorted(path for pattern in _ETC_ALLOWED for path in etc.glob(pattern))


def _copy(source: Path, target: Path) -> None:
    """Copies what everybody may read, and links as they are; the rest, and all that looks like a key, stays away."""
    status = source.lstat()
    if stat.S_ISLNK(status.st_mode):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(os.readlink(source))
    elif stat.S_ISDIR(status.st_mode):
        if status.st_mode & stat.S_IROTH:
            target.mkdir(parents=True, exist_ok=True)
            for entry in source.iterdir():
                _copy(entry, target / entry.name)
    elif stat.S_ISREG(status.st_mode) and _is_public(source, status):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if status.st_mode & stat.S_IXOTH else 0o644)


def _is_public(source: Path, status: os.stat_result) -> bool:
    if not status.st_mode & stat.S_IROTH or status.st_size > _MAX_FILE_BYTES:
        return False
    if source.suffix in {".key", ".p12", ".pfx"}:
        return False
    return source.suffix not in {".pem", ".crt"} or b"PRIVATE KEY" not in source.read_bytes()


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _fingerprint() -> str:
    """Changes when the skeleton would come out differently."""
    digest = hashlib.sha256(_VERSION.encode())
    for path in _allowed_files():
        status = path.lstat()
        digest.update(f"{path} {status.st_mode} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
