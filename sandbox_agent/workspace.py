"""Where conversations run: a client's ``cwd`` is a path of its own machine and is mapped into the workspace."""

from __future__ import annotations

import os
from typing import Any


class Workspace:
    """``path``: absolute; relative ones are below ``home``."""

    def __init__(self, home: str) -> None:
        self._home = home
        self.path = os.path.join(home, "workspace")

    def set(self, path: str) -> None:
        """Another workspace for conversations to come; "" is the default one."""
        self.path = os.path.normpath(os.path.join(self._home, path or "workspace"))

    def holds(self, path: str) -> bool:
        """Whether a path is the workspace or below it."""
        clean = os.path.normpath(path)
        return clean == self.path or clean.startswith(self.path.rstrip("/") + "/")

    def cwd(self, wanted: Any) -> str:
        """The directory for what a client asked for: itself where it lies in the workspace, else the workspace."""
        if isinstance(wanted, str) and wanted.startswith("/") and "\0" not in wanted and self.holds(wanted):
            return os.path.normpath(wanted)
        return self.path

    def directories(self, wanted: Any) -> list[str]:
        """Of a client's additional directories those in the workspace."""
        paths = wanted if isinstance(wanted, list) else []
        return [os.path.normpath(p) for p in paths if isinstance(p, str) and p.startswith("/") and self.holds(p)]

    def make(self, path: str) -> None:
        """Makes the directory where there is none. Raises ``OSError``."""
        os.makedirs(path, exist_ok=True)
