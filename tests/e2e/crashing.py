"""`cortex serve` that ends, or stands still, at one step of what it does to homes, rows, gateway and sandboxes.

A step is the moment before, or after, one of the calls below. Nothing is counted until the file $CRASH_AT is
there; it holds the number of the step to die at, or its name. $CRASH_BY is the signal: KILL, or STOP to stand still
until SIGCONT. The names of the steps that were reached are appended to $CRASH_AT.steps.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import broker.cli.main
from broker.gateway.link import GatewayLink
from broker.sandbox.docker import DockerDriver
from broker.sandbox.link import Link
from broker.sandbox.process import ProcessDriver
from broker.sandbox.slots import Slots
from broker.store.sessions import SessionStore

CALLS: dict[type, tuple[str, ...]] = {
    SessionStore: ("save", "sandbox_save", "sandbox_claim", "sandbox_welcomed", "sandbox_delete"),
    Slots: ("adopt_home", "release_home", "remove", "_set_owner", "_clear_owner"),
    GatewayLink: ("put_slot", "drop_slot"),
    Link: ("bind", "stop", "close"),
    ProcessDriver: ("pause", "resume", "stop", "remove"),
    DockerDriver: ("pause", "resume", "stop", "remove"),
}


def step(name: str) -> None:
    """Counts, and dies when it is time."""
    path = os.environ["CRASH_AT"]
    try:
        with open(path) as file:
            at = file.read()
    except FileNotFoundError:
        return
    with open(f"{path}.steps", "a+") as file:
        file.seek(0)
        reached = file.read().splitlines()
        file.write(f"{name}\n")
    if at == str(len(reached)) or (at == name and name not in reached):
        os.kill(os.getpid(), signal.Signals[f"SIG{os.environ.get('CRASH_BY', 'KILL')}"])


def around(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``call`` with a step before it and one after it."""
    if inspect.iscoroutinefunction(call):

        @functools.wraps(call)
        async def later(*args: Any, **kwargs: Any) -> Any:
            step(f"before {name}")
            result = await call(*args, **kwargs)
            step(f"after {name}")
            return result

        return later

    @functools.wraps(call)
    def now(*args: Any, **kwargs: Any) -> Any:
        step(f"before {name}")
        result = call(*args, **kwargs)
        step(f"after {name}")
        return result

    return now


def main() -> None:
    for owner, names in CALLS.items():
        for name in names:
            setattr(owner, name, around(getattr(owner, name), name))
    rename = around(os.rename, "rename")
    os.rename = rename
    broker.cli.main.main(sys.argv[1:])


if __name__ == "__main__":
    main()
