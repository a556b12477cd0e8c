from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from broker.errors import Code, CortexError
from broker.sandbox import bwrap
from broker.sandbox.bwrap import Shown


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state/slots/other").mkdir(parents=True)
    return tmp_path / "state"


def _shown(words: list[str], state: Path, trees: list[Path] | None = None) -> dict[str, str]:
    return {str(item.path): item.link for item in bwrap.shown_paths(words, trees or [], state)}


def _file(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_command_is_shown_with_what_its_links_lead_to(tmp_path: Path, state: Path) -> None:
    real = _file(tmp_path / "tools/v2/agent")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/agent").symlink_to("../tools/agent")
    (tmp_path / "tools/agent").symlink_to(real)
    assert _shown([str(tmp_path / "bin/agent"), "--flag", "relative"], state) == {
        str(tmp_path / "bin/agent"): "../tools/agent",
        str(tmp_path / "tools/agent"): str(real),
        str(real): "",
    }


def test_a_virtual_environment_comes_whole_and_with_its_python(tmp_path: Path, state: Path) -> None:
    base = tmp_path / "python/bin"
    _file(base / "python3")
    tool = _file(tmp_path / "venv/bin/tool")
    _file(tmp_path / "venv/pyvenv.cfg", f"home = {base}\nversion = 3.11\n")
    assert _shown([str(tool)], state) == {str(tmp_path / "venv"): "", str(tmp_path / "python"): ""}


def test_an_npm_prefix_shows_modules_and_programs_not_the_home_around(tmp_path: Path, state: Path) -> None:
    _file(tmp_path / "home/secret")
    script = _file(tmp_path / "home/.npm/lib/node_modules/agent/cli.js")
    _file(tmp_path / "home/.npm/bin/node")
    link = tmp_path / "home/.npm/bin/agent"
    link.symlink_to("../lib/node_modules/agent/cli.js")
    shown = _shown([str(link)], state)
    assert shown == {str(tmp_path / "home/.npm/bin"): "", str(tmp_path / "home/.npm/lib/node_modules"): ""}
    assert script.exists()


def test_nested_and_base_paths_are_left_out(tmp_path: Path, state: Path) -> None:
    inner = _file(tmp_path / "tree/a/b")
    assert _shown(["/usr/bin/env", "/bin/sh", str(inner)], state, [tmp_path / "tree"]) == {str(tmp_path / "tree"): ""}


def test_other_peoples_homes_are_never_shown(tmp_path: Path, state: Path) -> None:
    secret = _file(state / "homes/x/key")
    (tmp_path / "link").symlink_to(secret)
    assert _shown([str(secret), str(state), "/", "/etc", str(tmp_path)], state) == {}
    assert _shown([str(tmp_path / "link")], state) == {str(tmp_path / "link"): str(secret)}


def test_a_loop_of_links_and_a_missing_command_end(tmp_path: Path, state: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert _shown([str(tmp_path / "a"), str(tmp_path / "none")], state) == {}


@pytest.mark.parametrize("path", ["relative", "/", "/etc", "/root", "/proc/1", "/home", "/run", "/no/such/path"])
def test_visible_refuses_too_much(path: str, state: Path) -> None:
    with pytest.raises(CortexError) as caught:
        bwrap.check_visible([path], state)
    assert caught.value.code is Code.BAD_CONFIG
    assert "sandbox.process.visible" in caught.value.what


def test_visible_refuses_the_state_and_sockets(tmp_path: Path, state: Path) -> None:
    (tmp_path / "alias").symlink_to(state)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "engine.sock"))
        for path in (state, state / "slots", tmp_path, tmp_path / "alias", tmp_path / "engine.sock"):
            with pytest.raises(CortexError):
                bwrap.check_visible([str(path)], state)
    (tmp_path / "runtime").mkdir()
    bwrap.check_visible([str(tmp_path / "runtime"), "/usr/share"], state)


def _view(tmp_path: Path, shown: tuple[Shown, ...]) -> list[str]:
    return bwrap.view_args(bwrap.View(tmp_path / "sock", tmp_path / "vol", tmp_path / "pk", shown, {}))


