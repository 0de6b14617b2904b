# ruff: noqa: PLC0415 -- imports inside functions are the point, see cli.py
"""What all subcommands share: exit codes, errors as one line, the option `--server`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NoReturn

import click

if TYPE_CHECKING:
    from hiverd.cli_client import Server

EXIT_FAILED: Final = 1
EXIT_SETTINGS: Final = 2
EXIT_INTERRUPTED: Final = 130


def end(message: str, exit_code: int) -> NoReturn:
    """One clear line on stderr and an exit code."""
    click.echo(f"hiver: {message}", err=True)
    raise SystemExit(exit_code)


@contextmanager
def reported(exit_code: int | None = None) -> Iterator[None]:
    """Turns the expected failures of a command into one line and an exit code."""
    from hiverd.cli_client import CallError
    from hiverd.contracts.errors import HiverError
    from hiverd.settings import SettingsError

    try:
        yield
    except CallError as error:
        end(error.message, error.exit_code if exit_code is None else exit_code)
    except SettingsError as error:
        end(error.message, EXIT_SETTINGS)
    except HiverError as error:
        end(error.message, EXIT_FAILED if exit_code is None else exit_code)
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


server_option: Final = click.option(
    "--server",
    "server_url",
    envvar="HIVER_GATEWAY_URL",
    default="http://localhost:10000",
    show_default=True,
    show_envvar=True,
    metavar="URL",
    help="The server to talk to.",
)


def server_at(url: str) -> Server:
    from hiverd.cli_client import Server

    return Server(url)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns in line; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
