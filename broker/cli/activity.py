"""`cortex activity`: who comes when, what is made of it, and what logs say of the past."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from broker.cli import output
from broker.cli.client import ControlClient, ask
from broker.cli.heatmap import heatmap, named
from broker.cli.options import Config, ControlUrl, Json, user_id
from broker.errors import Code, CortexError

if TYPE_CHECKING:
    from broker.session.replay import Replayed
    from broker.store.activity import Tally

AT_ONCE = 2000
"""Tallies in one call; fewer than 200 bytes each."""
NO_TIME = "-"

File = Annotated[str, typer.Argument(metavar="FILE", help="CSV or JSON lines; - is stdin.")]


class ShowByDefault(TyperGroup):
    """`cortex activity alice` is `cortex activity show alice`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ShowByDefault,
    help="Who comes when: hours of the week, times away, forecasts. `cortex activity [USER]` shows what is known.",
)


@app.command()
def show(
    user: Annotated[str, typer.Argument(metavar="USER", help="One user; by default everybody.")] = "",
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the week.")] = True,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Users that are listed.")] = 20,
    config: Config = None,
    control: ControlUrl = "",
    as_json: Json = False,
) -> None:
    """Show hours of the week, peaks and lead times, of everybody or of one user."""
    if user:
        path = ("activity", "users", user_id(user))
        found = ask(config, control, lambda client: client.call("GET", *path))
    else:
        query = {"limit": str(limit)}
        found = ask(config, control, lambda client: client.call("GET", "activity", query=query))
    if as_json:
        output.put_json(found)
    elif user:
        _one(found, plot)
    else:
        _everybody(found, plot)


def _everybody(found: Mapping[str, Any], plot: bool) -> None:
    if not found["users"]:
        output.say("nobody was active; take over logs: cortex activity import FILE")
        return
    rows = [(one["user"], one["minutes"], one["uses"], _time(one["last_hour_at"])) for one in found["users"]]
    output.put(output.table(("user", "minutes", "uses", "last hour (UTC)"), rows, right=(1, 2)))
    busiest = ", ".join(f"{named(peak['hour_of_week'])} ({peak['value']:.1f})" for peak in found["peaks"])
    told = {
        "known": f"{found['days_known']:.1f} of {found['history_days']} days, {found['uses']} uses",
        "busiest": f"{busiest or NO_TIME} (mean users, UTC)",
        "lead": _lead(found["leads"]),
    }
    output.put("\n" + output.facts(told))
    if plot:
        _draw("users by hour of week (UTC)", found["week"], None)


def _one(found: Mapping[str, Any], plot: bool) -> None:
    if not found["minutes"]:
        output.say(f"{found['user']} was not active lately")
        return
    window, keep, expected = found["window"], found["keep_s"], found["expected"]
    likeliest = ", ".join(f"{named(peak['hour_of_week'])} ({peak['value']:.0%})" for peak in found["peaks"])
    told = {
        "active": f"{found['minutes']} minutes, from {_time(found['first_at'])} to {_time(found['last_at'])} UTC",
        "likeliest": f"{likeliest or NO_TIME} (UTC)",
        "lead": _lead(found["leads"]),
        "comes back": NO_TIME
        if window is None
        else f"{window['start']:.0f} to {window['end']:.0f} min after a use ({window['source']})",
        "times away": f"{found['times_away']:.1f}, of them {found['times_out_of_range']:.1f} longer than 4 h",
        "kept": "no pattern yet" if keep is None else f"{keep / 60:.0f} min after a use",
        "expected": NO_TIME if expected is None else _window(expected),
    }
    output.put(output.facts(told))
    if plot:
        _draw("probability by hour of week (UTC)", found["week"], 1.0)


@app.command("import")
def import_(
    file: File,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only read the file; the broker is not asked.")] = False,
    config: Config = None,
    control: ControlUrl = "",
    as_json: Json = False,
) -> None:
    """Take over logs: lines with a time (ISO 8601 or epoch), a user and maybe a kind.

    CSV with a header, or with the columns time, user, kind; or one JSON object a line. Importing a file again
    changes nothing.
    """
    found = _read(file)
    told: dict[str, Any] = _summary(found)
    if not dry_run:

        async def work(client: ControlClient) -> dict[str, int]:
            sums = {"new": 0, "known": 0, "too_old": 0, "in_future": 0}
            for begin in range(0, len(found), AT_ONCE):
                some = [[t.user, t.minute, t.kind, t.count, t.first, t.last] for t in found[begin : begin + AT_ONCE]]
                answer = await client.call("POST", "activity", "import", body={"tallies": some})
                sums = {name: count + answer[name] for name, count in sums.items()}
            return sums

        told |= ask(config, control, work)
    if as_json:
        output.put_json(told | {"dry_run": dry_run})
        return
    span = f"from {_time(told['from'])} to {_time(told['to'])} UTC" if found else ""
    output.say(f"read {told['entries']} entries of {told['users']} users {span}".rstrip())
    if dry_run:
        output.say("nothing was imported")
    else:
        output.say(
            f"{told['new']} minutes are new, {told['known']} were known, "
            f"{told['too_old']} are too old, {told['in_future']} lie ahead"
        )