def test_only_the_volume_is_writable_and_parents_can_be_passed(tmp_path: Path) -> None:
    args = _view(tmp_path, (Shown(Path("/home/dev/.pyenv/versions/3")), Shown(Path("/a/b"), "c")))
    assert [args[i + 1 : i + 3] for i, word in enumerate(args) if word == "--bind"] == [[str(tmp_path / "vol"), "/vol"]]
    for parent in ("/home", "/home/dev", "/home/dev/.pyenv", "/home/dev/.pyenv/versions", "/run", "/opt/cortex"):
        at = next(i for i, word in enumerate(args) if word == "--dir" and args[i + 1] == parent)
        assert args[at - 2 : at] == ["--perms", "0755"]
        assert at < next(i for i, word in enumerate(args) if word.startswith(parent + "/"))
    assert args[-2:] == ["--remount-ro", "/"]
    mounted = {args[i + 1] for i, word in enumerate(args) if word in ("--bind", "--ro-bind")}
    assert mounted.isdisjoint(("/etc/shadow", "/etc", "/home", "/root", "/var", "/run"))


def test_no_private_key_and_no_token_of_the_host_is_mounted(tmp_path: Path) -> None:
    args = _view(tmp_path, ())
    mounted = {args[i + 1] for i, word in enumerate(args) if word == "--ro-bind"}
    assert mounted.isdisjoint(("/etc/ssl", "/etc/ssl/private", "/etc/gitconfig"))
    assert not os.path.exists("/etc/ssl/certs") or "/etc/ssl/certs" in mounted


def test_the_state_directory_is_hidden_in_what_is_shown(tmp_path: Path) -> None:
    for hidden in ("/opt/broker/state", "/usr/local/state"):
        view = bwrap.View(tmp_path / "sock", tmp_path / "vol", tmp_path / "pk", (), {}, Path(hidden))
        args = bwrap.view_args(view)
        at = args.index(hidden, args.index("--tmpfs"))
        assert args[at - 1] == "--tmpfs"
        assert at > max(i for i, word in enumerate(args) if word == "/usr")
        assert args[args.index("--remount-ro") + 1] == hidden
    plain = bwrap.View(tmp_path / "sock", tmp_path / "vol", tmp_path / "pk", (), {}, tmp_path / "state")
    assert str(tmp_path / "state") not in bwrap.view_args(plain)


def test_a_command_cannot_name_the_kernels_file_systems(state: Path) -> None:
    assert _shown(["/proc/1/root", "/proc/self/environ", "/sys/kernel", "/dev/null"], state) == {}


def test_root_sheds_everything_and_others_have_their_own_user_namespace() -> None:
    spaces, shed = bwrap.isolation_args(64321, 64321, root=True)
    assert "--unshare-user" not in spaces
    added = [spaces[i + 1] for i, word in enumerate(spaces) if word == "--cap-add"]
    assert sorted(added) == ["CAP_CHOWN", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"]
    assert shed[-1] == "--bounding-set=-all"
    assert {"--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"} <= set(shed)
    spaces, shed = bwrap.isolation_args(1000, 1000, root=False)
    assert "--unshare-user" in spaces
    assert "--cap-add" not in spaces
    assert shed == []
    for each in (spaces, bwrap.isolation_args(5, 5, root=True)[0]):
        assert {"--unshare-net", "--unshare-pid", "--unshare-ipc"} <= set(each)
        assert "--die-with-parent" not in each
        assert "--share-net" not in each


def test_opt_is_shown_around_the_packages(tmp_path: Path) -> None:
    for name in ("tool", "cortex/packages", "cortex/other"):
        (tmp_path / "opt" / name).mkdir(parents=True)
    args = bwrap._Args()
    bwrap._opt_tree(args, tmp_path / "opt", tmp_path / "opt/cortex/packages")
    mounted = [args.words[i + 2] for i, word in enumerate(args.words) if word == "--ro-bind"]
    assert sorted(os.path.relpath(path, tmp_path) for path in mounted) == ["opt/cortex/other", "opt/tool"]
