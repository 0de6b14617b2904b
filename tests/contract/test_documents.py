"""The documents tell the truth: every command exists, every link leads somewhere, every contract item has a test."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest

from contract.scenarios.registry import load
from hiverd.cli import main as cli
from support.clients import CLIENTS, install
from support.server import REPOSITORY, Server, clean_environment

pytestmark = pytest.mark.contract

DOCUMENTS: Final = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "tests/contract/README.md")
EXAMPLES: Final = ("quickstart.py", "python_exec_stream.py", "python_exec_tty.py")
NEWEST: Final = "0.1.45"


def _text(document: str) -> str:
    return (REPOSITORY / document).read_text()


def _commands(document: str) -> Iterator[list[str]]:
    """Every command of a shell block or an inline code span that starts with `make` or `hiver`."""
    text = _text(document)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in [*lines, *spans]:
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
        while words and (words[0] == "sudo" or "=" in words[0]):
            words = words[1:]
        if words and words[0] in {"make", "hiver", ".venv/bin/hiver"}:
            yield words


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", _text("Makefile"), re.MULTILINE))


def _options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_exists(document: str) -> None:
    for words in _commands(document):
        if words[0] == "make":
            assert set(words[1:]) <= _targets(), words
            continue
        if len(words) == 1:
            continue
        command = cli.commands.get(words[1])
        assert command is not None, words
        ours = words[2 : words.index("--")] if "--" in words else words[2:]
        used = {word.partition("=")[0] for word in ours if word.startswith("-")}
        assert used <= _options(command), words


def test_the_readme_shows_the_way() -> None:
    shown = [" ".join(words) for words in _commands("README.md")]
    assert shown[0] == "make demo", "the first thing a newcomer reads"
    for needed in ("make test", "make lint", "make bench", ".venv/bin/hiver serve", ".venv/bin/hiver doctor"):
        assert needed in shown


def test_the_makefile_lists_its_targets() -> None:
    shown = subprocess.run(["make", "help"], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for target in ("demo", "setup", "test", "test-fast", "test-clients", "lint", "bench"):
        assert f"make {target} " in shown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    folder = (REPOSITORY / document).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", _text(document)):
        if "://" not in target:
            assert (folder / target).exists(), target


def test_every_contract_item_names_tests_that_exist() -> None:
    """tests/contract/README.md: each row of its tables ends with the tests that hold the item."""
    defined = {f"scenario {name}" for name in load()}
    for path in (REPOSITORY / "tests" / "contract").glob("test_*.py"):
        functions = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        defined |= {f"{path.name} {function.name}" for function in functions}
    rows = [
        line for line in _text("tests/contract/README.md").splitlines() if line.startswith("| ") and "---" not in line
    ]
    named = re.findall(r"`(scenario [\w.]+|test_\w+\.py test_\w+)`", "\n".join(rows))
    assert len(named) > 30
    assert set(named) <= defined, set(named) - defined
    for row in rows:
        if row != "| item | held by |":
            assert re.search(r"`(scenario|test_)", row), row


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run(server: Server, example: str) -> None:
    environment = clean_environment({"HIVER_GATEWAY_URL": server.url, "PYTHONPATH": str(install(NEWEST))})
    done = subprocess.run(
        [str(_python()), "-P", str(REPOSITORY / "examples" / example)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {
        "quickstart.py": "stdout: hello from the sandbox - exit code: 0\n",
        "python_exec_stream.py": "29 is prime\nexit code: 0\n",
        "python_exec_tty.py": "the answer is 42\n",
    }
    assert expected[example] in done.stdout
    assert done.stderr == ""


def _python() -> Path:
    import sys

    return Path(sys.executable)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the demo asks for a password otherwise")
@pytest.mark.timeout(300)
def test_the_demo_runs_and_leaves_nothing() -> None:
    """The demo itself checks for what is left; here for what it says, and that it can be repeated."""
    for _ in range(2):
        done = subprocess.run(
            [str(_python()), str(REPOSITORY / "build" / "demo.py")],
            cwd=REPOSITORY,
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "stdout: hello from the sandbox - exit code: 0" in done.stdout
        assert "All of it works." in done.stdout
    assert (CLIENTS / "demo" / ".version").is_file()
