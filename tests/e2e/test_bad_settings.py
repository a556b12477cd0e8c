"""Settings that are wrong: told before anything starts, all at once, with the line and the nearest key."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest


async def cli(*arguments: str) -> tuple[int | None, str]:
    """Exit status and standard error of a verb."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "broker", *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "NO_COLOR": "1"},
    )
    async with asyncio.timeout(30):
        _, said = await process.communicate()
    return process.returncode, said.decode()


BAD_FILE = """\
[broker]
state_dir = "{place}/state"
log_levle = "debug"

[fornt]
listen = "127.0.0.1:1"

[front]
max_connections = "many"

[session]
default_agent = "clade"

[agents.claude]
command = "claude"
"""


@pytest.mark.parametrize("verb", [["serve", "--config"], ["config", "check"]], ids=["serve", "check"])
async def test_wrong_settings_are_all_named_with_their_line_and_the_nearest_key(place: Path, verb: list[str]) -> None:
    path = place / "config.toml"
    path.write_text(BAD_FILE.format(place=place))
    status, said = await cli(*verb, str(path))
    assert status == 78
    lines = [line for line in said.splitlines() if str(path) in line.replace("\n", "")]
    told = {number: next((line for line in lines if f"{path}:{number}" in line), "") for number in (3, 5, 9, 15)}
    assert "log_level" in told[3], said
    assert "front" in told[5], said
    assert "max_connections" in told[9], said
    assert "command" in told[15], said
    assert "Traceback" not in said
    assert not (place / "state").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[broker\n", ["config.toml:1"]),
        ('[session]\ndefault_agent = "clade"\n[agents.claude]\ncommand = ["x"]\n', ["config.toml:2", "claude"]),
        ("[defaults.mcp]\nmcpServer = {}\n", ["config.toml:2", "mcpServers"]),
        (None, ["config.toml", "No such file"]),
    ],
    ids=["no toml", "unknown agent", "bad default", "no file"],
)
async def test_one_wrong_setting_is_told_plainly(place: Path, text: str | None, words: list[str]) -> None:
    path = place / "config.toml"
    if text is not None:
        path.write_text(text)
    status, said = await cli("config", "check", str(path))
    assert status == 78
    assert all(word in said for word in words), said
