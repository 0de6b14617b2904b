"""Reads the settings: defaults, then a TOML file, then the environment, then the command line; each may override."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import inspect

from hiverd.contracts.errors import HiverError, InvalidError
from hiverd.settings.model import AUTO, Settings
from hiverd.strict import build, nearest, parse_json

PREFIX: Final = "HIVER_"
CONFIG_VARIABLE: Final = "HIVER_CONFIG"
FOREIGN_VARIABLES: Final = frozenset({CONFIG_VARIABLE, "HIVER_GATEWAY_URL"})
"""Not settings: the path of the file, and the published client's own variable."""
FOREIGN_PREFIXES: Final = ("HIVER_TEST_", "HIVER_BENCH_")
"""Left to test suites and benchmarks."""

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})

Document = dict[str, dict[str, Any]]


class SettingsError(HiverError):
    """A setting is wrong. The message says where it was given, which one it is, and why."""


def load_settings(
    path: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Loads all settings. Raises `SettingsError`.

    `path` is the TOML file; without it `HIVER_CONFIG` names one, if set. `environ` is the environment, by default the
    process's. `overrides` come from the command line: names such as `server.port`; values of None are not given.
    """
    environ = os.environ if environ is None else environ
    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
    merged: Document = {"images": {name: {"image": alias.image} for name, alias in Settings().images.items()}}
    for layer in (_read_file(path), _read_environment(environ), _read_overrides(overrides or {})):
        for section, table in layer.items():
            merged.setdefault(section, {}).update(table)
    return _with_folders(build(Settings, merged), environ)


def _read_file(path: Path | None) -> Document:
    if path is None:
        return {}
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is not valid TOML: {error}") from error
    document = _spelled_out(document)
    _check(str(path), document)
    return document


def _spelled_out(document: Document) -> Document:
    """Image aliases in their long form: a string is the image alone."""
    images = document.get("images")
    if not isinstance(images, dict):
        return document
    long = {name: {"image": alias} if isinstance(alias, str) else alias for name, alias in images.items()}
    return {**document, "images": long}


def _check(source: str, document: Mapping[str, Any]) -> None:
    try:
        build(Settings, document)
    except InvalidError as error:
        raise SettingsError(f"{source}: {error.message}") from error


def _read_overrides(overrides: Mapping[str, Any]) -> Document:
    layer: Document = {}
    for name, value in overrides.items():
        if value is not None:
            section, _, key = name.partition(".")
            layer.setdefault(section, {})[key] = value
    _check("command line", layer)
    return layer


def environment_names() -> dict[str, tuple[str, str]]:
    """Variable -> (section, key) of every setting. Those of `[server]` have a short name too: HIVER_PORT."""
    names: dict[str, tuple[str, str]] = {}
    for section, table in _sections():
        for field in table.fields if isinstance(table, inspect.StructType) else ():
            names[f"{PREFIX}{section}_{field.name}".upper()] = (section, field.name)
            if section == "server":
                names[f"{PREFIX}{field.name}".upper()] = (section, field.name)
    return names


def _sections() -> list[tuple[str, inspect.Type]]:
    kind = inspect.type_info(Settings)
    assert isinstance(kind, inspect.StructType)  # noqa: S101 -- it is one
    return [(field.name, _plain(field.type)) for field in kind.fields]


def _plain(kind: inspect.Type) -> inspect.Type:
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def _read_environment(environ: Mapping[str, str]) -> Document:
    """Tables come before single keys of theirs, and so are overridden by them: `HIVER_OCI`, `HIVER_OCI_RUNTIME`."""
    layer: Document = {}
    given_by: dict[tuple[str, str], str] = {}
    names = environment_names()
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable in FOREIGN_VARIABLES or variable.startswith(FOREIGN_PREFIXES):
            continue
        for section, table in _read_variable(variable, environ[variable]).items():
            for key, value in table.items():
                other = given_by.setdefault((section, key), variable)
                if variable in names and other != variable and layer[section][key] != value:
                    raise SettingsError(f"{variable}: contradicts {other}, which is the same setting")
                layer.setdefault(section, {})[key] = value
    return layer


def _read_variable(variable: str, text: str) -> Document:
    known = environment_names()
    if variable in known:
        section, key = known[variable]
        layer = {section: {key: _setting_value(variable, text, section, key)}}
    else:
        layer = _read_table_variable(variable, text)
    layer = _spelled_out(layer)
    _check(variable, layer)
    return layer


def _setting_value(variable: str, text: str, section: str, key: str) -> Any:
    table = dict(_sections())[section]
    assert isinstance(table, inspect.StructType)  # noqa: S101 -- environment_names() lists no others
    kind = next(_plain(field.type) for field in table.fields if field.name == key)
    parse = _PARSERS.get(type(kind), _as_text)
    try:
        return parse(text)
    except ValueError as error:
        raise SettingsError(f"{variable}: {error}") from None


def _read_table_variable(variable: str, text: str) -> Document:
    """`HIVER_OCI_RUNTIME=crun` and `HIVER_OCI='{"runtime": "crun"}'`: the tables whose keys are not ours."""
    name = variable.removeprefix(PREFIX).lower()
    tables = [section for section, table in _sections() if isinstance(table, inspect.DictType)]
    for section in tables:
        if name == section:
            return {section: _as_object(variable, text)}
        if name.startswith(f"{section}_"):
            key = name.removeprefix(f"{section}_")
            if section == "images":
                return {section: {key.replace("_", "-"): _as_object(variable, text) if text[:1] == "{" else text}}
            return {section: {key: _guess(text)}}
    known = [*environment_names(), *(f"{PREFIX}{section}".upper() for section in tables)]
    raise SettingsError(f"{variable}: unknown setting, {_nearest_variable(variable, known)}")


def _nearest_variable(variable: str, known: list[str]) -> str:
    ending = nearest(variable.lower(), [name.lower() for name in known])
    return ending.upper().replace("DID YOU MEAN", "did you mean") if "?" in ending else "see docs/settings.md"


def _as_object(variable: str, text: str) -> dict[str, Any]:
    try:
        return _as_table(text)
    except ValueError as error:
        raise SettingsError(f"{variable}: {error}") from None


def _guess(text: str) -> Any:
    """A plug-in's option: JSON where the text is JSON (numbers, true, lists, objects), otherwise the text itself."""
    try:
        value = parse_json(text.encode("utf-8", "surrogateescape"))
    except InvalidError:
        return text
    return text if value is None else value


def _as_text(text: str) -> str:
    return text


def _as_bool(text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise ValueError(f"expected true or false, got {text!r}")


def _as_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected an integer, got {text!r}") from None


def _as_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {text!r}") from None


def _as_list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _as_table(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text.encode("utf-8", "surrogateescape"))
    except InvalidError as error:
        raise ValueError(error.message.replace("the body", "the value")) from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


_PARSERS: Final[Mapping[type[inspect.Type], Callable[[str], Any]]] = {
    inspect.BoolType: _as_bool,
    inspect.IntType: _as_int,
    inspect.FloatType: _as_float,
    inspect.VarTupleType: _as_list,
    inspect.DictType: _as_table,
}


def _with_folders(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Fills in `auto` folders and makes all paths absolute."""
    server = settings.server
    data_dir = _default_data_dir(environ) if server.data_dir == AUTO else _absolute(server.data_dir)
    run_dir = _default_run_dir(environ, data_dir) if server.run_dir == AUTO else _absolute(server.run_dir)
    snapshots = settings.snapshots
    path = data_dir / "snapshots" if snapshots.path == AUTO else _absolute(snapshots.path)
    replace = msgspec.structs.replace
    return replace(
        settings,
        server=replace(server, data_dir=data_dir, run_dir=run_dir),
        files=replace(settings.files, origin_roots=tuple(map(_absolute, settings.files.origin_roots))),
        egress=replace(settings.egress, upstream_ca_files=tuple(map(_absolute, settings.egress.upstream_ca_files))),
        snapshots=replace(snapshots, path=path),
    )


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise SettingsError(f"{path}: {error}") from error


def _default_data_dir(environ: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/hiver")
    base = environ.get("XDG_DATA_HOME", "")
    # The XDG Base Directory Specification: relative values are to be ignored.
    return (Path(base) if base.startswith("/") else _absolute(Path("~/.local/share"))) / "hiver"


def _default_run_dir(environ: Mapping[str, str], data_dir: Path) -> Path:
    if os.geteuid() == 0:
        return Path("/run/hiver")
    base = environ.get("XDG_RUNTIME_DIR", "")
    return Path(base) / "hiver" if base.startswith("/") else data_dir / "run"
