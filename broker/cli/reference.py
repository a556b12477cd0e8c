"""Writes docs/cli.md: the help of every verb. ``python -m broker.cli.reference [FILE]``, or ``-`` for stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

WIDTH = 100
HEAD = """# Command line

Written by `python -m broker.cli.reference`; a test holds it against the program. Data goes to stdout,
talk to stderr. `NO_COLOR` is honoured. `cortex --install-completion` sets up completion in your shell.

Exit status: 0 done, 1 an error (with a code and a hint), 2 wrong usage, 78 wrong settings, 130 interrupted.
"""


def reference() -> str:
    """The whole page."""
    from broker.cli.main import app

    command = typer.main.get_command(app)
    parts = [HEAD, *(f"## {name}\n\n```text\n{text}\n```\n" for name, text in helps(command, "cortex", None))]
    return "\n".join(parts)


def helps(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    """Name and help of a verb and of those below it."""
    context = command.make_context(name.split()[-1], [], parent=parent, resilient_parsing=True, terminal_width=WIDTH)
    text = command.get_help(context)
    yield name, "\n".join(line.rstrip() for line in text.splitlines()).strip()
    for below in getattr(command, "commands", {}).values():
        yield from helps(below, f"{name} {below.name}", context)


def main(arguments: list[str]) -> None:
    """Writes the page."""
    target = arguments[0] if arguments else "docs/cli.md"
    if target == "-":
        sys.stdout.write(reference())
    else:
        Path(target).write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
