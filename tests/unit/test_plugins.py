"""Lookup of plug-ins: lazy, and with errors that say what to install."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from hiverd import plugins
from hiverd.contracts.errors import BackendError, UnsupportedError

GOOD = """
from hiverd.contracts.filesystem import FileSystem
class Files(FileSystem):
    backend = "good"
    def __init__(self):
        import library_that_is_missing_too
Files.__abstractmethods__ = frozenset()
"""
MODULES = {
    "plugin_good": GOOD,
    "plugin_needy": "import library_that_is_missing.part\n",
    "plugin_broken": "1 / 0\n",
    "plugin_stranger": "class Files: pass\nthing = 3\n",
}


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Entry points of file systems that misbehave in every way, beside a good one."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    values = {
        "good": "plugin_good:Files",
        "gcs": "plugin_needy:Files",
        "theirs": "plugin_needy:Files",
        "broken": "plugin_broken:Files",
        "stranger": "plugin_stranger:Files",
        "thing": "plugin_stranger:thing",
        "gone": "plugin_gone.inner:Files",
        "renamed": "plugin_good:Fils",
    }
    points = EntryPoints(EntryPoint(name, value, "hiver.filesystems") for name, value in values.items())
    monkeypatch.setattr(plugins, "entry_points", lambda group: points.select(group=group))
    plugins._found.cache_clear()
    yield
    plugins._found.cache_clear()
    for name in MODULES:
        sys.modules.pop(name, None)


def test_listing_imports_nothing() -> None:
    assert plugins.names("hiver.filesystems") == (
        "broken", "gcs", "gone", "good", "renamed", "stranger", "theirs", "thing",
    )  # fmt: skip
    assert plugins.names("hiver.snapshots") == ()
    assert not set(MODULES) & set(sys.modules)


def test_loading_imports_one() -> None:
    assert plugins.file_system_class("good").backend == "good"
    assert set(MODULES) & set(sys.modules) == {"plugin_good"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gcs",
            "file system backend \"gcs\" needs the Python module library_that_is_missing: pip install 'hiver[gcs]'",
        ),
        (
            "theirs",
            (
                'file system backend "theirs" needs the Python module library_that_is_missing: '
                "install library_that_is_missing"
            ),
        ),
        ("s3", 'file system backend "s3" is not supported by this server yet'),
        (
            "nfs",
            'unknown file system backend "nfs"; installed: broken, gcs, gone, good, renamed, stranger, theirs, thing',
        ),
    ],
)
def test_what_is_missing_is_named(name: str, message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        plugins.file_system_class(name, field="fs[0].backend")
    assert caught.value.message == f"fs[0].backend: {message}"
    assert caught.value.field == "fs[0].backend"
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["broken", "stranger", "thing", "gone", "renamed"])
def test_broken_plugins_are_the_servers_fault(name: str) -> None:
    with pytest.raises(BackendError, match=f"the plug-in {name} "):
        plugins.file_system_class(name)


def test_an_empty_group() -> None:
    with pytest.raises(UnsupportedError, match=r'^unknown isolation "oci"; installed: none$'):
        plugins.isolation_class("oci")
    with pytest.raises(UnsupportedError, match=r'^isolation "docker" is not supported by this server yet$'):
        plugins.isolation_class("docker")
    with pytest.raises(UnsupportedError, match="unknown snapshot store"):
        plugins.snapshot_store_class("local")


def test_a_library_missed_only_at_construction() -> None:
    with pytest.raises(UnsupportedError, match="needs the Python module library_that_is_missing_too"):
        plugins.build(plugins.file_system_class("good"))


def test_groups_are_those_of_the_project(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "pyproject.toml").read_text()
    assert all(f'[project.entry-points."{group}"]' in text for group in plugins.GROUPS)
