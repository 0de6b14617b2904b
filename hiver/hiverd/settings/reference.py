"""Writes the documentation of the settings from their definitions, so that it cannot be wrong.

python -m hiverd.settings.reference          # rewrites docs/settings.md and config.example.toml
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, inspect

from hiverd.settings.load import CONFIG_VARIABLE, environment_names
from hiverd.settings.model import ImageAlias, Settings

_WIDTH: Final = 118


class Key(Struct, frozen=True):
    """One setting, or (with an empty `name`) one whole table whose keys are not fixed."""

    section: str
    name: str
    type: str
    default: Any
    description: str
    variables: tuple[str, ...]
    """Environment variables, the preferred one first."""


class Section(Struct, frozen=True):
    name: str
    description: str
    keys: tuple[Key, ...]


def sections() -> Iterator[Section]:
    """Every table of the file in order."""
    settings = Settings()
    kind = inspect.type_info(Settings)
    assert isinstance(kind, inspect.StructType)  # noqa: S101 -- it is one
    for field in kind.fields:
        table, description = _unwrapped(field.type)
        if isinstance(table, inspect.StructType):
            keys = tuple(_keys(field.name, table, getattr(settings, field.name)))
            yield Section(field.name, (table.cls.__doc__ or "").strip(), keys)
        else:
            variable = f"HIVER_{field.name}".upper()
            default = getattr(settings, field.name)
            key = Key(field.name, "", "table", default, description, (f"{variable}_<KEY>", variable))
            yield Section(field.name, description, (key,))


def _keys(section: str, table: inspect.StructType, defaults: Struct) -> Iterator[Key]:
    names = environment_names()
    for field in table.fields:
        kind, description = _unwrapped(field.type)
        variables = sorted((name for name, at in names.items() if at == (section, field.name)), key=len)
        yield Key(section, field.name, _type_text(kind), getattr(defaults, field.name), description, tuple(variables))


def _unwrapped(kind: inspect.Type) -> tuple[inspect.Type, str]:
    if isinstance(kind, inspect.Metadata):
        return kind.type, str((kind.extra_json_schema or {}).get("description", ""))
    return kind, ""


def _type_text(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(f"`{value}`" for value in kind.values)
    if isinstance(kind, inspect.VarTupleType):
        return "list of paths" if isinstance(kind.item_type, inspect.CustomType) else "list of strings"
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return f"{'integer' if isinstance(kind, inspect.IntType) else 'number'}{_bounds_text(kind)}"
    names = {
        inspect.StrType: "string",
        inspect.BoolType: "boolean",
        inspect.CustomType: "path",
        inspect.DictType: "table",
    }
    return names[type(kind)]


def _bounds_text(kind: inspect.IntType | inspect.FloatType) -> str:
    signs = ((">", kind.gt), (">=", kind.ge), ("<", kind.lt), ("<=", kind.le))
    bounds = [f"{sign} {bound}" for sign, bound in signs if bound is not None]
    return f" {' and '.join(bounds)}" if bounds else ""


def toml_value(value: Any) -> str:
    """A default as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(name)} = {toml_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, ImageAlias):
        return json.dumps(value.image)
    return json.dumps(str(value))


def example_toml() -> str:
    """`config.example.toml`: every key with its default."""
    lines = _wrapped(
        "Settings of the Hiver server, each with its default. Pass the file with `hiver serve --config FILE` or "
        f"{CONFIG_VARIABLE}. The environment variable in brackets overrides the file, the command line overrides both. "
        "Written by `python -m hiverd.settings.reference`."
    )
    for section in sections():
        lines += ["", *_wrapped(section.description), f"[{section.name}]"]
        for key in section.keys:
            if key.name:
                lines += _wrapped(f"{key.description} [{key.variables[0]}]")
                lines.append(f"{key.name} = {toml_value(key.default)}")
            else:
                lines += [f"{_toml_key(name)} = {toml_value(value)}" for name, value in key.default.items()]
    return "\n".join(lines) + "\n"


def _toml_key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else json.dumps(name)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


_INTRODUCTION: Final = f"""# Settings

Written by `python -m hiverd.settings.reference` from `hiver/hiverd/settings/model.py`; change it there.

Where a setting may come from, the first that gives it wins:

1. the command line (`hiver serve --help`);
2. the environment: `HIVER_<SECTION>_<KEY>`, and for `[server]` also `HIVER_<KEY>`;
3. a TOML file, named by `hiver serve --config FILE` or by `{CONFIG_VARIABLE}`; `config.example.toml` is a complete one;
4. the default.

Lists are comma-separated in the environment; whole tables are JSON objects (`HIVER_IMAGES='{{"python": "host"}}'`).
Relative paths start at the working directory, `~` is the home folder. An unknown key or an unknown variable that
begins with `HIVER_` stops the server with a message that names the nearest known one. Exempt are
`HIVER_GATEWAY_URL`, which belongs to the client, and what begins with `HIVER_TEST_` or `HIVER_BENCH_`.
"""


def markdown() -> str:
    """`docs/settings.md`."""
    parts = [_INTRODUCTION]
    for section in sections():
        parts.append(f"\n## [{section.name}]\n\n{section.description}\n")
        parts.extend(_markdown_key(key) for key in section.keys)
    return "".join(parts)


def _markdown_key(key: Key) -> str:
    variables = ", ".join(f"`{variable}`" for variable in key.variables)
    if not key.name:
        default = ", ".join(f"`{_toml_key(name)} = {toml_value(value)}`" for name, value in key.default.items())
        return f"\nA table of its own keys. Default: {default or 'empty'}. Environment: {variables}.\n"
    default = toml_value(key.default)
    return (
        f"\n### {key.name}\n\n{key.description}\n\nType: {key.type}. Default: `{default}`. Environment: {variables}.\n"
    )


def write(root: Path) -> None:
    """Rewrites both files below the repository's root."""
    (root / "config.example.toml").write_text(example_toml(), encoding="utf-8")
    (root / "docs" / "settings.md").write_text(markdown(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).resolve().parents[3])
