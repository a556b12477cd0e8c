"""What a sandbox of the process driver sees of the host, and the bubblewrap command that says so.

The root is empty and read-only; into it come ``/usr`` and ``/opt``, chosen files of ``/etc``, what
the agent's command names, and the slot. Symbolic links are made anew instead of being mounted:
node and Python look for their modules from where a link leads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from broker.errors import Code, CortexError
from broker.sandbox.driver import CREDENTIALS_BYTES, CREDENTIALS_DIR, PACKAGES_DIR, SOCK_DIR, VOL_DIR

TMP_BYTES = 512 * 2**20
ROOT_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC = (
    *("alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "debian_version", "fonts", "gai.conf"),
    *("host.conf", "inputrc", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias", "localtime"),
    *("magic", "mime.types", "os-release", "perl", "profile", "protocols", "python3", "python3.11", "python3.12"),
    *("python3.13", "services", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone"),
)
"""What programs commonly read there and what holds no secret: not ``ssl/private``, and not ``gitconfig``, in whose
addresses tokens are kept."""
_NEVER = tuple(map(Path, ("/", "/dev", "/etc", "/home", "/proc", "/root", "/run", "/sys", "/tmp", "/var", VOL_DIR)))
_NEVER_BELOW = tuple(map(Path, ("/dev", "/proc", "/sys")))
_GIVE = '/bin/chown "$1" "$2" && shift 2 && exec "$@"'
_COVERED = ("/usr", *ROOT_LINKS)


@dataclass(frozen=True)
class Shown:
    """One path that is shown at its own place; ``link``: the text of a symbolic link, else it is mounted."""

    path: Path
    link: str = ""


@dataclass(frozen=True)
class View:
    """All that one sandbox sees. ``files``: generated files by their target. ``hidden``: the state directory,
    which nobody sees though it may lie in a directory that is shown."""

    sock_dir: Path
    vol_dir: Path
    packages_dir: Path
    shown: tuple[Shown, ...]
    files: Mapping[str, Path]
    hidden: Path | None = None


def _inside(path: Path, directory: Path) -> bool:
    return _below(str(path), str(directory))


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory if directory == "/" else directory + "/")


def _too_much(path: Path) -> bool:
    return path in _NEVER or any(_inside(path, top) for top in _NEVER_BELOW)


def check_visible(paths: Iterable[str], state_dir: Path) -> None:
    """Refuses what would show other tenants or the host's own state. Raises ``CortexError``."""
    for text in paths:
        path = Path(os.path.normpath(text))
        real = Path(os.path.realpath(path))
        state = Path(os.path.realpath(state_dir))
        why = ""
        if not path.is_absolute():
            why = "is not absolute"
        elif not path.exists():
            why = "does not exist"
        elif _too_much(path) or _too_much(real):
            why = "is too much to show"
        elif _inside(real, state) or _inside(state, real):
            why = f"would show {state_dir}, where everybody's homes are"
        elif real.is_socket():
            why = "is a socket; a sandbox must not reach the host's services"
        if why:
            raise CortexError(
                Code.BAD_CONFIG,
                f"sandbox.process.visible: {text} {why}",
                hint="Name the directories that agents need, for example that of a language runtime.",
            )


def _surroundings(path: Path) -> list[Path]:
    """The virtual environment or npm prefix that ``path`` lies in, and that environment's Python."""
    found: list[Path] = []
    for parent in path.parents:
        config = parent / "pyvenv.cfg"
        if config.is_file():
            found.append(parent)
            for line in config.read_text(errors="replace").splitlines():
                key, _, value = line.partition("=")
                if key.strip() == "home" and value.strip().startswith("/"):
                    found.append(Path(os.path.realpath(value.strip())).parent)
            break
    for parent in reversed(path.parents):
        if parent.name == "node_modules":
            found.append(parent)
            if parent.parent.name == "lib":
                found.append(parent.parent.parent / "bin")
            break
    return found


def _hops(path: Path) -> list[Shown]:
    """``path`` and, where it is a symbolic link, each step to what it leads to."""
    hops: list[Shown] = []
    for _ in range(40):
        if _too_much(path) or not os.path.lexists(path):
            return hops
        try:
            target = os.readlink(path)
        except OSError:  # no link
            return [*hops, Shown(path)]
        hops.append(Shown(path, target))
        path = Path(os.path.normpath(path.parent / target))
    return []


def shown_paths(words: Iterable[str], trees: Iterable[Path], state_dir: Path) -> tuple[Shown, ...]:
    """What to show for the absolute paths among ``words`` (an agent's command) and for ``trees``.

    What the base view holds already, what is missing and what would show too much is left out.
    """
    found: dict[Path, Shown] = {}
    queue = [Path(os.path.normpath(word)) for word in words if word.startswith("/")] + list(trees)
    for path in queue:
        for hop in _hops(path):
            if hop.path not in found:
                found[hop.path] = hop
                queue += _surroundings(hop.path)
    state = Path(os.path.realpath(state_dir))
    usable = [item for item in found.values() if item.link or _showable(item.path, state)]
    return tuple(sorted(_pruned(usable), key=lambda item: item.path))


def _showable(path: Path, state: Path) -> bool:
    real = Path(os.path.realpath(path))
    if _too_much(path) or _too_much(real) or real.is_socket():
        return False
    return not (_inside(state, real) or _inside(real, state))


