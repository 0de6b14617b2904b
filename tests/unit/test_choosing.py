"""What `container_backend = "auto"` comes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hiverd import choosing
from hiverd.contracts.errors import HiverError, UnavailableError, UnsupportedError
from hiverd.contracts.isolation import BackendContext, Isolation
from hiverd.testing.fakes import FakeIsolation


class Refusing(FakeIsolation):
    closed = 0

    async def start(self) -> None:
        raise UnavailableError("runc is not installed -> apt-get install runc")

    async def close(self) -> None:
        Refusing.closed += 1


def builder(tmp_path: Path, **classes: type[Isolation] | HiverError) -> Callable[[str], Isolation]:
    def build(name: str) -> Isolation:
        found = classes[name]
        if isinstance(found, HiverError):
            raise found
        context = BackendContext(
            instance="testtest", data_dir=tmp_path, run_dir=tmp_path, options={}, image_aliases={"by": name}
        )
        return found(context)

    return build


async def choose(tmp_path: Path, name: str = "auto", *, occupied: bool = False, **classes: type[Isolation]) -> str:
    build = builder(tmp_path, **classes)
    isolation = await choosing.started(name, build, memory=tmp_path / "isolation", occupied=occupied)
    return isolation.context.image_aliases["by"]


async def test_oci_where_it_works(tmp_path: Path) -> None:
    assert await choose(tmp_path, oci=FakeIsolation, docker=FakeIsolation) == "oci"


async def test_docker_where_oci_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = Refusing.closed
    assert await choose(tmp_path, oci=Refusing, docker=FakeIsolation) == "docker"
    assert Refusing.closed == before + 1
    assert "runc is not installed" in caplog.text


async def test_a_named_one_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"^runc is not installed"):
        await choose(tmp_path, "oci", oci=Refusing, docker=FakeIsolation)


async def test_where_none_works_everybody_says_why(tmp_path: Path) -> None:
    build = builder(tmp_path, oci=Refusing, docker=UnsupportedError("pip install 'hiver[docker]'"))
    with pytest.raises(UnavailableError) as caught:
        await choosing.started("auto", build, memory=tmp_path / "isolation", occupied=False)
    assert "oci: runc is not installed" in caught.value.message
    assert "docker: pip install 'hiver[docker]'" in caught.value.message


async def test_while_there_are_sandboxes_nothing_else_is_tried(tmp_path: Path) -> None:
    assert await choose(tmp_path, oci=Refusing, docker=FakeIsolation) == "docker"
    assert await choose(tmp_path, oci=FakeIsolation, docker=FakeIsolation, occupied=True) == "docker"
    with pytest.raises(UnavailableError):
        await choose(tmp_path, oci=FakeIsolation, docker=Refusing, occupied=True)
    assert await choose(tmp_path, oci=FakeIsolation, docker=FakeIsolation) == "oci"


async def test_a_memory_that_makes_no_sense_is_none(tmp_path: Path) -> None:
    (tmp_path / "isolation").write_text("../../etc")
    assert await choose(tmp_path, oci=FakeIsolation, docker=FakeIsolation, occupied=True) == "oci"
