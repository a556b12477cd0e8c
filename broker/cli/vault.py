"""`cortex vault`: the keys that credentials are sealed with."""

from __future__ import annotations

import typer

from broker.cli import output
from broker.cli.client import ask
from broker.cli.options import Config, ControlUrl, Json

app = typer.Typer(help="Keys that credentials are sealed with.", no_args_is_help=True)


@app.command()
def status(config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """Show the keys by id, the one that seals first, and how many credentials each seals."""
    found = ask(config, control, lambda client: client.call("GET", "vault"))
    if as_json:
        output.put_json(found)
        return
    output.put(output.table(("key", "sealed"), [(key["id"], key["sealed"]) for key in found["keys"]], right=(1,)))
    output.say(f"kept in {found['key_file']}; keep a copy elsewhere, apart from copies of the store")


@app.command()
def rotate(config: Config = None, control: ControlUrl = "", as_json: Json = False) -> None:
    """Make a new key, seal everything with it, and drop the old ones; the broker goes on meanwhile."""
    done = ask(config, control, lambda client: client.call("POST", "vault", "rotate"))
    if as_json:
        output.put_json(done)
        return
    output.say(f"key {done['key']} seals now; sealed anew: {done['sealed']}; dropped: {_names(done['dropped'])}")
    if done["refused"]:
        output.warn(f"{done['refused']} credentials do not open; their keys are kept: {_names(done['kept'][1:])}")
    output.say("copies of the store that were made before need the old keys")


def _names(ids: list[str]) -> str:
    return ", ".join(ids) or "none"