def _pruned(items: Sequence[Shown]) -> list[Shown]:
    """Leaves out what lies in another shown directory or in the base view, and links in the way of others."""
    mounted = {item.path for item in items if not item.link and item.path.is_dir()}
    passed = {parent for item in items for parent in item.path.parents}
    return [
        item
        for item in items
        if not _covered(item.path) and mounted.isdisjoint(item.path.parents) and not (item.link and item.path in passed)
    ]


def _covered(path: Path) -> bool:
    """Whether the base view holds it: of ``/opt`` all but the place of the shared packages."""
    text = str(path)
    in_opt = _below(text, "/opt") and not _below(text, PACKAGES_DIR)
    return in_opt or any(_below(text, top) for top in _COVERED)


class _Args:
    """Collects bubblewrap's arguments; each target's parents are made first, so that others may pass through."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._made: set[str] = set()

    def _parents(self, target: str) -> None:
        # Text, not paths: this runs for each new sandbox, and what a thread computes holds the loop up.
        end = target.find("/", 1)
        while end != -1:
            parent = target[:end]
            if parent not in self._made:
                self.words += ["--perms", "0755", "--dir", parent]
                self._made.add(parent)
            end = target.find("/", end + 1)

    def mount(self, kind: str, source: Path | str, target: Path | str) -> None:
        place = str(target)
        self._parents(place)
        self.words += [kind, str(source), place]
        self._made.add(place)

    def tmpfs(self, target: str, mode: str = "1777", size: int = TMP_BYTES) -> None:
        self._parents(target)
        self.words += ["--perms", mode, "--size", str(size), "--tmpfs", target]
        self._made.add(target)

    def show(self, item: Shown) -> None:
        if item.link:
            self.mount("--symlink", item.link, item.path)
        else:
            self.mount("--ro-bind", item.path, item.path)


def _base(args: _Args) -> None:
    args.mount("--ro-bind", "/usr", "/usr")
    for name in ROOT_LINKS:
        if os.path.islink(name):
            args.mount("--symlink", os.readlink(name), name)
        elif os.path.isdir(name):
            args.mount("--ro-bind", name, name)
    for name in ETC:
        if os.path.exists(f"/etc/{name}"):
            args.mount("--ro-bind", f"/etc/{name}", f"/etc/{name}")
    _opt_tree(args, Path("/opt"), Path(PACKAGES_DIR))


def _opt_tree(args: _Args, directory: Path, packages: Path) -> None:
    """Mounts what ``directory`` holds, entry by entry on the way to ``packages``, which must stay free."""
    if not directory.is_dir():
        return
    for entry in sorted(os.scandir(directory), key=lambda found: found.name):
        if entry.path == str(packages):
            continue
        if _below(str(packages), entry.path):
            _opt_tree(args, Path(entry.path), packages)
        elif entry.is_symlink():
            args.mount("--symlink", os.readlink(entry.path), entry.path)
        elif entry.is_dir() or entry.is_file():
            args.mount("--ro-bind", entry.path, entry.path)


def view_args(view: View) -> list[str]:
    """The arguments that build the view. Sources are read, so they must exist."""
    args = _Args()
    _base(args)
    for target, source in view.files.items():
        args.mount("--ro-bind", source, target)
    args.words += ["--proc", "/proc", "--dev", "/dev"]
    args.tmpfs("/dev/shm")
    args.tmpfs("/tmp")
    args.tmpfs("/var/tmp")
    args.tmpfs(CREDENTIALS_DIR, "0700", CREDENTIALS_BYTES)
    for item in view.shown:
        args.show(item)
    sealed = _hide(args, view.hidden) if view.hidden is not None else []
    args.mount("--ro-bind", view.sock_dir, SOCK_DIR)
    args.mount("--bind", view.vol_dir, VOL_DIR)
    args.mount("--ro-bind", view.packages_dir, PACKAGES_DIR)
    return [*args.words, *sealed, "--remount-ro", "/dev", "--remount-ro", "/"]


def _hide(args: _Args, state_dir: Path) -> list[str]:
    """Lays an empty directory over ``state_dir`` where ``/usr`` or ``/opt`` would show it; returns what seals it."""
    real = os.path.realpath(state_dir)
    if not any(_below(real, top) for top in ("/usr", "/opt")):
        return []
    args.tmpfs(real, "0755")
    return ["--remount-ro", real]


def isolation_args(uid: int, gid: int, *, root: bool) -> tuple[list[str], list[str]]:
    """(namespaces and identity, command prefix). Root gives the sandbox its tmpfs for credentials, which
    bubblewrap has made root's, and sheds uid, groups and all capabilities by setpriv."""
    spaces = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    spaces += ["--hostname", "cortex", "--chdir", "/", "--cap-drop", "ALL"]
    if not root:
        return [*spaces, "--unshare-user", "--uid", str(uid), "--gid", str(gid)], []
    keep = [word for name in ("CHOWN", "SETUID", "SETGID", "SETPCAP") for word in ("--cap-add", f"CAP_{name}")]
    shed = ["/usr/bin/setpriv", "--reuid", str(uid), "--regid", str(gid), "--clear-groups", "--no-new-privs"]
    shed += ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
    return spaces + keep, ["/bin/sh", "-c", _GIVE, "sh", f"{uid}:{gid}", CREDENTIALS_DIR, *shed]
