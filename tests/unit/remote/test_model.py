"""Any sequence of operations, then a drain: the backend is what a simple model of a disk says."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hiverd.remote.settings import RemoteSettings
from hiverd.testing.filesystem_fakes import FakeFileSystem
from unit.remote.rig import Mount, mounted

NAMES = st.sampled_from(["/a", "/b", "/d", "/d/a", "/d/b", "/e", "/e/a"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), NAMES, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("patch"), NAMES, st.binary(min_size=1, max_size=9)),
        st.tuples(st.sampled_from(["unlink", "mkdir", "rmdir", "read", "list", "drain", "touch"]), NAMES, st.just(b"")),
        st.tuples(st.just("rename"), NAMES, NAMES),
    ),
    max_size=25,
)
HASTY = RemoteSettings(quiet_seconds=0.001, longest_seconds=0.002, listing_seconds=0, listing_factor=0, stat_seconds=0)


FILE_STEPS = {"write", "patch", "touch", "read", "unlink"}


class Model:
    """A disk, as a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def at(self, path: str) -> Path:
        return self.folder / path[1:]


def apply(mount: Mount, model: Model, step: tuple[str, str, object]) -> None:
    """The same on both; what one refuses, the other must refuse as well."""
    outcomes = []
    for act in (on_mount, on_model):
        try:
            outcomes.append(act(mount if act is on_mount else model, *step))
        except OSError as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1] or all(isinstance(outcome, type) for outcome in outcomes), (step, outcomes)


def on_model(model: Model, name: str, path: str, argument: object) -> object:
    at = model.at(path)
    if name == "write":
        at.write_bytes(argument)
    elif name == "patch":
        with at.open("r+b") as file:
            file.seek(2)
            file.write(argument)
    elif name == "touch":
        if not os.path.lexists(at):
            at.touch()
    elif name == "rename":
        at.rename(model.at(argument))
    elif name in {"unlink", "mkdir", "rmdir"}:
        getattr(at, name)()
    elif name == "list":
        return sorted(os.listdir(at))
    elif name == "read":
        return at.read_bytes()
    return None


def on_mount(mount: Mount, name: str, path: str, argument: object) -> object:
    """What the kernel and the tree of a mount refuse is refused before the folder's `Content` is asked."""
    if name == "drain":
        assert mount.drain().count == 0
        return None
    mount.look_up(path)
    real = mount.real(path)
    if not real.parent.is_dir():
        raise FileNotFoundError(path)
    if name == "rename":
        return rename(mount, path, argument)
    if name in FILE_STEPS:
        return on_file(mount, name, path, argument)
    if name == "list":
        return mount.names(path)
    if (name == "mkdir" and mount.exists(path)) or (name == "rmdir" and real.is_file()):
        raise FileExistsError(path)
    getattr(mount, name)(path)
    return None


def on_file(mount: Mount, name: str, path: str, argument: object) -> object:
    if mount.real(path).is_dir():
        if name == "touch":
            return None
        raise IsADirectoryError(path)
    if name == "read":
        return mount.read(path)
    if name == "patch":
        with mount.open(path, os.O_RDWR) as handle:
            handle.write(argument, 2)
    elif name == "touch":
        mount.open(path, os.O_RDWR | os.O_CREAT).close()
    elif name == "write":
        mount.write(path, argument)
    else:
        mount.unlink(path)
    return None


def rename(mount: Mount, source: str, target: str) -> None:
    """As the tree of a mount does it: what the folder refuses is refused before the backend is told."""
    mount.look_up(target)
    real, other = mount.real(source), mount.real(target)
    if not real.exists() or not other.parent.is_dir() or target.startswith(source + "/"):
        raise FileNotFoundError(source)
    if other.exists() and source != target:
        if real.is_dir() != other.is_dir():
            raise NotADirectoryError(target)
        if other.is_dir():
            mount.content.list(target)
            if os.listdir(other):
                raise OSError(target)
    mount.rename(source, target)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_the_backend_becomes_what_was_done(steps):
    backend = FakeFileSystem()
    with tempfile.TemporaryDirectory() as scratch:
        model = Model(Path(scratch) / "model")
        model.folder.mkdir()
        with mounted(Path(scratch) / "base", backend, HASTY) as mount:
            for path, content in {"/a": b"aaaa", "/d/a": b"dddd"}.items():
                backend.put(path, content)
                model.at(path).parent.mkdir(exist_ok=True)
                model.at(path).write_bytes(content)
            for step in steps:
                apply(mount, model, step)
            assert mount.drain().count == 0
            assert mount.paired()
            wanted = {f"/{path.relative_to(model.folder)}": path for path in model.folder.rglob("*")}
            files = backend.files()
            for path, real in wanted.items():
                if real.is_dir():
                    assert path in backend.objects
                elif real.stat().st_size:
                    assert files[path] == real.read_bytes()
            for path in backend.objects:
                assert path in wanted
            with suppress(FileNotFoundError):
                assert mount.names() == sorted(os.listdir(model.folder))
