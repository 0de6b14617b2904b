"""`hiver snapshots`: what the server's snapshot store holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO, cast

import click

from hiverd.cli_common import EXIT_FAILED, end, print_table, reported, server_at, server_option

_version_option = click.option("--version", "version", metavar="VERSION", help="This version.  [default: the newest]")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.group(
    epilog="\b\nExamples:\n  hiver snapshots ls\n  hiver snapshots export demo demo.tar.zst\n"
    "  hiver snapshots import demo-2 demo.tar.zst\n  hiver snapshots fork demo demo-3\n  hiver snapshots rm demo"
)
def snapshots() -> None:
    """List, show, remove, export, import and copy snapshots."""


@snapshots.command("ls")
@server_option
@_json_option
def list_snapshots(server_url: str, as_json: bool) -> None:
    """List snapshots: key, number of versions, and size and time of the newest."""
    with reported():
        entries = server_at(server_url).snapshots()
    if as_json:
        click.echo(json.dumps(entries))
        return
    rows: list[tuple[str, ...]] = [("KEY", "VERSIONS", "BYTES", "CREATED")]
    for entry in entries:
        newest = entry["versions"][0]
        rows.append((entry["key"], str(len(entry["versions"])), str(newest["bytes"]), newest["created_at"]))
    print_table(rows)


@snapshots.command()
@server_option
@_json_option
@click.argument("key")
def show(server_url: str, as_json: bool, key: str) -> None:
    """Show the versions of the snapshot KEY, the newest first."""
    with reported():
        entry = server_at(server_url).snapshot(key)
    if as_json:
        click.echo(json.dumps(entry))
        return
    rows: list[tuple[str, ...]] = [("VERSION", "BYTES", "CREATED", "SHA256")]
    rows += [
        (found["version"], str(found["bytes"]), found["created_at"], found.get("sha256", "unknown"))
        for found in entry["versions"]
    ]
    print_table(rows)


@snapshots.command("rm")
@server_option
@click.option("--version", "version", metavar="VERSION", help="Only this version.  [default: all]")
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
def remove(server_url: str, version: str | None, keys: tuple[str, ...]) -> None:
    """Remove snapshots."""
    with reported():
        server = server_at(server_url)
        for key in keys:
            server.delete_snapshot(key, version)
            click.echo(key)


@snapshots.command()
@server_option
@_version_option
@click.argument("key")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
def export(server_url: str, version: str | None, key: str, file: Path) -> None:
    """Write the archive of the snapshot KEY to FILE, or to standard output if FILE is -.

    It is a tar, compressed with zstd or gzip. FILE appears when all of it is there and its checksum is right.
    """
    if str(file) == "-":
        with reported():
            server_at(server_url).export_snapshot(key, version, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    with reported():
        try:
            with _draft_of(file) as draft:
                server_at(server_url).export_snapshot(key, version, draft)
        except OSError as error:
            end(f"cannot write {file}: {error.strerror}", EXIT_FAILED)
    click.echo(file)


@contextmanager
def _draft_of(file: Path) -> Iterator[BinaryIO]:
    """Becomes the file when all went well; otherwise nothing is left of it. Only its owner may read it."""
    with NamedTemporaryFile(dir=file.parent, prefix=f".{file.name[:100]}.", delete=False) as draft:
        try:
            yield cast("BinaryIO", draft)
            draft.flush()
            Path(draft.name).replace(file)
        except BaseException:
            Path(draft.name).unlink(missing_ok=True)
            raise


@snapshots.command("import")
@server_option
@click.argument("key")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
def import_archive(server_url: str, key: str, file: Path) -> None:
    """Store the archive FILE, or standard input if FILE is -, as the newest version of the snapshot KEY."""
    with reported():
        try:
            source = sys.stdin.buffer if str(file) == "-" else file.open("rb")
        except OSError as error:
            end(f"cannot read {file}: {error.strerror}", EXIT_FAILED)
        with nullcontext(source) if str(file) == "-" else source as content:
            stored = server_at(server_url).import_snapshot(key, cast("BinaryIO", content))
    click.echo(stored["version"])


@snapshots.command()
@server_option
@_version_option
@click.argument("key")
@click.argument("new_key")
def fork(server_url: str, version: str | None, key: str, new_key: str) -> None:
    """Copy the snapshot KEY to NEW_KEY, as its newest version: a sandbox that names that key starts from it."""
    with reported():
        stored = server_at(server_url).fork_snapshot(key, version, new_key)
    click.echo(stored["version"])
