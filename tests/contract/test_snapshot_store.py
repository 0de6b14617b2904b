"""The routes of the operator's snapshot store, and `hiver snapshots` on them. No sandbox is needed."""

from __future__ import annotations

import gzip
import hashlib
import random
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from contract.raw import error_of
from support.plain import NOBODY
from support.server import HIVER, Server, ServerFailed, clean_environment

pytestmark = [pytest.mark.contract, pytest.mark.oci_alone("no sandbox is made")]

MakeServer = Callable[..., Server]


def archive(size: int = 100_000, seed: int = 1) -> bytes:
    """What begins as an archive does and cannot be compressed."""
    return gzip.compress(random.Random(seed).randbytes(size), 1, mtime=0)


@pytest.fixture
async def key(http: httpx.AsyncClient, new_key: Callable[[], str]) -> AsyncIterator[str]:
    key = new_key()
    yield key
    for name in (key, f"{key}-2"):
        await http.delete(f"/v1/snapshots/{name}")


async def stored(http: httpx.AsyncClient, key: str, data: bytes) -> str:
    """The version."""
    answer = await http.put(f"/v1/snapshots/{key}/archive", content=data)
    assert answer.status_code == 201, answer.text
    document = answer.json()
    assert (document["key"], document["bytes"]) == (key, len(data))
    assert document["sha256"] == hashlib.sha256(data).hexdigest()
    return str(document["version"])


async def test_import_list_export_delete(http: httpx.AsyncClient, key: str) -> None:
    first, second = archive(seed=1), archive(3 << 20, seed=2)
    versions = [await stored(http, key, first), await stored(http, key, second)]
    shown = (await http.get(f"/v1/snapshots/{key}")).json()
    assert [entry["version"] for entry in shown["versions"]] == versions[::-1]
    assert shown["versions"][0]["created_at"].endswith("Z")
    assert shown in (await http.get("/v1/snapshots")).json()
    answer = await http.get(f"/v1/snapshots/{key}/archive")
    assert answer.content == second
    assert answer.headers["content-length"] == str(len(second))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == f'attachment; filename="snapshot-{key}.tar.gz"'
    assert answer.headers["x-hiver-snapshot-version"] == versions[1]
    assert answer.headers["x-hiver-snapshot-sha256"] == hashlib.sha256(second).hexdigest()
    old = await http.get(f"/v1/snapshots/{key}/archive", params={"version": versions[0]})
    assert old.content == first
    assert (await http.delete(f"/v1/snapshots/{key}", params={"version": versions[1]})).status_code == 204
    assert (await http.get(f"/v1/snapshots/{key}/archive")).content == first
    assert (await http.delete(f"/v1/snapshots/{key}")).status_code == 204
    assert key in error_of(await http.get(f"/v1/snapshots/{key}"), 404)


async def test_fork(http: httpx.AsyncClient, key: str) -> None:
    data = archive()
    old = await stored(http, key, data)
    await stored(http, key, archive(seed=2))
    answer = await http.post(f"/v1/snapshots/{key}/fork", json={"to": f"{key}-2"}, params={"version": old})
    assert answer.status_code == 201
    assert answer.json()["key"] == f"{key}-2"
    assert answer.json()["sha256"] == hashlib.sha256(data).hexdigest()
    assert (await http.delete(f"/v1/snapshots/{key}")).status_code == 204
    assert (await http.get(f"/v1/snapshots/{key}-2/archive")).content == data, "a copy of its own"


