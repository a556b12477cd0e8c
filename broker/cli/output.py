"""Data on stdout, talk on stderr. The one place that formats for people."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from broker.errors import Code, CortexError

EX_CONFIG = 78
"""Exit status of a wrong configuration (sysexits.h); systemd does not restart after it."""
_BOLD, _RED, _YELLOW, _DIM = "1", "31", "33", "2"


def put_json(value: Any) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=None if not sys.stdout.isatty() else 2) + "\n")


def put(text: str) -> None:
    """A line of data on stdout."""
    sys.stdout.write(text + "\n")


def say(text: str) -> None:
    """A line of talk on stderr."""
    sys.stderr.write(text + "\n")


def warn(text: str) -> None:
    """A warning that cannot be overlooked, on stderr."""
    say(f"{styled('warning:', _YELLOW, sys.stderr)} {text}")


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell; ``right``: numbers of columns that are flushed right."""
    cells = [list(headers), *([shown(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = []
    for number, row in enumerate(cells):
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(padded).rstrip()
        lines.append(styled(line, _BOLD, sys.stdout) if number == 0 else line)
    return "\n".join(lines)


def facts(values: Mapping[str, Any]) -> str:
    """One ``name  value`` a line."""
    width = max((len(name) for name in values), default=0)
    return "\n".join(f"{name.ljust(width)}  {_plain(value)}".rstrip() for name, value in values.items())


def timeline(bringup: Mapping[str, Any]) -> str:
    """The stages of one bring-up as a table."""
    rows = [(stage["stage"], f"{stage['start_ms']:.1f}", f"{stage['ms']:.1f}") for stage in bringup["stages"]]
    total = bringup.get("total_ms") or 0.0
    rows.append(("total", "0.0", f"{total:.1f}"))
    head = f"bring-up: {bringup.get('path', '')}, {bringup.get('driver', '')}, {bringup.get('outcome', '')}".rstrip(
        ", "
    )
    return f"{head}\n{table(('stage', 'start ms', 'took ms'), rows, right=(1, 2))}"


def report(error: CortexError) -> int:
    """Tells an error on stderr; returns the exit status."""
    say(f"{styled('error:', _RED, sys.stderr)} {error.what}")
    if error.cause:
        say(f"  why:  {error.cause}")
    say(f"  hint: {error.hint}")
    say(styled(f"  code: {error.code.slug}", _DIM, sys.stderr))
    return EX_CONFIG if error.code in (Code.BAD_CONFIG, Code.VAULT_KEY) else 1


def styled(text: str, style: str, stream: TextIO) -> str:
    """``text`` with an ANSI style where ``stream`` is a terminal and NO_COLOR is not set (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def shown(text: str) -> str:
    """``text`` without what a terminal would obey: names come from sandboxes too."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
