"""What sections of the settings tree are made of: the base of every table and the types of common values."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Seconds = Annotated[float, Field(gt=0, le=86_400 * 30)]
Bytes = Annotated[int, Field(ge=1)]
AgentName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")
_ADDRESS = re.compile(r"[0-9.]+")
_PORT = re.compile(r"[0-9]{1,5}")


def _host_rule(text: str) -> str:
    """``name``, ``name:port``, ``*.name`` or ``*.name:port``, in lower case."""
    rule = text.strip().lower()
    if "/" in rule:
        raise ValueError("a host name without https:// and without a path, such as example.com or example.com:8443")
    host, colon, port = rule.partition(":")
    if colon and not (_PORT.fullmatch(port) and 0 < int(port) < 65_536):
        raise ValueError("behind the colon comes a port, 1 to 65535; IPv6 addresses cannot be listed")
    wild = host.startswith("*.")
    name = host.removeprefix("*.") if wild else host
    if "*" in name:
        raise ValueError("a wildcard is *.NAME and stands for all names below NAME")
    if not _HOST.fullmatch(name):
        raise ValueError("not a host name")
    if wild and ("." not in name or _ADDRESS.fullmatch(name)):
        raise ValueError(f"*.{name} allows too much: NAME in *.NAME has at least two parts, such as *.example.com")
    return rule


HostRule = Annotated[str, AfterValidator(_host_rule)]
"""Where a sandbox may go: ``name`` (port 443), ``name:port``, ``*.name`` (all names below it)."""
Ecosystem = Literal["python", "node", "go", "rust", "java", "ruby", "debian", "git"]
"""A ready-made list of hosts; see ``broker.session.ecosystems``."""


class Section(BaseModel):
    """Base of every table: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)
