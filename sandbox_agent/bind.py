"""Applies the parts of a bind. What is applied is known in memory only: a restart has nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from sandbox_agent import homefiles
from sandbox_agent.port import AgentHub
from sandbox_agent.spawn import SpawnError
from sandbox_agent.wire.codec import WireError
from sandbox_agent.wire.messages import MAX_CREDENTIAL_FILE, AgentSpec, Bind, Bound

ORDER = ("claim", "files", "settings", "mcp", "process")
"""First whose it is, then what an agent that starts reads."""
MAX_FILES = 8


class BindError(Exception):
    """A part that cannot be applied."""

    def __init__(self, code: str, what: str, hint: str) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.hint = hint


@dataclass(frozen=True)
class Claim:
    """Makes a warm sandbox that of ``session``; see ``wire.messages.Bind``."""

    session: str
    moved: bool = False
    restart: bool = False
    keep_ahead: bool = True


class Runner(Protocol):
    """The part of ``process.AgentProcess`` that a bind needs."""

    def want(self, spec: AgentSpec) -> str:
        """Runs ``spec``; returns the effect. Raises ``SpawnError``."""

    def restart(self) -> None:
        """Kills what runs, at once, and starts what is wanted."""


class Files(Protocol):
    """The part of ``credentials.CredentialFiles`` that a bind needs. Both raise ``UnsafePath`` or ``OSError``."""

    directory: str

    def put(self, files: Sequence[tuple[str, bytes]]) -> None:
        """These (path, content) and no others."""

    def relink(self) -> None:
        """The home is another one."""


class Binder:
    """``applied``: hash by part. A part whose hash is equal is not touched.

    ``session``: whose sandbox it is, empty until it is claimed; ``on_claim`` hears of that once.
    """

    def __init__(
        self,
        *,
        home: str,
        hub: AgentHub,
        process: Runner,
        files: Files,
        session: str,
        on_claim: Callable[[Claim], None],
    ) -> None:
        self.applied: dict[str, str] = {"claim": session} if session else {}
        self.session = session
        self._home = home
        self._hub = hub
        self._process = process
        self._on_claim = on_claim
        self._claiming = False
        self._files = files

    def apply(self, bind: Bind) -> Bound:
        """All parts are checked before the first is applied. Never raises."""
        effect: dict[str, str] = {}
        self._claiming = False
        try:
            actions = {name: self._action(name, value) for name, value in bind.parts.items()}
            for name in sorted(actions, key=ORDER.index):
                wanted = bind.hashes.get(name, "")
                if wanted and wanted == self.applied.get(name):
                    effect[name] = "now"
                    continue
                self.applied.pop(name, None)
                effect[name] = actions[name]()
                self.applied[name] = self.session if name == "claim" else wanted
        except (BindError, SpawnError) as error:
            return Bound(bind.id, False, dict(self.applied), effect, error.code, str(error)[:2000], error.hint)
        return Bound(bind.id, True, dict(self.applied), effect)

    def forget_process(self) -> None:
        """The agent has failed for good; the next bind starts it whatever its hash."""
        self.applied.pop("process", None)

    def _action(self, name: str, value: Any) -> Callable[[], str]:
        if name == "claim":
            claim = _claim(value)
            if self.session not in ("", claim.session):
                raise _claimed()
            return lambda: self._take(claim)
        if name == "process":
            spec = _spec(value)
            return lambda: self._want(spec)
        if name == "mcp":
            servers = _maps(name, value)
            return lambda: self._hub.set_mcp(servers)
        if name == "files":
            items = _maps(name, value)
            if len(items) > MAX_FILES:
                raise _invalid(f"over {MAX_FILES} files")
            files = [_file(self._home, item) for item in items]
            if files and not self._files.directory:
                raise _invalid("this sandbox has no place for credential files")
            return lambda: self._put_files(files)
        if name == "settings":
            if not isinstance(value, dict):
                raise _invalid("settings is not a map")
            return lambda: self._hub.set_settings(value)
        raise _invalid(f"unknown part {name[:40]!r}")

    def _take(self, claim: Claim) -> str:
        if not self.session:
            with _told():
                self._files.relink()
            self.session = claim.session
            self._claiming = True
            self._on_claim(claim)
            if claim.restart:
                self._process.restart()
        return "now"

    def _want(self, spec: AgentSpec) -> str:
        effect = self._process.want(spec)
        if self._claiming:  # nobody has used what runs: it needs no time to end
            self._process.restart()
        return effect

    def _put_files(self, files: list[tuple[str, bytes]]) -> str:
        with _told():
            self._files.put(files)
        return "now"


@contextmanager
def _told() -> Iterator[None]:
    """Says what a file in the home is in the way of. Raises ``BindError``."""
    try:
        yield
    except homefiles.UnsafePath as error:
        raise BindError(
            "config.invalid_section", str(error), "remove the link in the home, or change the path"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise BindError(
            "store.disk_full" if full else "config.invalid_section",
            f"a file cannot be written: {error.strerror}",
            "make room on the disk" if full else "look at what is at that path in the home",
        ) from error


def _invalid(what: str) -> BindError:
    return BindError("request.invalid", what, "broker and sandbox image are of different versions; update the image")


def _claimed() -> BindError:
    return BindError("session.conflict", "the sandbox is another session's", "it is claimed once ever; take another")


def _claim(value: Any) -> Claim:
    values = value if isinstance(value, dict) else {}
    session = values.get("session")
    flags = {name: values[name] for name in ("moved", "restart", "keep_ahead") if name in values}
    if not isinstance(session, str) or not session or not all(isinstance(flag, bool) for flag in flags.values()):
        raise _invalid("a claim is {session, moved, restart, keep_ahead}")
    return Claim(session, **flags)


def _spec(value: Any) -> AgentSpec:
    try:
        spec = AgentSpec.decode(value if isinstance(value, dict) else {})
    except WireError as error:
        raise _invalid(str(error)) from error
    if not spec.command:
        raise _invalid("the agent's command is empty")
    return spec


def _maps(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _invalid(f"{name} is not a list of maps")
    return value


def _file(home: str, item: dict[str, Any]) -> tuple[str, bytes]:
    path, content = item.get("path"), item.get("content")
    if not isinstance(path, str) or not isinstance(content, bytes):
        raise _invalid("a file is {path, content}")
    if len(content) > MAX_CREDENTIAL_FILE:
        raise _invalid(f"file {path!r} is over {MAX_CREDENTIAL_FILE} bytes")
    try:
        homefiles.parts_below(home, path)
    except homefiles.UnsafePath as error:
        raise BindError("config.invalid_section", str(error), "a file's path lies below the home") from error
    return path, content
