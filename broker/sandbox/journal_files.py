"""Journal segment files: opened beneath one directory of the broker's, handed out as descriptors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
        beyond ``keep`` are deleted. Raises ``ValueError`` for another number, ``OSError``.
        """
        raise NotImplementedError
