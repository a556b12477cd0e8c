"""`cortex attach`: what an IDE that spawns ACP agents lists as its agent command."""

from __future__ import annotations

import asyncio
import getpass
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from broker.cli.options import Config, ControlUrl, whose
from broker.errors import Code, CortexError

TOKEN_ENV = "CORTEX_TOKEN"

TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="With --url: file with the attach token, read again at each connection. Else $CORTEX_TOKEN.",
        metavar="FILE",
    ),
]


def attach(
    target: Annotated[
        str, typer.Argument(metavar="USER[/WORKSPACE]", help="Whose session. Default: who runs this.")
    ] = "",
    url: Annotated[str, typer.Option(help="A broker elsewhere, wss://host/acp; needs a token.", metavar="WSS")] = "",
    token_file: TokenFile = None,
    agent: Annotated[str, typer.Option(help="Agent of a session that is created by this.")] = "",
    config: Config = None,
    control: ControlUrl = "",
) -> None:
    """Tie stdin and stdout (ACP, a JSON message a line) to a session; reconnects and resumes by itself."""
    from broker.cli.shim import Shim

    source = remote(url, token_file) if url else Local(target or _me(), agent, config, control)
    shim = Shim(source, sys.stdin.fileno(), sys.stdout.fileno())
    raise typer.Exit(asyncio.run(shim.run()))


class Local:
    """Where to connect, by the control API of a broker that trusts this user; a fresh token each time."""

    def __init__(self, target: str, agent: str, config: Path | None, control: str) -> None:
        self._whose = whose(target)
        self._agent = agent
        self._config = config
        self._control = control

    async def __call__(self) -> tuple[str, str]:
        from broker.cli.client import locate

        body = {"user": self._whose.user, "workspace": self._whose.workspace, "agent": self._agent or None}
        async with locate(self._config, self._control) as client:
            session = await client.call("POST", "sessions", body=body)
        if not session["acp_url"].endswith("/acp"):
            raise CortexError(
                Code.WRONG_PROTOCOL,
                f"agent {session['agent']!r} does not speak ACP",
                hint="choose another with --agent",
            )
        return session["acp_url"], session["token"]


class Remote:
    """A URL and a token that somebody else renews."""

    def __init__(self, url: str, token_file: Path | None) -> None:
        self._url = url
        self._file = token_file

    async def __call__(self) -> tuple[str, str]:
        return self._url, await asyncio.to_thread(self._token)

    def _token(self) -> str:
        try:
            token = self._file.read_text().strip() if self._file else os.environ.get(TOKEN_ENV, "")
        except (OSError, UnicodeDecodeError) as error:
            raise CortexError(
                Code.TOKEN_MISSING, f"cannot read {self._file}", cause=error, hint="put the attach token into it"
            ) from error
        if not token:
            raise CortexError(
                Code.TOKEN_MISSING, "there is no token for --url", hint=f"set {TOKEN_ENV}, or name a --token-file"
            )
        return token


def remote(url: str, token_file: Path | None) -> Remote:
    """Raises ``BAD_REQUEST`` for what is no WebSocket URL."""
    if not re.match(r"wss?://[^/\s]+", url):
        raise CortexError(Code.BAD_REQUEST, f"{url!r} is no WebSocket URL", hint="write wss://host/acp")
    return Remote(url, token_file)


def _me() -> str:
    """The name of who runs this, as far as it is a user id."""
    return re.sub(r"[^A-Za-z0-9._@+:|-]", "-", getpass.getuser()).lstrip("._@+:|-") or "me"
