"""`cortex config`: validates and shows the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from broker.cli import output
from broker.cli.options import Config, Json, settings

if TYPE_CHECKING:
    from broker.settings import Loaded

app = typer.Typer(help="Validate and show the settings.", no_args_is_help=True)

File = Annotated[Path | None, typer.Argument(metavar="FILE", help="Default: the file that serve would read.")]


@app.command()
def check(file: File = None, config: Config = None, as_json: Json = False) -> None:
    """Validate the settings; exit 78 when they are wrong, with file:line and the nearest key."""
    loaded = settings(file or config)
    if as_json:
        output.put_json({"valid": True, "path": str(loaded.path) if loaded.path else None})
    else:
        output.say(f"{loaded.path or 'no file; the defaults and the environment'}: valid")


@app.command()
def show(
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value is from.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show every value, and with --origin where it came from."""
    from broker.settings import dotted, leaves

    loaded = settings(config)
    values = {dotted(key): value for key, value in leaves(loaded.config)}
    if as_json:
        output.put_json({key: _entry(loaded, key, value, origin) for key, value in values.items()})
        return
    for key, value in values.items():
        text = f"{key} = {_toml(value)}"
        output.put(f"{text}  # {loaded.origins.get(key, 'default')}" if origin else text)


def _entry(loaded: Loaded, key: str, value: Any, origin: bool) -> Any:
    return {"value": value, "origin": loaded.origins.get(key, "default")} if origin else value


def _toml(value: Any) -> str:
    """A TOML value; what TOML has no word for (null) is shown as an empty string."""
    if value is None:
        return '""'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
