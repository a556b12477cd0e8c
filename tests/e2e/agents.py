"""The shipped agents, as tests talk to them."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.e2e.providers import KEYS


@dataclass(frozen=True)
class Cli:
    """``credential``: the header of its provider; ``shell``: its own tool that runs a command."""

    name: str
    provider: str
    credential: str
    shell: str
    command: str = "command"
    more: tuple[tuple[str, str], ...] = (("description", "probe"),)

    def run(self, command: str) -> str:
        """A prompt that makes the model run ``command`` in a way that the CLI asks for first."""
        return f"[[tool={self.shell} {json.dumps({self.command: command, **dict(self.more)})}]]"

    def secret(self) -> str:
        key = KEYS[self.provider]
        return f"Bearer {key}" if self.credential == "authorization" else key


CLAUDE = Cli("claude", "anthropic", "x-api-key", "Bash")
CODEX = Cli(
    "codex",
    "openai",
    "authorization",
    "exec_command",
    "cmd",
    (("sandbox_permissions", "require_escalated"), ("justification", "May I?")),
)
GEMINI = Cli("gemini", "gemini", "x-goog-api-key", "run_shell_command")
OPENCODE = Cli("opencode", "openai", "authorization", "bash")
