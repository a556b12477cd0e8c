"""`cortex user`: what is kept for one user."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from broker.cli import output
from broker.cli.client import ask
from broker.cli.options import Config, ControlUrl, Json, User, user_id
from broker.errors import Code, CortexError

app = typer.Typer(help="Configuration and credentials of one user.", no_args_is_help=True)
config_app = typer.Typer(help="Sections of a user's configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")
credential_app = typer.Typer(help="A user's own credentials for model providers.", no_args_is_help=True)
app.add_typer(credential_app, name="credential")

Section = Annotated[
    str,
    typer.Argument(metavar="SECTION", help="settings, mcp, plugins, providers, env, workspace, egress or limits."),
]
Provider = Annotated[str, typer.Argument(metavar="PROVIDER", help="A name in [gateway.providers].")]
MAX_INPUT = 4 * 2**20
EGRESS_COLUMNS = (
    *("host", "workspace", "tool", "last", "allowed", "denied", "refused"),
    *("sent", "received", "last_at"),
)
COLUMNS = ("provider", "kind", "mode", "fingerprint", "updated_at", "expires_at", "problem")


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
    _say_applied(user, told)
    output.say(f"stored as version {told['version']}; takes effect: {told['effect'].replace('_', ' ')}")


@credential_app.command("set")
def set_credential(
    user: User,
    provider: Provider,
    kind: Annotated[str, typer.Option(help="api_key, oauth (a token set) or file (the CLI's own file).")] = "api_key",
    mode: Annotated[str, typer.Option(help="gateway or file. Default: what the kind needs.")] = "",
    config: Config = None,
    control: ControlUrl = "",
    as_json: Json = False,
) -> None:
    """Store a credential, read from stdin; returns when running sandboxes have the use of it."""
    path = ("users", user_id(user), "credentials", provider)
    body = {"kind": kind, "mode": mode or None, "value": read_secret(provider)}
    told = ask(config, control, lambda client: client.call("PUT", *path, body=body))
    if as_json:
        output.put_json(told)
        return
    _say_applied(user, told)
    output.say(f"stored with fingerprint {told['fingerprint']}; takes effect: {told['effect'].replace('_', ' ')}")


@credential_app.command("list")
def list_credentials(user: User, config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """List what there is; values are never shown."""
    found = ask(config, control, lambda client: client.call("GET", "users", user_id(user), "credentials"))
    if as_json:
        output.put_json(found)
    elif found["credentials"]:
        rows = [[one[column] or "" for column in COLUMNS] for one in found["credentials"]]
        output.put(output.table(COLUMNS, rows))
    else:
        output.say(f"{user} has none; store one: cortex user credential set {user} PROVIDER < KEYFILE")


@credential_app.command("delete")
def delete_credential(
    user: User, provider: Provider, config: Config = None, control: ControlUrl = "", as_json: Json = False
) -> None:
    """Erase a credential; returns when running sandboxes have lost the use of it."""
    path = ("users", user_id(user), "credentials", provider)
    told = ask(config, control, lambda client: client.call("DELETE", *path))
    if as_json:
        output.put_json(told)
        return
    _say_applied(user, told)
    output.say(f"erased; takes effect: {told['effect'].replace('_', ' ')}")


@app.command("egress")
def egress(user: User, config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """Show which hosts the user's sandboxes wanted, and how to allow those that were denied."""
    found = ask(config, control, lambda client: client.call("GET", "users", user_id(user), "egress"))
    if as_json:
        output.put_json(found)
    elif found["hosts"]:
        output.put(output.table(EGRESS_COLUMNS, [egress_row(one) for one in found["hosts"]], right=range(4, 9)))
        for one in found["hosts"]:
            if one["allow"]:
                output.say(f"{place(one)}: denied; allow it with: {one['allow']}")
    else:
        output.say(f"the sandboxes of {user} have asked for no host since the broker started")


def place(one: Mapping[str, Any]) -> str:
    """Host and port, the port of TLS left out."""
    return str(one["host"]) if one["port"] == 443 else f"{one['host']}:{one['port']}"


def egress_row(one: Mapping[str, Any]) -> list[str]:
    """A line of the table."""
    refused = one["refused_address"] + one["limited"]
    counts = (one["allowed"], one["denied"], refused, one["sent"], one["received"])
    last = one["last"].replace("_", " ")
    return [place(one), one["workspace"], one["tool"], last, *map(str, counts), one["last_at"]]


def _say_applied(user: str, told: Any) -> None:
    for one in told["applied"]:
        effect = ", ".join(f"{part}: {when}" for part, when in one["effect"].items())
        output.say(f"{user}/{one['workspace']}: {one['state']} {effect}".rstrip())


def read_secret(provider: str) -> str:
    """What stdin holds; on a terminal it is asked for and not echoed. Raises ``BAD_REQUEST``."""
    if sys.stdin.isatty():
        return str(typer.prompt(f"credential for {provider}", hide_input=True, err=True))
    data = sys.stdin.buffer.read(MAX_INPUT + 1)
    try:
        if len(data) > MAX_INPUT:
            raise ValueError(f"it has more than {MAX_INPUT} bytes")
        return data.decode()
    except ValueError as error:
        # A decoding error quotes bytes.
        cause = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise CortexError(
            Code.BAD_REQUEST, "cannot read a credential from stdin", cause=cause, hint="give it the key or the file"
        ) from None


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
