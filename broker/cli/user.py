"""`cortex user`: what is kept for one user."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from broker.cli import output
from broker.cli.client import ask
from broker.cli.options import Config, ControlUrl, Json, User, user_id
from broker.errors import Code, CortexError

app = typer.Typer(help="Configuration of one user.", no_args_is_help=True)
config_app = typer.Typer(help="Sections of a user's configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")

Section = Annotated[
    str,
    typer.Argument(metavar="SECTION", help="settings, mcp, plugins, providers, env, workspace, egress or limits."),
]
MAX_INPUT = 4 * 2**20


@config_app.command("get")
def get(user: User, section: Section, config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """Print a section as JSON; with --json also its version."""
    path = ("users", user_id(user), "config", section)
    found = ask(config, control, lambda client: client.call("GET", *path))
    output.put_json(found if as_json else found["value"])


@config_app.command("set")
def set_(
    user: User,
    section: Section,
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON, or TOML when named so; - is stdin.")] = "-",
    config: Config = None,
    control: ControlUrl = "",
    as_json: Json = False,
) -> None:
    """Replace a section; returns when running sandboxes have it and says when it takes effect."""
    value = read_value(file)
    path = ("users", user_id(user), "config", section)
    told = ask(config, control, lambda client: client.call("PUT", *path, body=value))
    if as_json:
        output.put_json(told)
        return
    for one in told["applied"]:
        effect = ", ".join(f"{part}: {when}" for part, when in one["effect"].items())
        output.say(f"{user}/{one['workspace']}: {one['state']} {effect}".rstrip())
    output.say(f"stored as version {told['version']}; takes effect: {told['effect'].replace('_', ' ')}")


def read_value(file: str) -> Any:
    """JSON or TOML from a file or stdin. Raises ``BAD_REQUEST``."""
    try:
        data = sys.stdin.buffer.read(MAX_INPUT) if file == "-" else Path(file).read_bytes()
        return tomllib.loads(data.decode()) if file.endswith(".toml") else json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        where = "stdin" if file == "-" else file
        raise CortexError(
            Code.BAD_REQUEST,
            f"cannot read a section from {where}",
            cause=error,
            hint='write JSON, for example {"A": "b"}',
        ) from error
