"""The three historical shapes of the file API, and directories (PROTOCOL 3.10)."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from hiverd.wire.events import FsRequestEvent, FsResponseEvent
from unit.files.rig import FolderSandbox, client_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")

IDS = (100000, 100001)


@pytest.fixture
def sandbox(tmp_path: Path) -> FolderSandbox:
    root = tmp_path / "root"
    (root / "workspace").mkdir(parents=True)
    return FolderSandbox(root, IDS, [("/workspace", "local"), ("/absent", "gcs")])


@pytest.fixture
async def client(sandbox: FolderSandbox) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(sandbox) as client:
        yield client


@pytest.mark.parametrize("content", [b"", b"hello", os.urandom(3 << 20)])
async def test_write_and_read(client: httpx.AsyncClient, sandbox: FolderSandbox, content: bytes) -> None:
    written = await client.post("/file/workspace/deep/er/file.bin", content=content)
    assert (written.status_code, written.json()) == (
        200,
        {"path": "/workspace/deep/er/file.bin", "bytes": len(content)},
    )
    read = await client.get("/file/workspace/deep/er/file.bin")
    assert read.content == content
    assert read.headers["content-type"] == "application/octet-stream"
    assert read.headers["content-length"] == str(len(content))
    assert read.headers["content-disposition"] == 'attachment; filename="file.bin"'

    info = (sandbox.root / "workspace/deep/er/file.bin").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (*IDS, 0o644)
    for folder in ("workspace/deep", "workspace/deep/er"):
        info = (sandbox.root / folder).stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (*IDS, 0o755)
    assert os.listdir(sandbox.root / "workspace/deep/er") == ["file.bin"]


async def test_modes_do_not_depend_on_the_servers_umask(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    before = os.umask(0o077)
    try:
        assert (await client.post("/file/hiver-new/file", content=b"x")).status_code == 200
    finally:
        os.umask(before)
    assert stat.S_IMODE((sandbox.root / "hiver-new").stat().st_mode) == 0o755
    assert stat.S_IMODE((sandbox.root / "hiver-new/file").stat().st_mode) == 0o644


async def test_overwriting_keeps_mode_and_owner(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    script = sandbox.root / "run.sh"
    script.write_text("a long first version")
    os.chown(script, 100005, 100006)
    script.chmod(0o4755)
    assert (await client.post("/file/run.sh", content=b"short")).status_code == 200
    info = script.stat()
    assert script.read_bytes() == b"short"
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (100005, 100006, 0o755)


@pytest.mark.parametrize(
    "name", ["a b", "100%", "a%2525", "q?x=1", "h#x", "a+b", "ünï", "new\nline", 'quo"te', "\\", "%", "..."]
)
async def test_every_name_is_reachable(client: httpx.AsyncClient, sandbox: FolderSandbox, name: str) -> None:
    from urllib.parse import quote

    url = f"/file/workspace/{quote(name, safe='')}"
    assert (await client.post(url, content=b"x")).json()["path"] == f"/workspace/{name}"
    assert os.listdir(sandbox.root / "workspace") == [name]
    assert (await client.get(url)).content == b"x"
    assert (await client.get("/file", params={"path": f"/workspace/{name}"})).content == b"x"
    listed = (await client.get("/directories", params={"path": "/workspace"})).json()["entries"]
    assert listed == [{"name": name, "path": f"/workspace/{name}", "is_dir": False, "size": 1}]
    assert (await client.delete(url)).status_code == 204
    assert os.listdir(sandbox.root / "workspace") == []


async def test_names_that_are_not_utf8(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    raw = os.fsencode(sandbox.root) + b"/workspace/\xff\xfe"
    with open(raw, "wb") as file:
        file.write(b"odd")
    listed = await client.get("/directories?path=/workspace")
    assert listed.json()["entries"][0]["name"] == "��"
    assert (await client.get("/file?path=/workspace/%FF%FE")).content == b"odd"
    assert (await client.get("/file/workspace/%FF%FE")).content == b"odd"
    assert (await client.delete("/file/workspace/%FF%FE")).status_code == 204
    assert not os.path.exists(raw)


@pytest.mark.parametrize(
    ("offset", "status", "content"),
    [
        ("0", 200, b"hello"),
        ("2", 200, b"llo"),
        ("5", 200, b""),
        ("6", 400, None),
        ("-1", 400, None),
        ("x", 400, None),
        (str(1 << 70), 400, None),
    ],
)
async def test_offset(
    client: httpx.AsyncClient, sandbox: FolderSandbox, offset: str, status: int, content: bytes | None
) -> None:
    (sandbox.root / "f").write_bytes(b"hello")
    answer = await client.get("/file/f", params={"offset": offset})
    assert answer.status_code == status
    if content is None:
        assert "offset" in answer.json()["error"]
    else:
        assert answer.content == content
        assert answer.headers["content-length"] == str(len(content))


@pytest.mark.parametrize("shape", ["url", "query"])
@pytest.mark.parametrize(
    ("path", "status"), [("/nothing", 404), ("/workspace", 404), ("/f/below", 404), ("/fifo", 404), ("/null", 404)]
)
async def test_what_cannot_be_read(
    client: httpx.AsyncClient, sandbox: FolderSandbox, path: str, status: int, shape: str
) -> None:
    (sandbox.root / "f").touch()
    os.mkfifo(sandbox.root / "fifo")
    os.mknod(sandbox.root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    answer = await (client.get(f"/file{path}") if shape == "url" else client.get("/file", params={"path": path}))
    assert answer.status_code == status
    assert path in answer.json()["error"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    ("query", "status"), [({}, 400), ({"path": ""}, 400), ({"path": "f"}, 400), ({"path": "/gone"}, 404)]
)
async def test_query_paths(
    client: httpx.AsyncClient, sandbox: FolderSandbox, method: str, query: dict[str, str], status: int
) -> None:
    (sandbox.root / "f").touch()
    answer = await client.request(method, "/file", params=query)
    assert answer.status_code == status
    assert "path" in answer.json()["error"] or status == 404
    assert (sandbox.root / "f").exists()


@pytest.mark.parametrize("path", ["", "/", "//", "/%2F", "/workspace/..%2F.."])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_empty_paths(client: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await client.request(method, f"/file{path}", content=b"x" if method == "POST" else None)
    assert answer.status_code == 400
    assert "path" in answer.json()["error"]


@pytest.mark.parametrize(("path", "status"), [("/workspace", 400), ("/fifo", 400), ("/f/below", 400), ("/a%00b", 400)])
async def test_what_cannot_be_written(
    client: httpx.AsyncClient, sandbox: FolderSandbox, path: str, status: int
) -> None:
    (sandbox.root / "f").touch()
    os.mkfifo(sandbox.root / "fifo")
    answer = await client.post(f"/file{path}", content=b"x")
    assert answer.status_code == status
    assert answer.json()["error"]
    assert sorted(os.listdir(sandbox.root)) == ["f", "fifo", "workspace"]


async def test_delete(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    (sandbox.root / "full").mkdir()
    (sandbox.root / "full/file").touch()
    (sandbox.root / "link").symlink_to("full/file")
    (sandbox.root / "dangling").symlink_to("/nowhere")
    (sandbox.root / "linkdir").symlink_to("full")
    full = await client.delete("/file/full")
    assert (full.status_code, full.json()["error"]) == (400, "/full: directory not empty")
    for path in ("link", "dangling", "linkdir"):
        assert (await client.delete(f"/file/{path}")).status_code == 204
    assert sorted(os.listdir(sandbox.root)) == ["full", "workspace"]
    assert (await client.delete("/file/full/file")).status_code == 204
    assert (await client.delete("/file/full")).status_code == 204
    assert (await client.delete("/file/full")).status_code == 404


async def test_form(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    """As the clients up to 0.1.23 send it."""
    content = os.urandom(2 << 20)
    answer = await client.post(
        "/file", data={"destination": "/workspace"}, files={"file": ("some/dir/ü %41.bin", content)}
    )
    assert (answer.status_code, answer.json()) == (200, {"path": "/workspace/ü %41.bin", "bytes": len(content)})
    assert (sandbox.root / "workspace/ü %41.bin").read_bytes() == content


PART = b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
DESTINATION = PART % (b"destination", b"", b"/workspace")
FILE = PART % (b"file", b'; filename="f"', b"content")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (FILE + b"--b--\r\n", "destination"),
        (FILE + DESTINATION + b"--b--\r\n", "destination"),
        (PART % (b"destination", b"", b"workspace") + FILE + b"--b--\r\n", "destination"),
        (PART % (b"destination", b"", b"") + FILE + b"--b--\r\n", "destination"),
        (PART % (b"destination", b"", b"/" + b"a" * 9000) + FILE + b"--b--\r\n", "destination"),
        (DESTINATION + b"--b--\r\n", "file"),
        (DESTINATION + PART % (b"file", b"", b"x") + b"--b--\r\n", "file"),
        (DESTINATION + PART % (b"file", b'; filename=".."', b"x") + b"--b--\r\n", "file"),
        (DESTINATION + PART % (b"file", b'; filename="a/"', b"x") + b"--b--\r\n", "file"),
        (DESTINATION + FILE, ""),  # cut after the file
        (DESTINATION + FILE[:-4], ""),  # cut inside the file
        (b"nonsense", ""),
        (b"", ""),
    ],
)
async def test_malformed_forms(client: httpx.AsyncClient, sandbox: FolderSandbox, body: bytes, field: str) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = await client.post("/file", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert answer.json().get("details", {}).get("field", "") == field
    assert os.listdir(sandbox.root / "workspace") == []


async def test_directories(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    (sandbox.root / "b").mkdir()
    (sandbox.root / "a").write_bytes(b"123")
    (sandbox.root / "c").symlink_to("b")
    listed = await client.get("/directories", params={"path": ""})
    assert listed.headers["content-type"] == "application/json; charset=utf-8"
    found = [(entry["name"], entry["path"], entry["is_dir"]) for entry in listed.json()["entries"]]
    assert found == [
        ("a", "/a", False),
        ("absent", "/absent", True),
        ("b", "/b", True),
        ("c", "/c", False),
        ("workspace", "/workspace", True),
    ]
    assert listed.json()["entries"][0]["size"] == 3
    assert listed.json()["entries"][2]["size"] == 0
    assert (await client.get("/directories?path=/c/../b/")).json() == {"entries": []}


@pytest.mark.parametrize(("query", "status"), [("", 400), ("?path=/nothing", 404), ("?path=/f", 400)])
async def test_directories_that_are_none(
    client: httpx.AsyncClient, sandbox: FolderSandbox, query: str, status: int
) -> None:
    (sandbox.root / "f").touch()
    answer = await client.get(f"/directories{query}")
    assert answer.status_code == status
    assert answer.json()["error"]


async def test_large_directories_are_sent_in_batches(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    names = {f"file-{number}" for number in range(3500)}
    for name in names:
        (sandbox.root / "workspace" / name).touch()
    sandbox._mounts = (*sandbox.mounts, ("/workspace/absent", "gcs"), ("/workspace/file-7", "gcs"))
    listed = await client.get("/directories?path=/workspace")
    assert "content-length" not in listed.headers
    entries = [entry["name"] for entry in listed.json()["entries"]]
    assert len(entries) == 3501
    assert set(entries) == names | {"absent"}


@pytest.mark.parametrize(
    ("method", "path", "operation", "error"),
    [
        ("GET", "/file/workspace/f", "read", None),
        ("GET", "/directories?path=/workspace", "read", None),
        ("POST", "/file/workspace/g", "write", None),
        ("DELETE", "/file/workspace/f", "delete", None),
        ("GET", "/file/workspace/none", "read", "no such file"),
        ("GET", "/file/workspace/f?offset=9", "read", "offset"),
        ("POST", "/file/workspace/f/below", "write", "not a directory"),
        ("DELETE", "/file/workspace/none", "delete", "no such file"),
        ("GET", "/directories?path=/workspace/none", "read", "no such file"),
    ],
)
async def test_events_under_a_mount(
    client: httpx.AsyncClient,
    sandbox: FolderSandbox,
    method: str,
    path: str,
    operation: str,
    error: str | None,
) -> None:
    (sandbox.root / "workspace/f").write_bytes(b"x")
    answer = await client.request(method, path)
    assert answer.is_success == (error is None)
    request, response = sandbox.recorded.events
    assert isinstance(request, FsRequestEvent)
    assert isinstance(response, FsResponseEvent)
    assert (request.access, request.mount, request.operation) == ("allowed", "/workspace", operation)
    assert request.path.startswith("/workspace")
    assert (response.backend, response.request_id) == ("local", 1)
    assert response.duration_ms >= 0
    assert (response.error is None) if error is None else (error in (response.error or ""))


async def test_no_events_outside_mounts(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    assert (await client.post("/file/hiver-elsewhere/f", content=b"x")).status_code == 200
    assert (await client.get("/file/hiver-elsewhere/f")).status_code == 200
    assert sandbox.recorded.events == []


async def test_the_description_builds(client: httpx.AsyncClient) -> None:
    from hiverd.files.access import FileAccess
    from unit.files.rig import make_app

    files = FileAccess()
    document = make_app(FolderSandbox(Path("/nowhere")), files).openapi_schema.to_schema()
    files.close()
    routes = {path.rsplit("{key}", 1)[1]: set(methods) for path, methods in document["paths"].items()}
    assert routes == {
        "/file": {"get", "post", "delete"},
        "/file/{path}": {"get", "post", "delete"},
        "/directories": {"get"},
    }
