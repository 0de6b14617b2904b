"""The file API in its three historical shapes (PROTOCOL 3.10)."""

from __future__ import annotations

import os

from contract.scenarios.context import Context
from contract.scenarios.registry import scenario

SINCE_DELETE = (0, 1, 20)
SINCE_PATHS = (0, 1, 24)
SINCE_OFFSET = (0, 1, 44)


@scenario()
async def round_trip(context: Context) -> None:
    sandbox = await context.create()
    content = os.urandom(3_000_001)
    answer = await context.write(sandbox, "/workspace/blob.bin", content)
    assert answer["path"] == "/workspace/blob.bin"
    assert answer["bytes"] == len(content)
    assert await context.read(sandbox, "/workspace/blob.bin") == content
    result = await sandbox.exec("wc -c < blob.bin; stat -c '%a %U' blob.bin", cwd="/workspace")
    assert result["stdout"].split() == [str(len(content)), "644", "root"]


@scenario()
async def text_is_sent_as_utf8(context: Context) -> None:
    sandbox = await context.create()
    await context.write(sandbox, "/workspace/text.txt", "grüße 😀\n")
    assert (await sandbox.exec("cat /workspace/text.txt"))["stdout"] == "grüße 😀\n"


@scenario()
async def an_upload_replaces_the_whole_file(context: Context) -> None:
    sandbox = await context.create()
    await context.write(sandbox, "/workspace/f", "a long first version")
    await context.write(sandbox, "/workspace/f", "short")
    assert await context.read(sandbox, "/workspace/f") == b"short"
    await context.write(sandbox, "/workspace/f", "")
    assert await context.read(sandbox, "/workspace/f") == b""


@scenario()
async def odd_names_survive(context: Context) -> None:
    sandbox = await context.create()
    for name in (
        "a b.txt",
        "ünï😀.txt",
        "q?x=1&y#z.txt",
        "100%.txt",
        "a%2Fb.txt",
        "semi;colon.txt",
        "-dash",
        ".hidden",
    ):
        await context.write(sandbox, f"/workspace/{name}", name)
        assert await context.read(sandbox, f"/workspace/{name}") == name.encode(), name
        assert (await sandbox.exec(f"cat -- '/workspace/{name}'"))["stdout"] == name


@scenario()
async def what_the_agent_writes_can_be_read(context: Context) -> None:
    sandbox = await context.create()
    await sandbox.exec("mkdir -p /workspace/out && printf result > /workspace/out/r.txt")
    assert await context.read(sandbox, "/workspace/out/r.txt") == b"result"


@scenario()
async def reading_what_is_not_there_is_404(context: Context) -> None:
    sandbox = await context.create()
    error = await context.error_of(context.read(sandbox, "/workspace/none.txt"))
    assert error.status == 404
    assert error.body["error"]
    directory = await context.error_of(context.read(sandbox, "/workspace"))
    assert directory.status >= 400


@scenario()
async def links_never_lead_to_the_host(context: Context) -> None:
    sandbox = await context.create()
    await sandbox.exec("echo inside > /workspace/passwd; ln -s /../../../../workspace/passwd /workspace/up")
    assert await context.read(sandbox, "/workspace/up") == b"inside\n"
    await sandbox.exec("ln -s /etc/hostname /workspace/name")
    inside = (await sandbox.exec("cat /etc/hostname"))["stdout"].encode()
    assert await context.read(sandbox, "/workspace/name") == inside
    await sandbox.exec("ln -s loop /workspace/loop")
    assert (await context.error_of(context.read(sandbox, "/workspace/loop"))).status >= 400


@scenario(since=SINCE_PATHS)
async def an_upload_makes_its_folders(context: Context) -> None:
    sandbox = await context.create()
    answer = await sandbox.write_file("/workspace/a/b/c/deep.txt", "deep")
    assert answer["path"] == "/workspace/a/b/c/deep.txt"
    assert await sandbox.read_file("/workspace/a/b/c/deep.txt") == b"deep"
    error = await context.error_of(sandbox.write_file("/workspace/a", "is a folder"))
    assert error.status >= 400


@scenario(until=(0, 1, 23))
async def a_destination_must_be_absolute(context: Context) -> None:
    sandbox = await context.create()
    upload = sandbox.upload_file if context.old_family else sandbox.write_file
    assert (await context.error_of(upload("workspace", "x.txt", "x"))).status == 400


@scenario(since=SINCE_DELETE)
async def deleting(context: Context) -> None:
    sandbox = await context.create()
    await sandbox.exec(
        "mkdir -p /workspace/full /workspace/empty && echo x > /workspace/full/f && ln -s full /workspace/link"
    )
    full = await context.error_of(sandbox.delete_file("/workspace/full"))
    assert full.status == 400
    assert "not empty" in str(full)
    for path in ("/workspace/link", "/workspace/full/f", "/workspace/full", "/workspace/empty"):
        await sandbox.delete_file(path)
    assert await sandbox.list_directory("/workspace") == []
    assert (await context.error_of(sandbox.delete_file("/workspace/full/f"))).status == 404


@scenario()
async def directories(context: Context) -> None:
    sandbox = await context.create()
    await sandbox.exec("mkdir sub && printf 12345 > file && printf x > sub/inner && ln -s sub link", cwd="/workspace")
    entries = await sandbox.list_directory("/workspace")
    assert sorted(entries, key=lambda entry: entry["name"]) == [
        {"name": "file", "path": "/workspace/file", "is_dir": False, "size": 5},
        {"name": "link", "path": "/workspace/link", "is_dir": False, "size": entries_size(entries, "link")},
        {"name": "sub", "path": "/workspace/sub", "is_dir": True, "size": 0},
    ]
    root = await sandbox.list_directory("/")
    assert {"name": "workspace", "path": "/workspace", "is_dir": True, "size": 0} in root
    assert (await context.error_of(sandbox.list_directory("/workspace/none"))).status == 404
    assert (await context.error_of(sandbox.list_directory("/workspace/file"))).status >= 400


def entries_size(entries: list[dict[str, object]], name: str) -> object:
    """The size that the server gave for an entry where none is promised."""
    return next(entry["size"] for entry in entries if entry["name"] == name)


@scenario(since=SINCE_OFFSET)
async def reading_from_an_offset(context: Context) -> None:
    sandbox = await context.create()
    await sandbox.write_file("/workspace/f", "0123456789")
    assert await sandbox.read_file("/workspace/f", offset=4) == b"456789"
    assert await sandbox.read_file("/workspace/f", offset=10) == b""
    assert (await context.error_of(sandbox.read_file("/workspace/f", offset=11))).status == 400
