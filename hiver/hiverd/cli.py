# ruff: noqa: PLC0415 -- imports inside functions are the point, see below
"""The command `hiver`. What a subcommand needs is imported when it runs, so that `hiver --help` is instant."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hiverd.cli_common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_SETTINGS,
    end,
    print_table,
    reported,
    server_at,
    server_option,
)
from hiverd.cli_snapshots import snapshots

if TYPE_CHECKING:
    from hiverd.settings import Settings

EXIT_EXEC_FAILED: Final = 125
"""`hiver exec` itself failed; other codes are the command's own. As `env` and `timeout` have it."""

_EPILOG: Final = """\b
Examples:
  hiver doctor                            what this host can do, and what is missing
  hiver serve                             run the server on http://localhost:10000
  hiver ls                                list sandboxes
  hiver exec demo -- python3 -V           run a command in sandbox "demo"
  hiver events demo --follow              watch what it does
  hiver rm demo                           end it
  hiver snapshots ls                      what is kept of sandboxes

\b
Exit codes: 0 success, 1 failure, 2 wrong usage or settings, 3 no server answers.
"""


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Hiver: sandboxes for untrusted code, on your own machine.

    Every setting is also an environment variable and a key of the configuration file: see docs/settings.md.
    """


_config_option: Final = click.option(
    "--config", "config", type=click.Path(path_type=Path), metavar="FILE", help="TOML file with settings."
)


def _settings(config: Path | None, **overrides: Any) -> Settings:
    from hiverd.settings import load_settings

    return load_settings(config, overrides=overrides)


@main.command(
    epilog="\b\nExamples:\n  hiver serve\n  hiver serve --port 8080 --ephemeral\n  hiver serve --config hiver.toml"
)
@_config_option
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 picks one.  [default: 10000]")
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Where images and sandboxes are kept.")
@click.option("--container-backend", type=click.Choice(["auto", "oci", "docker"]), help="How containers are run.")
@click.option("--ephemeral/--no-ephemeral", default=None, help="Remove all sandboxes when the server stops.")
def serve(config: Path | None, **options: Any) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    Sandboxes go on when it stops, and the next start adopts them, unless --ephemeral is given.
    """
    with reported():
        settings = _settings(config, **{f"server.{name}": value for name, value in options.items()})
        from hiverd.app import run

        raise SystemExit(run(settings))


@main.command(epilog="\b\nExamples:\n  hiver doctor\n  hiver doctor && hiver serve")
@_config_option
def doctor(config: Path | None) -> None:
    """Say what this host can do, what is missing, and how to get it.

    Exits with 1 if no way of running containers works, or if the configured one does not.
    """
    from hiverd.doctor import examine

    with reported():
        report = examine(_settings(config))
    click.echo(report.text)
    raise SystemExit(0 if report.healthy else EXIT_FAILED)


@main.command("ls")
@server_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_sandboxes(server_url: str, as_json: bool) -> None:
    """List sandboxes: key, status and id."""
    with reported():
        refs = server_at(server_url).sandboxes()
    if as_json:
        click.echo(json.dumps(refs))
        return
    print_table([("KEY", "STATUS", "ID"), *((ref["key"], ref.get("status", "running"), ref["id"]) for ref in refs)])


def _split_env(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if any(not name or not equals for name, equals, _ in pairs):
        raise click.BadParameter("must be NAME=VALUE")
    return {name: value for name, _, value in pairs}


@main.command(
    "exec",
    epilog="\b\nExamples:\n  hiver exec demo -- ls -l /workspace\n  hiver exec demo -- sh -c 'echo $HOME | wc -c'\n\n"
    "\b\nThe exit code is the command's own; 125 means that it could not be run, 130 that you interrupted it.",
)
@server_option
@click.option("--cwd", metavar="DIR", help="Working directory inside the sandbox.")
@click.option(
    "--env", "env", multiple=True, metavar="NAME=VALUE", callback=_split_env, help="Set a variable; repeatable."
)
@click.argument("key")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(server_url: str, cwd: str | None, env: dict[str, str], key: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in the sandbox KEY and stream its output.

    No shell is involved. Leaving, with Ctrl-C say, kills the command.
    """
    body = {"command": list(command), **({"cwd": cwd} if cwd else {}), **({"env": env} if env else {})}
    with reported(EXIT_EXEC_FAILED):
        for frame in server_at(server_url).exec_stream(key, str(uuid.uuid4()), body):
            if frame["type"] == "exit":
                raise SystemExit(frame["code"])
            stream = sys.stderr if frame["type"] == "stderr" else sys.stdout
            stream.buffer.write(frame["text"].encode("utf-8", "replace"))
            stream.flush()
    end("the connection ended before the command did", EXIT_EXEC_FAILED)


@main.command(epilog="\b\nExamples:\n  hiver events demo\n  hiver events demo --follow --after 120 | jq .type")
@server_option
@click.option("--follow", "-f", is_flag=True, help="Go on with live events until the sandbox ends.")
@click.option("--after", type=click.IntRange(min=0), metavar="ID", help="Only events with a greater id.")
@click.argument("key")
def events(server_url: str, follow: bool, after: int | None, key: str) -> None:
    """Print the events of the sandbox KEY, one JSON object per line."""
    with reported():
        for event in server_at(server_url).events(key, after=after, follow=follow):
            click.echo(json.dumps(event))


@main.command("rm", epilog="\b\nExample:\n  hiver rm demo other")
@server_option
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
def remove(server_url: str, keys: tuple[str, ...]) -> None:
    """Stop and remove sandboxes."""
    with reported():
        server = server_at(server_url)
        for key in keys:
            server.delete(key)
            click.echo(key)


@main.command()
def version() -> None:
    """Print the version."""
    from hiverd import __version__

    click.echo(f"hiver {__version__}")


@main.command("script-worker", hidden=True)
def script_worker() -> None:
    """Run override scripts for the server that started this process. Not for people."""
    from hiverd.egress.script_worker import main as work

    work()


@main.command("mount-server", hidden=True)
@click.argument("folder")
def mount_server(folder: str) -> None:  # noqa: ARG001 -- names it in the list of processes
    """Serve one mount for the server that started this process. Not for people."""
    from hiverd.fuse.worker import main as work

    work()


@main.command("snapshot-worker", hidden=True)
def snapshot_worker() -> None:
    """Capture or restore for the server that started this process. Not for people."""
    from hiverd.snapshots.worker import main as work

    work()


main.add_command(snapshots)

__all__ = ["COMMANDS", "EXIT_EXEC_FAILED", "EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_SETTINGS", "main"]

COMMANDS: Final[dict[str, Callable[..., Any]]] = {
    name: command for name, command in main.commands.items() if not command.hidden
}
"""All subcommands, for the test that holds docs/cli.md true."""
