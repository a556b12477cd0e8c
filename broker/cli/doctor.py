"""`cortex doctor`: checks the host."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from broker.cli import output
from broker.cli.options import Config, Json

if TYPE_CHECKING:
    from broker.cli.findings import Finding
    from broker.config import Config as Settings

STYLES = {"ok": "32", "note": "36", "warning": "33", "failure": "31"}


def doctor(config: Config = None, as_json: Json = False) -> None:
    """Check the host; each finding has a code, what is wrong and what mends it. Exit 1 on a failure."""
    from broker.cli import findings
    from broker.host import logs
    from broker.sandbox.drivers import sandbox_uid

    logs.setup("error", "text")
    found, loaded = findings.check_settings(config)
    found += [findings.check_python(sys.version_info[:3]), findings.check_sqlite(sqlite3.sqlite_version_info)]
    found += findings.check_limits(*resource.getrlimit(resource.RLIMIT_NOFILE))
    if loaded is not None:
        uid = sandbox_uid(loaded.config)
        found += findings.check_user(loaded.config, os.geteuid(), uid, tuple(os.getgroups()))
        found += findings.check_state(loaded.config)
        found += findings.check_secrets(loaded.config)
        found += asyncio.run(_drivers(loaded.config))
    if as_json:
        output.put_json({"ok": not _failed(found), "findings": [asdict(finding) for finding in found]})
    else:
        tell(found)
    raise typer.Exit(1 if _failed(found) else 0)


async def _drivers(config: Settings) -> list[Finding]:
    from broker.cli import findings

    return [*await findings.check_docker(config), *await findings.check_bwrap(config)]


def tell(found: list[Finding]) -> None:
    """One finding a line, its fix below."""
    for finding in found:
        level = output.styled(finding.level.ljust(7), STYLES[finding.level], sys.stdout)
        output.put(f"{level}  {finding.code}: {finding.what}")
        if finding.fix:
            output.put(f"         → {finding.fix}")


def _failed(found: list[Finding]) -> bool:
    return any(finding.level == "failure" for finding in found)