@app.command()
def forecast(config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """Show who is expected and what is done, or would be, and how often that was right."""
    found = ask(config, control, lambda client: client.call("GET", "activity", "forecast"))
    if as_json:
        output.put_json(found)
        return
    if found["expected"]:
        rows = [
            (one["user"], _time(one["start"]), _time(one["end"]), f"{one['probability']:.0%}", one["source"], action)
            for one in found["expected"]
            for action in (one["action"],)
        ]
        head = ("user", "from (UTC)", "until (UTC)", "soon", "by", "action")
        output.put(output.table(head, rows, right=(3,)) + "\n")
    counts, waited = found["counts"], found["ready_s"]
    judged = sum(counts.values())
    told = {
        "mode": found["mode"],
        "looked at": f"{found['users']} users, {_time(found['looked_at'])} UTC; {found['days_known']:.1f} days known",
        "came expected": f"{counts['hit']:.0f} of {judged:.0f}, sandboxes waited {waited['hit'] / 60:.0f} min",
        "came unexpected": f"{counts['miss']:.0f}",
        "did not come": f"{counts['wasted']:.0f}, sandboxes waited {waited['wasted'] / 60:.0f} min",
    }
    output.put(output.facts(told))


@app.command()
def replay(
    file: File,
    fallback: Annotated[int, typer.Option(min=0, max=1440, help="Minutes kept without a pattern.")] = 10,
    as_json: Json = False,
) -> None:
    """Compare policies on a log: cold starts, and minutes for which sandboxes wait. Needs no broker."""
    from broker.session.activity_log import uses
    from broker.session.replay import replay as run
    from broker.session.replay import standard

    users = uses(_read(file))
    found = [run(name, policy, users) for name, policy in standard(fallback).items()]
    if as_json:
        output.put_json({"policies": [_figures(one, found[0]) for one in found]})
        return
    rows = [
        (
            one.policy,
            one.cold,
            f"{one.cold_share:.2%}",
            f"{one.cold_p75:.1%}",
            f"{one.idle / 60:.1f}",
            _ratio(one, found),
        )
        for one in found
    ]
    output.put(
        output.table(("policy", "cold", "share", "p75 of users", "idle h", "idle x"), rows, right=(1, 2, 3, 4, 5))
    )
    output.say(f"{found[0].users} users, {found[0].uses} minutes with a use; the first of each user is cold")


def _figures(one: Replayed, base: Replayed) -> dict[str, Any]:
    return {
        "policy": one.policy,
        "users": one.users,
        "uses": one.uses,
        "cold": one.cold,
        "cold_share": one.cold_share,
        "cold_p75": one.cold_p75,
        "idle_minutes": one.idle,
        "idle_ratio": one.idle / base.idle if base.idle else None,
    }


def _ratio(one: Replayed, found: Sequence[Replayed]) -> str:
    return f"{one.idle / found[0].idle:.2f}" if found[0].idle else NO_TIME


def _read(file: str) -> list[Tally]:
    """The log added up by minute. Raises ``BAD_REQUEST``."""
    from broker.session.activity_log import entries, tallies

    if file == "-":
        return tallies(entries(sys.stdin))
    try:
        with Path(file).open(encoding="utf-8", newline="") as lines:
            return tallies(entries(lines))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: str, error: OSError | UnicodeDecodeError) -> CortexError:
    return CortexError(
        Code.BAD_REQUEST, f"cannot read {file}", cause=error, hint="give a file of CSV or JSON lines, UTF-8"
    )


def _summary(found: Sequence[Tally]) -> dict[str, Any]:
    from broker.control.schema import when

    return {
        "entries": sum(tally.count for tally in found),
        "users": len({tally.user for tally in found}),
        "from": when(found[0].minute * 60).isoformat() if found else None,
        "to": when(found[-1].minute * 60).isoformat() if found else None,
    }


def _draw(title: str, week: Sequence[float], most: float | None) -> None:
    output.put(f"\n{title}\n{heatmap(week, most)}")


def _lead(leads: Mapping[str, Any]) -> str:
    if not leads["intents"]:
        return "no word of intent yet"
    times = f", half within {leads['median_s']:.0f} s, 90 % within {leads['p90_s']:.0f} s" if leads["followed"] else ""
    return f"{leads['followed']} of {leads['intents']} came after a word of intent{times}"


def _window(one: Mapping[str, Any]) -> str:
    return f"{_time(one['start'])} to {_time(one['end'])} UTC ({one['source'].replace('_', ' ')})"


def _time(text: str | None) -> str:
    """``2026-01-31 09:05`` of an RFC 3339 time in UTC."""
    return text[:16].replace("T", " ") if text else NO_TIME
