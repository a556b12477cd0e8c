"""What the process driver remembers of each sandbox, so that a broker started later finds it again.

One JSON file a sandbox, replaced by rename. It need not survive a power cut: no sandbox does, and
the boot id in the record says so.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from broker.errors import Code, CortexError
from broker.sandbox.procfs import Process

log = structlog.get_logger(__name__)

Stage = Literal["created", "starting", "running", "paused", "exited"]


@dataclass(frozen=True)
class Record:
    """``argv``: the whole command, without the numbers of descriptors; ``init``: the process whose end is the
    sandbox's end; ``monitor``: bubblewrap outside of it, which knows the exit code; ``credentials``: where it
    keeps credential files, as it sees it."""

    ref: str
    slot: str
    incarnation: int
    isolated: bool
    argv: list[str]
    env: dict[str, str]
    stage: Stage = "created"
    boot: str = ""
    init: Process | None = None
    monitor: Process | None = None
    code: int | None = None
    credentials: str = ""


class Records:
    """The records below ``directory`` (made 0700). Methods block for a few short system calls."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self) -> None:
        """Makes the directory. Raises ``CortexError``."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _error(self.directory, error) from error

    def _path(self, ref: str) -> Path:
        return self.directory / f"{ref}.json"

    def fifo(self, ref: str, kind: Literal["out", "status"]) -> Path:
        """Named pipe for what the sandbox prints, or for bubblewrap's status."""
        return self.directory / f"{ref}.{kind}"

    def save(self, record: Record) -> None:
        """Raises ``CortexError``."""
        path = self._path(record.ref)
        fresh = path.with_suffix(".new")
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(_text(record))
            os.replace(fresh, path)
        except OSError as error:
            raise _error(path, error) from error

    def delete(self, ref: str) -> None:
        """Forgets a sandbox. Idempotent."""
        for path in (self.fifo(ref, "out"), self.fifo(ref, "status"), self._path(ref)):
            with suppress(FileNotFoundError):
                path.unlink()

    def load(self) -> list[Record]:
        """All records; an unreadable one is logged and left alone."""
        found = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                found.append(_parse(json.loads(path.read_text())))
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.error("sandbox_record_unreadable", path=str(path), error=str(error))
        return found


def _text(record: Record) -> bytes:
    data = vars(record) | {
        name: vars(one) for name in ("init", "monitor") if (one := getattr(record, name)) is not None
    }
    return json.dumps(data).encode()


def _parse(data: dict[str, Any]) -> Record:
    for name in ("init", "monitor"):
        if data[name] is not None:
            data[name] = Process(int(data[name]["pid"]), int(data[name]["start"]))
    return Record(**data)


def _error(path: Path, error: OSError) -> CortexError:
    full = error.errno in (28, 122)
    return CortexError(
        Code.DISK_FULL if full else Code.ENGINE_ERROR,
        f"cannot write {path}",
        cause=error,
        hint="Make room under state_dir." if full else "Give the broker's user its state_dir.",
    )
