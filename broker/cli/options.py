"""Options and arguments that several verbs share.

Heavy modules are imported where a verb runs, so that `cortex attach` starts fast.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from broker.errors import Code, CortexError

if TYPE_CHECKING:
    from broker.settings import Loaded

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Settings file. Default: $CORTEX_CONFIG, else the usual places.", metavar="FILE"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ControlUrl = Annotated[
    str,
    typer.Option(
        "--control",
        envvar="CORTEX_CONTROL_URL",
        help="Control API, http(s)://… or unix:PATH, where it is not this host's.",
        metavar="URL",
    ),
]
Target = Annotated[str, typer.Argument(metavar="USER[/WORKSPACE]", help="Whose session; the workspace is main.")]
User = Annotated[str, typer.Argument(metavar="USER", help="The user's id.")]


@dataclass(frozen=True)
class Whose:
    """User and workspace of a session."""

    user: str
    workspace: str

    def __str__(self) -> str:
        return f"{self.user}/{self.workspace}"


def whose(text: str) -> Whose:
    """Parses ``USER[/WORKSPACE]``. Raises ``BAD_USER_ID``."""
    user, slash, workspace = text.partition("/")
    return Whose(user_id(user), user_id(workspace, "workspace name") if slash else "main")


def user_id(text: str, what: str = "user id") -> str:
    """``text`` if it is one; also what keeps a URL's path from being another one. Raises ``BAD_USER_ID``."""
    from broker.config import USER_ID

    if not USER_ID.fullmatch(text):
        raise CortexError(
            Code.BAD_USER_ID,
            f"{text[:64]!r} is not a {what}",
            hint="use 1 to 128 letters, digits and . _ @ + : | -, beginning with a letter or digit",
        )
    return text


def settings(config: Path | None, overrides: Mapping[str, Any] | None = None) -> Loaded:
    """The settings, with every check that serve makes. Raises ``BAD_CONFIG``."""
    from broker.session.sections import default_problems
    from broker.settings import load

    return load(config, os.environ, overrides=overrides, checks=(default_problems,))


def seconds(text: str) -> float:
    """Parses ``90``, ``90s``, ``15m``, ``2h`` or ``1d``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a duration; write 90s, 15m, 2h or 1d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
