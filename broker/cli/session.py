"""`cortex session`: looks at sessions and steers them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from broker.cli import output
from broker.cli.client import ControlClient, ask
from broker.cli.options import Config, ControlUrl, Json, Target, whose

app = typer.Typer(help="List, show, create, stop and delete sessions.", no_args_is_help=True)

PAGE = 500
COLUMNS = ("user", "workspace", "agent", "state", "clients")


@app.command("list")
def list_(config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """List all sessions."""

    async def work(client: ControlClient) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            page = await client.call("GET", "sessions", query={"after": after, "limit": str(PAGE)})
            found += page["sessions"]
            after = page["next"]
            if not after:
                return found

    sessions = ask(config, control, work)
    if as_json:
        output.put_json({"sessions": sessions})
    elif sessions:
        rows = [[one.get(column, "") for column in COLUMNS] for one in sessions]
        output.put(output.table(COLUMNS, rows, right=(4,)))
    else:
        output.say("no sessions; make one: cortex session create USER")


@app.command()
def show(target: Target, config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """Show one session."""
    found = _call(config, control, "GET", target)
    output.put_json(found) if as_json else output.put(output.facts(found))


@app.command()
def create(
    target: Target,
    agent: Annotated[str | None, typer.Option(help="Default: session.default_agent.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until the agent is ready.")] = False,
    config: Config = None,
    control: ControlUrl = "",
    as_json: Json = False,
) -> None:
    """Create a session, or return the one that is there, with an attach token."""
    one = whose(target)
    body = {"user": one.user, "workspace": one.workspace, "agent": agent, "wait": "ready" if wait else None}
    found = ask(config, control, lambda client: client.call("POST", "sessions", body=body))
    output.put_json(found) if as_json else output.put(output.facts(found))


@app.command()
def stop(target: Target, config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """Stop a session's sandbox; its home and journal stay."""
    found = _call(config, control, "POST", target, "stop")
    output.put_json(found) if as_json else output.say(f"{whose(target)} is {found['state']}")


@app.command()
def delete(
    target: Target,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: Config = None,
    control: ControlUrl = "",
    as_json: Json = False,
) -> None:
    """Stop a session and erase its home, journal and tokens."""
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("there is no terminal to ask on; say --yes", param_hint="--yes")
        typer.confirm(f"erase everything of {whose(target)}?", abort=True, err=True)
    found = _call(config, control, "DELETE", target)
    output.put_json(found) if as_json else output.say(f"{whose(target)} is erased")


@app.command()
def timeline(target: Target, config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """Show the last bring-ups, stage by stage."""
    found = _call(config, control, "GET", target, "timeline")
    if as_json:
        output.put_json(found)
    elif found["bringups"]:
        output.put("\n\n".join(output.timeline(bringup) for bringup in found["bringups"]))
    else:
        output.say("it was not brought up since the broker started")


def _call(config: Any, control: str, method: str, target: str, *rest: str) -> Any:
    one = whose(target)
    path = ("sessions", one.user, one.workspace, *rest)
    return ask(config, control, lambda client: client.call(method, *path))
