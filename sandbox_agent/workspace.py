"""Where conversations run: a client's ``cwd`` is a path of its own machine and is mapped into the workspace."""

from __future__ import annotations

import os
from typing import Any, TypeGuard


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
        if _is_path(wanted) and self.holds(wanted):
            return os.path.normpath(wanted)
        return self.path

    def restored(self, cwd: str) -> str:
        """The directory of a conversation of before: its own, or the workspace where that was in another home.

        Only sandboxes without isolation have their homes at different paths.
        """
        clean = os.path.normpath(cwd)
        return clean if clean.startswith(self._home.rstrip("/") + "/") else self.path

    def directories(self, wanted: Any) -> list[str]:
        """Of a client's additional directories those in the workspace."""
        paths = wanted if isinstance(wanted, list) else []
        return [os.path.normpath(p) for p in paths if _is_path(p) and self.holds(p)]

    def make(self, path: str) -> None:
        """Makes the directory where there is none. Raises ``OSError``."""
        os.makedirs(path, exist_ok=True)


def _is_path(wanted: Any) -> TypeGuard[str]:
    """Is absolute, and can be the name of a file."""
    if not isinstance(wanted, str) or not wanted.startswith("/") or "\0" in wanted:
        return False
    try:
        os.fsencode(wanted)
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
