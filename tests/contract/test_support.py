"""The helpers themselves: a leak check that finds nothing would let every leak pass."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.scenarios.registry import load
from support.clients import ALL_VERSIONS, DEFAULT_VERSIONS, Driver, ScenarioFailed, selected_versions
from support.leaks import traces, wait_until_clean
from support.waiting import until

pytestmark = [pytest.mark.contract, pytest.mark.system]


@pytest.fixture
def mark() -> str:
    return f"leak{uuid.uuid4().hex[:12]}"


@pytest.fixture
def planted(mark: str, tmp_path: Path) -> Iterator[list[str]]:
    """One leak of several kinds, each bearing the mark."""
    process = subprocess.Popen(["sh", "-c", f": {mark}; read line"], stdin=subprocess.PIPE)
    mount = tmp_path / mark
    mount.mkdir()
    cgroup = next(path for path in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if path.is_dir()) / mark
    subprocess.run(["mount", "-t", "tmpfs", "none", str(mount)], check=True)
    # As `ip netns add` leaves it, without the mount of the folder that its first use on a machine leaves for good.
    namespace = Path("/run/netns") / mark
    namespace.parent.mkdir(exist_ok=True)
    namespace.touch()
    subprocess.run(["unshare", f"--net={namespace}", "true"], check=True)
    cgroup.mkdir()
    yield ["process", "mount", "network namespace", "cgroup"]
    process.communicate()
    subprocess.run(["umount", str(mount)], check=True)
    subprocess.run(["umount", str(namespace)], check=True)
    namespace.unlink()
    cgroup.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes mounts and namespaces")
def test_every_kind_of_leak_is_found(mark: str, planted: list[str]) -> None:
    found = until(lambda: traces([mark]), seconds=5, what="the planted leaks")
    for kind in planted:
        assert any(line.startswith(kind) for line in found), (kind, found)
    with pytest.raises(AssertionError, match=mark):
        wait_until_clean([mark], seconds=0.2)


def test_a_clean_host_is_clean(mark: str) -> None:
    assert traces([mark]) == []


def test_a_failing_scenario_fails_its_test() -> None:
    """The traceback of the client's process names the line that was wrong."""
    with Driver(DEFAULT_VERSIONS[-1], "http://127.0.0.1:9") as driver:
        with pytest.raises(ScenarioFailed, match="connection attempts failed"):
            driver.run("lifecycle.creates_a_ready_sandbox", seconds=20)
        with pytest.raises(ScenarioFailed, match=r"lifecycle\.py.*creates_a_ready_sandbox"):
            driver.run("lifecycle.creates_a_ready_sandbox", seconds=20)
        driver.close()
        with pytest.raises(ScenarioFailed, match="connection attempts failed"):
            driver.run("lifecycle.list_gives_working_handles", seconds=20)


def test_releases_are_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIVER_TEST_CLIENTS", raising=False)
    assert selected_versions() == DEFAULT_VERSIONS
    monkeypatch.setenv("HIVER_TEST_CLIENTS", "all")
    assert selected_versions() == ALL_VERSIONS
    assert len(ALL_VERSIONS) == 30
    monkeypatch.setenv("HIVER_TEST_CLIENTS", "0.1.22, 0.1.45")
    assert selected_versions() == ("0.1.22", "0.1.45")


def test_scenarios_cover_both_families() -> None:
    names = load()
    assert len(names) > 60
    assert any(scenario.covers((0, 1, 15)) and not scenario.covers((0, 1, 20)) for scenario in names.values())
    assert any(scenario.covers((0, 1, 45)) and not scenario.covers((0, 1, 18)) for scenario in names.values())
