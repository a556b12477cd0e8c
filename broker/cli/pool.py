"""`cortex pool`: the warm sandboxes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from broker.cli import output
from broker.cli.client import ControlClient, ask
from broker.cli.options import Config, ControlUrl, Json, seconds

COLUMNS = ("agent", "target", "making", "hot", "paused", "ending", "users", "hits", "rate", "each", "state")
NUMBERS = tuple(range(1, len(COLUMNS) - 1))
WHY = {
    "": "full",
    "making": "being made",
    "ending": "old ones are ending",
    "busy": "others go first",
    "rate": "refill_per_s is reached",
    "memory": "no memory",
    "breaker": "cannot be made",
    "maximum": "too many that cannot be ended",
}
CLEAR = "\x1b[H\x1b[2J"


def pool(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until interrupted.")] = False,
    every: Annotated[str, typer.Option(help="With --watch: how often.", metavar="DURATION")] = "2s",
    config: Config = None,
    control: ControlUrl = "",
    as_json: Json = False,
) -> None:
    """Show warm sandboxes: how many, why not more, how often they were there when one was needed."""
    pause = max(0.1, seconds(every))

    async def work(client: ControlClient) -> None:
        while True:
            told = await client.call("GET", "pool")
            if as_json:
                output.put_json(told)
            else:
                output.put((CLEAR if watch and sys.stdout.isatty() else "") + text(told))
            sys.stdout.flush()
            if not watch:
                return
            await asyncio.sleep(pause)

    ask(config, control, work)


def text(told: Mapping[str, Any]) -> str:
    """For people."""
    if not told["agents"]:
        return "no pools; [pool.agents.NAME] in config.toml makes one"
    parts = [output.table(COLUMNS, [_row(agent) for agent in told["agents"]], right=NUMBERS)]
    parts += [f"{agent['agent']}: {agent['error']}{_again(agent)}" for agent in told["agents"] if agent["error"]]
    memory = told["memory"]
    parts.append(
        f"memory: {_size(memory['warm_bytes'])} of {_size(memory['budget_bytes'])}; "
        f"the host has {_size(memory['host_available_bytes'])} left, {_size(memory['reserve_bytes'])} are reserved"
    )
    claims = [f"{kind} {_counts(results)}" for kind, results in sorted(told["claims"].items())]
    if claims:
        parts.append(f"claims: {'; '.join(claims)}")
    if told["cost"]:
        cost = told["cost"]
        parts.append(f"idle cost: {cost['idle_now_per_hour']:g} an hour now, {cost['idle_since_start']:g} since start")
    return "\n".join(parts)


def _row(agent: Mapping[str, Any]) -> list[Any]:
    users, claims = agent["users"], agent["claims"]
    rate = agent["recent_hit_rate"]
    return [
        agent["agent"],
        agent["target"],
        agent["making"],
        agent["hot"],
        agent["paused"],
        f"{agent['ending']} ({agent['stuck']} stuck)" if agent["stuck"] else agent["ending"],
        users["hot"] + users["paused"],
        f"{claims['hit']}/{sum(claims.values())}",
        "" if rate is None else f"{rate:.0%}",
        _size(agent["bytes_each"]) if agent["measured"] else "?",
        WHY.get(agent["short"], agent["short"]) + (", breaker open" if agent["breaker"] == "open" else ""),
    ]


def _again(agent: Mapping[str, Any]) -> str:
    return f"; tried again in {agent['retry_in_s']:.0f} s" if agent["retry_in_s"] else ""


def _counts(results: Mapping[str, int]) -> str:
    return ", ".join(f"{result} {count}" for result, count in sorted(results.items()))


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
