"""`cortex bench`: measures, each figure beside its peers in one run."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

import broker
from broker.errors import Code, CortexError


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="relay, bringup, claim, replay, gateway or http2.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the list of targets.")] = False,
    long: Annotated[bool, typer.Option("--long", help="Also what takes longer than 9 minutes.")] = False,
    runs: Annotated[
        int | None, typer.Option("--runs", min=1, help="bringup: so many cold starts, added to the data set.")
    ] = None,
    only: Annotated[str, typer.Option("--only", metavar="PART", help="claim, gateway: this part of it.")] = "",
) -> None:
    """Run a benchmark; exit 1 when a target is missed."""
    module = find(name)
    if runs is not None and name != "bringup":
        raise CortexError(Code.BAD_REQUEST, f"{name} takes no --runs", hint="cortex bench bringup --runs N")
    if only and name not in ("claim", "gateway"):
        raise CortexError(Code.BAD_REQUEST, f"{name} has no parts", hint="cortex bench gateway --only compare")
    arguments = [flag for flag, on in (("--json", as_json), ("--long", long)) if on]
    arguments += ["--runs", str(runs)] if runs is not None else []
    arguments += ["--only", only] if only else []
    raise typer.Exit(module.main(arguments))


def find(name: str) -> ModuleType:
    """The module ``bench.NAME`` of the source tree. Raises ``NOT_FOUND``."""
    root = Path(broker.__file__).parent.parent
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not (root / "bench" / f"{name}.py").is_file():
        raise CortexError(
            Code.NOT_FOUND,
            f"there is no benchmark {name[:40]!r} here",
            hint="benchmarks are in the source tree only; names: relay, bringup, claim, replay, gateway, http2",
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"bench.{name}")
