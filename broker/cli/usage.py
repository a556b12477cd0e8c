"""`cortex usage`: what models were used for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from broker.cli import output
from broker.cli.client import ask
from broker.cli.options import Config, ControlUrl, Json
from broker.errors import Code, CortexError

BY = ("user", "team", "model", "provider", "hour", "day")
COLUMNS = (
    "calls",
    "errors",
    "cached",
    "estimated",
    "input",
    "from cache",
    "to cache",
    "output",
    "USD",
    "mean s",
    "first byte s",
)
NUMBERS = tuple(range(1, len(COLUMNS) + 1))


def usage(
    by: Annotated[str, typer.Option(help=f"Added up by: {', '.join(BY)}.", metavar="WHAT")] = "user",
    user: Annotated[str, typer.Option(help="Only this user's.", metavar="USER")] = "",
    team: Annotated[str, typer.Option(help="Only this team's.", metavar="TEAM")] = "",
    model: Annotated[str, typer.Option(help="Only of this model.", metavar="NAME")] = "",
    provider: Annotated[str, typer.Option(help="Only of this provider.", metavar="NAME")] = "",
    since: Annotated[str, typer.Option("--from", help="From the begin of this hour on, UTC.", metavar="TIME")] = "",
    until: Annotated[str, typer.Option("--to", help="Up to the begin of this hour, UTC.", metavar="TIME")] = "",
    config: Config = None,
    control: ControlUrl = "",
    as_json: Json = False,
) -> None:
    """Show tokens, cost and latency of model calls. Times are written like 2026-01-31 or 2026-01-31T09:00Z."""
    if by not in BY:
        raise CortexError(Code.BAD_REQUEST, f"usage is not added up by {by!r}", hint=f"--by is one of {', '.join(BY)}")
    asked = {"user": user, "team": team, "model": model, "provider": provider, "from": since, "to": until, "by": by}
    query = {name: value for name, value in asked.items() if value}
    told = ask(config, control, lambda client: client.call("GET", "usage", query=query))
    if as_json:
        output.put_json(told)
        return
    if not told["rows"]:
        output.say("no calls")
        return
    rows = [_row(_key(one, by), one) for one in told["rows"]]
    if len(rows) > 1:
        rows.append(_row("all of these", told["total"]))
    output.put(output.table((by, *COLUMNS), rows, right=NUMBERS))


def _key(row: Mapping[str, Any], by: str) -> str:
    key = str(row["key"])
    if by in ("hour", "day"):
        return key[: 16 if by == "hour" else 10].replace("T", " ")
    return key or "-"


def _row(name: str, one: Mapping[str, Any]) -> tuple[Any, ...]:
    counts = ("calls", "errors", "cached", "estimated", "input", "cache_read", "cache_write", "output")
    return (
        name,
        *(one[key] for key in counts),
        f"{one['cost_usd']:.4f}",
        _seconds(one["mean_s"]),
        _seconds(one["mean_ttft_s"]),
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
