"""Journal segment files: opened beneath one directory of the broker's, handed out as descriptors."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(\d{10})\.seg")
_MAX_SEGMENT = 10**10 - 1


@dataclass(frozen=True)
class Segment:
    """An open journal file; ``first``..``last`` are the segments that exist now. The caller closes ``fd``."""

    fd: int
    number: int
    first: int
    last: int


class JournalFiles:
    """The newest ``keep`` segments in ``directory`` (0700, never mounted into a sandbox)."""

    def __init__(self, directory: Path, *, keep: int = 4) -> None:
        self.directory = directory
        self.keep = keep

    def open(self, segment: int) -> Segment:
        """Opens a segment for reading and appending (0600, close-on-exec, links not followed).

        -1: the newest, made when there is none; one more than the newest: the next, the oldest
        beyond ``keep`` are deleted. Raises ``ValueError`` for another number, ``OSError``. Blocks.
        """
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return self._open(directory, segment)
        finally:
            os.close(directory)

    def _open(self, directory: int, segment: int) -> Segment:
        numbers = sorted(int(match[1]) for name in os.listdir(directory) if (match := _NAME.fullmatch(name)))
        newest = numbers[-1] if numbers else -1
        number = segment if segment != -1 else max(newest, 0)
        new = number == newest + 1
        if (not new and number not in numbers) or number > _MAX_SEGMENT:
            raise ValueError(f"segment {segment} of {numbers[:1]}..{newest}")
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if new else 0)
        fd = os.open(_name(number), flags, 0o600, dir_fd=directory)
        try:
            if new:
                numbers.append(number)
                for old in numbers[: -self.keep]:
                    os.unlink(_name(old), dir_fd=directory)
            # A synced record in a file that has no name would be lost with the power; an earlier run, or an
            # earlier try, may have made the file and no more.
            os.fsync(directory)
        except OSError:
            os.close(fd)
            raise
        numbers = numbers[-self.keep :] if new else numbers
        return Segment(fd, number, numbers[0], numbers[-1])


def _name(number: int) -> str:
    return f"{number:010}.seg"
