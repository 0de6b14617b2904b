"""The documentation says what the code does: every setting, event, command and option."""

import re
import tomllib
from pathlib import Path

import click
import msgspec
import pytest

from hiverd import cli
from hiverd.settings import Settings, load_settings
from hiverd.settings.reference import example_toml, markdown, sections
from hiverd.wire.environment import VARIABLES
from hiverd.wire.events import EVENT_CLASSES, SILENT_TYPES, Event, type_of


@pytest.fixture
def root(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.rootpath


@pytest.mark.parametrize(("file", "written"), [("config.example.toml", example_toml), ("docs/settings.md", markdown)])
def test_written_files_are_fresh(root: Path, file: str, written: object) -> None:
    assert callable(written)
    assert (root / file).read_text() == written(), "run: python -m hiverd.settings.reference"


def test_the_example_loads_and_holds_the_defaults(root: Path) -> None:
    path = root / "config.example.toml"
    assert load_settings(path, environ={}) == load_settings(environ={})
    document = tomllib.loads(path.read_text())
    for section in sections():
        keys = {key.name for key in section.keys if key.name}
        assert not keys or document[section.name].keys() == keys
    assert document.keys() == set(Settings.__struct_fields__)


def test_every_setting_is_described(root: Path) -> None:
    text = (root / "docs/settings.md").read_text()
    for section in sections():
        assert f"## [{section.name}]" in text
        assert section.description
        for key in section.keys:
            assert key.description.endswith("."), f"{section.name}.{key.name}"
            assert all(f"`{variable}`" in text for variable in key.variables)


def rows(text: str) -> dict[str, str]:
    """First column -> the rest, of all tables."""
    found = re.findall(r"^\| `([^`]+)`.*?\| (.*)\|$", text, re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("event", EVENT_CLASSES, ids=type_of)
def test_every_event_and_member_is_documented(root: Path, event: type[Event]) -> None:
    members = rows((root / "docs/events.md").read_text())[type_of(event)].split("|")[0]
    documented = re.findall(r"`(\w+)`(\??)", re.sub(r"\([^)]*\)", "", members))
    optional = {field.encode_name for field in msgspec.structs.fields(event) if not field.required}
    assert [name for name, _ in documented] == [field.encode_name for field in msgspec.structs.fields(event)]
    assert {name for name, mark in documented if mark} == optional


def test_no_other_event_is_documented(root: Path) -> None:
    text = (root / "docs/events.md").read_text()
    assert rows(text).keys() == {type_of(event) for event in EVENT_CLASSES}
    silent = text[text.index("All but") :]
    assert set(re.findall(r"`([^`]+)`", silent)) == SILENT_TYPES


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """All of them by their full names; a group counts as what is in it."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix}{name} ")
        elif not command.hidden:
            found[f"{prefix}{name}"] = command
    return found


def test_every_command_and_option_is_documented(root: Path) -> None:
    text = (root / "docs/cli.md").read_text()
    documented_names = set(re.findall(r"^\| `hiver ([a-z]+(?: [a-z]+)?)", text, re.MULTILINE))
    assert documented_names == set(commands(cli.main))
    options = {
        name
        for command in commands(cli.main).values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    documented = set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", text)) - {"--help", "-c", "-m"}
    assert options == documented


def test_exit_codes_are_documented(root: Path) -> None:
    text = (root / "docs/cli.md").read_text()
    for code in (cli.EXIT_FAILED, cli.EXIT_SETTINGS, cli.EXIT_INTERRUPTED):
        assert f"| {code} |" in text
    assert f"with {cli.EXIT_EXEC_FAILED} if the command" in text


def test_every_variable_for_credentials_is_documented(root: Path) -> None:
    table = rows((root / "docs/files.md").read_text())
    for variable, (backend, _) in VARIABLES.items():
        assert f"`{variable}`" in table[backend]
