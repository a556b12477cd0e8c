"""Which package a command line would fetch and run: npx, npm exec, uvx, uv tool run, pipx run. Pure.

Only packages of a public registry by name and version are understood; a URL, a git address, a path
or an option that is not known here leaves the command line as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_NPM = re.compile(r"((?:@[a-z0-9~][a-z0-9._~-]*/)?[A-Za-z0-9~][A-Za-z0-9._~-]*)(?:@[\w.^~<>=*+-]+)?")
_PYPI = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[A-Za-z0-9,._-]+\])?(?:(?:==|@)[A-Za-z0-9.!+_-]+)?")
_MAX_PACKAGE = 214
"""Longest name that npm allows; nothing in Python's index comes near."""
_PRIVATE = ("npm_config_", "uv_", "pip_")
"""Variables by which a server says that it has a registry of its own."""


@dataclass(frozen=True)
class PackageCall:
    """``package`` as the installer takes it, ``name`` without version; ``command`` None: the package's own."""

    ecosystem: Literal["npm", "pypi"]
    package: str
    name: str
    command: str | None
    args: tuple[str, ...]

    @property
    def spec(self) -> str:
        """What is installed once: ecosystem and package."""
        return f"{self.ecosystem}:{self.package}"

    def choose(self, bins: Mapping[str, str]) -> str | None:
        """The path among ``bins`` that this call runs."""
        if self.command is not None:
            return bins.get(self.command)
        if len(bins) == 1:
            return next(iter(bins.values()))
        base = self.name.rpartition("/")[2]
        return bins.get(base) or bins.get(base.replace("_", "-"))


def parse(command: str, args: Sequence[str], env: Mapping[str, str]) -> PackageCall | None:
    """The call in a command line; None when it is none, or one that has to run as it is."""
    if any(name.lower().startswith(_PRIVATE) for name in env):
        return None
    program = command.rpartition("/")[2] if command.startswith("/") else command
    words = [program, *args]
    for head, ecosystem, source, silent in _RUNNERS:
        if tuple(words[: len(head)]) == head:
            return _call(ecosystem, source, silent, words[len(head) :], npm_exec=head[0] == "npm")
    return None


Ecosystem = Literal["npm", "pypi"]
_NPM_SOURCE, _NPM_SILENT = ("-p", "--package"), ("-y", "--yes", "-q", "--quiet")
_RUNNERS: tuple[tuple[tuple[str, ...], Ecosystem, tuple[str, ...], tuple[str, ...]], ...] = (
    (("npx",), "npm", _NPM_SOURCE, _NPM_SILENT),
    (("npm", "exec"), "npm", _NPM_SOURCE, _NPM_SILENT),
    (("npm", "x"), "npm", _NPM_SOURCE, _NPM_SILENT),
    (("uvx",), "pypi", ("--from",), ("-q", "--quiet", "--isolated")),
    (("uv", "tool", "run"), "pypi", ("--from",), ("-q", "--quiet", "--isolated")),
    (("pipx", "run"), "pypi", ("--spec",), ("-q", "--quiet", "--no-cache")),
)


def _call(
    ecosystem: Ecosystem, source: tuple[str, ...], silent: tuple[str, ...], words: list[str], *, npm_exec: bool
) -> PackageCall | None:
    package: str | None = None
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word == "--":
            break
        option, equals, value = word.partition("=")
        if option in source:
            if package is not None or not (equals or words):
                return None
            package = value if equals else words.pop(0)
        elif word not in silent:
            return None
    if not words:
        return None
    target = words.pop(0)
    # npm itself ends its options here; npx hands everything on.
    if npm_exec and words and words[0] == "--":
        words.pop(0)
    return _checked(ecosystem, package or target, target if package else None, words)


def _checked(ecosystem: Ecosystem, package: str, command: str | None, args: list[str]) -> PackageCall | None:
    if ecosystem == "pypi":
        package = package.removesuffix("@latest")
    match = (_NPM if ecosystem == "npm" else _PYPI).fullmatch(package)
    if match is None or len(package) > _MAX_PACKAGE:
        return None
    return PackageCall(ecosystem, package, match[1], command, tuple(args))