async def test_what_is_not_there(http: httpx.AsyncClient, key: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/archive"), ("POST", "/fork")):
        body = {"to": f"{key}-2"} if method == "POST" else None
        assert key in error_of(await http.request(method, f"/v1/snapshots/{key}{path}", json=body), 404)
    await stored(http, key, archive())
    for version in ("20200101T000000000000Z-00000000", "../../x", ""):
        answer = await http.get(f"/v1/snapshots/{key}/archive", params={"version": version})
        error_of(answer, 404)
        error_of(await http.delete(f"/v1/snapshots/{key}", params={"version": version}), 404)
    assert (await http.get(f"/v1/snapshots/{key}")).status_code == 200


async def test_what_is_wrong_is_named(http: httpx.AsyncClient, key: str) -> None:
    for bad in ("a%20b", "x" * 65, "%2e%2e", "a%2Fb"):
        answer = await http.put(f"/v1/snapshots/{bad}/archive", content=archive())
        assert answer.status_code in {400, 404}, answer.text
    assert "zstd" in error_of(await http.put(f"/v1/snapshots/{key}/archive", content=b"no archive"), 400)
    assert "zstd" in error_of(await http.put(f"/v1/snapshots/{key}/archive", content=b""), 400)
    await stored(http, key, archive())
    for body in ({"to": key}, {"to": ".."}, {"to": "a/b"}, {}, {"to": 7}, {"to": "x", "and": 1}):
        assert "to" in error_of(await http.post(f"/v1/snapshots/{key}/fork", json=body), 400) or "and" in body
    assert len((await http.get(f"/v1/snapshots/{key}")).json()["versions"]) == 1


async def test_an_upload_that_is_cut_short_leaves_nothing(http: httpx.AsyncClient, key: str) -> None:
    async def half() -> AsyncIterator[bytes]:
        yield archive(2 << 20)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await http.put(f"/v1/snapshots/{key}/archive", content=half())
    error_of(await http.get(f"/v1/snapshots/{key}"), 404)


async def test_web_pages_are_kept_out(http: httpx.AsyncClient, key: str) -> None:
    await stored(http, key, archive())
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/archive"), ("PUT", "/archive"), ("POST", "/fork")):
        answer = await http.request(
            method, f"/v1/snapshots/{key}{path}", headers={"origin": "https://evil.example"}, content=b"{}"
        )
        error_of(answer, 403)
    error_of(await http.get("/v1/snapshots", headers={"host": "evil.example"}), 403)
    assert (await http.get(f"/v1/snapshots/{key}")).status_code == 200


def hiver(server: Server, *arguments: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = clean_environment({"HIVER_GATEWAY_URL": server.url})
    return subprocess.run(
        [HIVER, "snapshots", *arguments], env=environment, capture_output=True, input=data, timeout=60, check=False
    )


def test_the_command_line(server: Server, key: str, tmp_path: Path) -> None:
    data = archive(3 << 20)
    (tmp_path / "in.tar.gz").write_bytes(data)
    first = hiver(server, "import", key, str(tmp_path / "in.tar.gz"))
    assert first.returncode == 0, first.stderr
    second = hiver(server, "import", key, "-", data=archive())
    listed = hiver(server, "ls").stdout.decode()
    [line] = [line.split() for line in listed.splitlines() if line.startswith(f"{key} ")]
    assert line[:3] == [key, "2", str(len(archive()))]
    shown = hiver(server, "show", key).stdout.decode().splitlines()
    assert [line.split()[0] for line in shown] == [
        "VERSION",
        second.stdout.decode().strip(),
        first.stdout.decode().strip(),
    ]
    out = tmp_path / "out.tar.gz"
    assert hiver(server, "export", "--version", first.stdout.decode().strip(), key, str(out)).returncode == 0
    assert out.read_bytes() == data
    assert out.stat().st_mode & 0o777 == 0o600
    assert hiver(server, "export", key, "-").stdout == archive()
    copy = hiver(server, "fork", "--version", first.stdout.decode().strip(), key, f"{key}-2")
    assert copy.returncode == 0, copy.stderr
    assert copy.stdout.decode().strip() in hiver(server, "show", f"{key}-2").stdout.decode()
    assert hiver(server, "export", f"{key}-2", "-").stdout == data
    assert hiver(server, "rm", key).stdout.decode() == f"{key}\n"
    missing = hiver(server, "export", key, str(tmp_path / "none"))
    assert (missing.returncode, sorted(path.name for path in tmp_path.iterdir())) == (1, ["in.tar.gz", "out.tar.gz"])
    assert key.encode() in missing.stderr
    assert b"Traceback" not in missing.stderr
    wrong = [("import", key, "/no/such/file"), ("import", key, "/dev/null"), ("show", key), ("rm", key)]
    for failing in [*wrong, ("fork", key, f"{key}-3"), ("fork", f"{key}-2", "a/b")]:
        failed = hiver(server, *failing)
        assert (failed.returncode, failed.stdout) == (1, b"")
        assert failed.stderr.startswith(b"hiver: ")
        assert failed.stderr.count(b"\n") == 1


def test_bounds_damage_and_bad_settings(make_server: MakeServer, tmp_path: Path) -> None:
    config = '[snapshots]\nmax_mib = 1\npath = "%s"\nkeep = 2\n' % (tmp_path / "kept")
    server = make_server(config=config)
    server.start()
    with httpx.Client(base_url=server.url, timeout=30, verify=NOBODY) as http:
        big = archive(2 << 20)
        assert "max_mib" in error_of(http.put("/v1/snapshots/demo/archive", content=big), 400)
        assert "max_mib" in error_of(http.put("/v1/snapshots/demo/archive", content=iter([big[:9], big[9:]])), 400)
        for number in range(3):
            assert http.put("/v1/snapshots/demo/archive", content=archive(seed=number)).status_code == 201
        assert len(http.get("/v1/snapshots/demo").json()["versions"]) == 2
        [newest] = [
            path
            for path in (tmp_path / "kept/demo").iterdir()
            if path.name == max(p.name for p in path.parent.iterdir())
        ]
        newest.write_bytes(newest.read_bytes()[:-1] + b"!")
        with pytest.raises(httpx.RemoteProtocolError):
            http.get("/v1/snapshots/demo/archive")
        failed = hiver(server, "export", "demo", str(tmp_path / "out"))
        assert failed.returncode != 0
        assert not (tmp_path / "out").exists()
        assert "demo" in error_of(http.post("/v1/snapshots/demo/fork", json={"to": "other"}), 500)
        error_of(http.get("/v1/snapshots/other"), 404)
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('store = "nothing"', "unknown snapshot store"),
        ('store = "remote"', "snapshots.url: is missing"),
        ('store = "remote"\nurl = "gs:/x"', "snapshots.url"),
        ('store = "remote"\nurl = "nonsense://x/y"', 'unknown scheme "nonsense"'),
        ('store = "remote"\nurl = "s3://who:s3cret@bucket/x"', "environment"),
        ('path = "/proc/nothing"', "snapshots.path"),
    ],
)
def test_a_store_that_cannot_be_is_told_at_the_start(make_server: MakeServer, table: str, said: str) -> None:
    server = make_server(config=f"[snapshots]\n{table}\n")
    with pytest.raises(ServerFailed) as failed:
        server.start()
    assert said in str(failed.value)
    assert "s3cret" not in str(failed.value)
    assert "Traceback" not in str(failed.value)
