"""The small files of ``/etc`` that a sandbox sees instead of the host's: who it is, how names are looked up.

Programs (node, git, ssh) fail for a uid that has no passwd entry, so each sandbox uid gets one.
"""

from __future__ import annotations

import os
from pathlib import Path

from broker.errors import Code, CortexError
from broker.sandbox.driver import HOME_DIR

USER = "cortex"


def passwd(uid: int, gid: int, home: str = HOME_DIR) -> str:
    """passwd(5): root, the sandbox's user, nobody."""
    lines = ["root:x:0:0:root:/root:/usr/sbin/nologin"] if uid else []
    lines += [f"{USER}:x:{uid}:{gid}:Cortex sandbox:{home}:/bin/sh"]
    lines += ["nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin"]
    return "\n".join(lines) + "\n"


def group(gid: int) -> str:
    """group(5): root, the sandbox's group, nogroup."""
    lines = ["root:x:0:"] if gid else []
    return "\n".join([*lines, f"{USER}:x:{gid}:", "nogroup:x:65534:"]) + "\n"


def write_etc(directory: Path, uid: int, gid: int) -> dict[str, Path]:
    """Writes the files below ``directory``; returns target in the sandbox → file. Raises ``CortexError``."""
    texts = {
        "passwd": passwd(uid, gid),
        "group": group(gid),
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "hosts": "127.0.0.1 localhost cortex\n::1 localhost\n",
    }
    home = directory / f"etc-{uid}-{gid}"
    try:
        home.mkdir(mode=0o755, parents=True, exist_ok=True)
        for name, text in texts.items():
            _write(home / name, text)
    except OSError as error:
        raise CortexError(
            Code.DISK_FULL if error.errno == 28 else Code.BAD_CONFIG,
            f"cannot write {home}",
            cause=error,
            hint="Give the broker's user a state_dir that it can write to, with space left.",
        ) from error
    return {f"/etc/{name}": home / name for name in texts}


def _write(path: Path, text: str) -> None:
    """Replaced by rename: running sandboxes keep the file that they have mounted."""
    if path.is_file() and path.read_text() == text:
        return
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.chmod(fresh, 0o644)
    os.replace(fresh, path)
