"""`cortex token`: attach tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from broker.cli import output
from broker.cli.client import ask
from broker.cli.options import Config, ControlUrl, Json, Target, seconds, whose

app = typer.Typer(help="Attach tokens.", no_args_is_help=True)


@app.command()
def create(
    target: Target,
    ttl: Annotated[str, typer.Option(metavar="DURATION", help="90s, 15m, 2h. Default: session.token_ttl_s.")] = "",
    config: Config = None,
    control: ControlUrl = "",
    as_json: Json = False,
) -> None:
    """Print an attach token for a session."""
    one = whose(target)
    body = {"ttl_s": seconds(ttl)} if ttl else {}
    path = ("sessions", one.user, one.workspace, "tokens")
    found = ask(config, control, lambda client: client.call("POST", *path, body=body))
    output.put_json(found) if as_json else output.put(found["token"])


@app.command()
def revoke(target: Target, config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """Revoke all attach tokens of a session and close who came in with one."""
    one = whose(target)
    path = ("sessions", one.user, one.workspace, "tokens")
    found = ask(config, control, lambda client: client.call("DELETE", *path))
    output.put_json(found) if as_json else output.say(f"revoked {found['revoked']}, closed {found['closed']}")
