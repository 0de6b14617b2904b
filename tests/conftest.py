"""Fixtures for every kind of test: a server in a process of its own, and checks that nothing is left of it."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest

from support import leaks
from support.docker import Engine, EngineFailed, SharedEngine
from support.leaks import marks_of, wait_until_clean
from support.plain import plain_client
from support.server import OCI, Backend, Server

MakeServer = Callable[..., Server]

BACKENDS: Final = ("oci", "docker")
NO_DOCKER: Final = "docker cannot be tested here: "


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=[*BACKENDS, "both"],
        default=os.environ.get("HIVER_TEST_BACKEND") or None,
        help="isolation plug-in for all tests with a server; without it: both, and oci where a test is marked so",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whoever has a server has it by a plug-in: one session after the other, so that servers need not change."""
    if "isolated_by" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--backend")
    alone = metafunc.definition.get_closest_marker("oci_alone")
    names = [chosen] if chosen in BACKENDS else ["oci"] if alone is not None and chosen is None else BACKENDS
    metafunc.parametrize("isolated_by", names, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of a plug-in's tests after each other, as one worker has one server at a time; then those without a server.
    Of each, those that take longest come first, so that no worker ends with one while the others have nothing to do."""
    for item in items:
        if any(not marker.args for marker in item.iter_markers("oci_alone")):
            raise pytest.UsageError(f"{item.nodeid}: oci_alone wants its reason")
    items.sort(key=lambda item: (_place_of(item), item.get_closest_marker("slow") is None))


def _place_of(item: pytest.Item) -> int:
    """Of a test's plug-in among them; behind them without one."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return BACKENDS.index(parameters["isolated_by"]) if "isolated_by" in parameters else len(BACKENDS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not tested is said once, where nobody misses it."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = [str(report.longrepr) for report in reports if NO_DOCKER in str(report.longrepr)]
    if reasons:
        reason = reasons[0].partition(NO_DOCKER)[2].rstrip("')")
        terminalreporter.section(f"{len(reasons)} TESTS ON DOCKER WERE SKIPPED", red=True, bold=True)
        terminalreporter.write_line(reason.replace("\\n", "\n"))


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Engine]:
    """The tests' own Docker Engine; all workers share it."""
    try:
        shared = SharedEngine()
        engine = shared.__enter__()
    except EngineFailed as error:
        pytest.skip(f"{NO_DOCKER}{error}")
    leaks.engines.append(engine)
    yield engine
    leaks.engines.remove(engine)
    shared.__exit__()


@pytest.fixture(scope="session")
def isolated_by(request: pytest.FixtureRequest) -> Backend:
    """How the servers of this test isolate."""
    if request.param == "oci":
        return OCI
    engine: Engine = request.getfixturevalue("docker_engine")
    return Backend("docker", engine.host)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, isolated_by: Backend) -> Iterator[Server]:
    """One `hiver serve --ephemeral` for all tests of this worker. Nothing may be left of it."""
    server = Server(tmp_path_factory.mktemp("server"), backend=isolated_by)
    with server:
        marks = marks_of(server.data_dir)
        yield server
        assert server.running, f"the server ended during the tests\n{server.log_tail()}"
    wait_until_clean(marks)


@pytest.fixture
def make_server(tmp_path: Path, isolated_by: Backend) -> Iterator[MakeServer]:
    """Builds further servers, not started. When the test ends, all sandboxes go, also those that were to outlive their
    server, and nothing may be left."""
    made: list[Server] = []

    def make(**options: object) -> Server:
        server = Server(tmp_path / f"server{len(made)}", **{"backend": isolated_by, **options})  # type: ignore[arg-type]
        made.append(server)
        return server

    yield make
    for server in made:
        _end(server)


def _end(server: Server) -> None:
    """Stops a server and, through a last ephemeral start on its data folder, whatever it left running on purpose."""
    server.stop()
    if not server.ephemeral:
        server.ephemeral = True
        server.start()
        server.stop()
    wait_until_clean(marks_of(server.data_dir))


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client on the server."""
    async with plain_client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture
async def new_key(http: httpx.AsyncClient) -> AsyncIterator[Callable[[], str]]:
    """Names for sandboxes; those that exist when the test ends are removed."""
    keys: list[str] = []

    def make() -> str:
        keys.append(f"t-{uuid.uuid4().hex[:12]}")
        return keys[-1]

    yield make
    for key in keys:
        await http.post(f"/controller/v1/shutdown/{key}")
