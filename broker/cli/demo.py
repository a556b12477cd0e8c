"""`cortex demo`: a chat with an agent in a sandbox, with nothing set up."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from broker.cli.options import Config, Json

PROMPT = "Hello! What are you?"
"""Where there is nobody to type one."""

Driver = Literal["process", "docker"]


def demo(
    prompt: Annotated[str, typer.Option(help="One turn with this text, then the timeline.", metavar="TEXT")] = "",
    driver: Annotated[Driver, typer.Option(help="What runs the sandbox.")] = "process",
    agent: Annotated[str, typer.Option(help="An agent of the settings; the built-in one needs no key.")] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Chat with an agent in a sandbox, on a temporary broker that leaves nothing behind."""
    import uvloop

    from broker.cli import temporary

    interactive = not prompt and not as_json and sys.stdin.isatty() and sys.stdout.isatty()
    uvloop.run(temporary.run(None if interactive else prompt or PROMPT, driver, agent, config, as_json))
