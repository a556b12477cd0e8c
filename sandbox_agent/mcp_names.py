"""Names for tools and prompts of several servers, and URIs of their resources. Pure.

A tool ``t`` of server ``s`` is ``s__t``: letters, digits, ``_`` and ``-``, no longer than a model's API takes
with what agents put before it. Names that are too long, or alike once they are made safe, end in a hash of
what they were, so that they stay the same whatever else comes and goes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable

SEPARATOR = "__"
MUX = "cortex"
"""The name of the multiplexer among an agent's MCP servers."""
MAX_NAME = 64 - len(f"mcp__{MUX}__")
"""Agents call our tool ``x`` ``mcp__cortex__x``; model APIs take 64 characters."""
MAX_ALIAS = 20
HASH = 8
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_RUNS = re.compile(r"_{2,}")


def aliases(servers: Iterable[str]) -> dict[str, str]:
    """Server name → what its tools begin with: safe, unique, without ``__`` in it or ``_`` at its end."""
    return _unique(servers, _safe_alias, MAX_ALIAS)


def safe_names(alias: str, names: Iterable[str]) -> dict[str, str]:
    """Name at its server → name for agents, ``ALIAS__NAME``; unique, and unlike those of any other alias."""
    prefix = alias + SEPARATOR
    safe = _unique(names, lambda name: _UNSAFE.sub("_", name), MAX_NAME - len(prefix))
    return {name: prefix + short for name, short in safe.items()}


def split(name: str) -> tuple[str, str]:
    """Alias and the rest of a name for agents; no alias: ``("", name)``."""
    alias, found, rest = name.partition(SEPARATOR)
    return (alias, rest) if found else ("", name)


def _safe_alias(server: str) -> str:
    return _RUNS.sub("_", _UNSAFE.sub("_", server)).strip("_")


def _unique(names: Iterable[str], safe: Callable[[str], str], limit: int) -> dict[str, str]:
    wanted = {name: safe(name) for name in names}
    rivals = Counter(wanted.values())
    made: dict[str, str] = {name: name for name, short in wanted.items() if name == short and 0 < len(name) <= limit}
    taken = set(made)
    for name in sorted(wanted.keys() - made.keys()):
        short = wanted[name]
        if not short or len(short) > limit or rivals[short] > 1 or short in taken:
            short = _hashed(name, short, limit, taken)
        made[name] = short
        taken.add(short)
    return {name: made[name] for name in wanted}


def _hashed(name: str, short: str, limit: int, taken: set[str]) -> str:
    """Longer hashes only where somebody has chosen a name to be like another's hash."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
    for size in range(HASH, limit):
        head = short[: limit - size - 1].rstrip("_")
        made = f"{head}_{digest[:size]}" if head else digest[:size]
        if made not in taken:
            return made
    raise ValueError(f"no name is left for {name!r}")  # takes a forger of hashes


def prefixed(alias: str, uri: str) -> str:
    """The URI of a server's resource that another server has too. The alias is no part of the scheme: some
    clients write schemes in lower case."""
    return f"{MUX}:{alias}:{uri}"


def unprefixed(uri: str) -> tuple[str, str]:
    """Alias and URI at the server; not ``prefixed``: ``("", uri)``."""
    first, _, rest = uri.partition(":")
    alias, found, there = rest.partition(":")
    return (alias, there) if found and first == MUX else ("", uri)
