"""The command line: every verb in one place."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from broker import __version__
from broker.cli import (
    activity,
    attach,
    bench,
    config,
    demo,
    doctor,
    output,
    pool,
    serve,
    session,
    token,
    usage,
    user,
    vault,
)
from broker.errors import CortexError

app = typer.Typer(
    name="cortex",
    help="WebSocket session broker for sandboxed coding agents.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: cortex demo. Then: cortex doctor, cortex serve.",
)
app.command()(serve.serve)
app.command()(demo.demo)
app.add_typer(config.app, name="config")
app.command()(doctor.doctor)
app.add_typer(session.app, name="session")
app.add_typer(user.app, name="user")
app.add_typer(token.app, name="token")
app.add_typer(vault.app, name="vault")
app.add_typer(activity.app, name="activity")
app.command()(pool.pool)
app.command()(usage.usage)
app.command()(attach.attach)
app.command()(bench.bench)


def _version(wanted: bool) -> None:
    if wanted:
        output.put(f"cortex {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb and ends the process: 0, 1 an error, 2 wrong usage, 78 wrong settings, 130 interrupted."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except CortexError as error:
        sys.exit(output.report(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has left
        sys.exit(141)
