from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sandbox_agent import boot
from sandbox_agent.__main__ import dependency_dirs
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import Hello, Preamble, Welcome

ENTRY = Path(boot.__file__).with_name("__main__.py")
ROOT = ENTRY.parents[1]


def test_the_hand_made_messages_are_the_real_ones(tmp_path: Path) -> None:
    path = str(tmp_path / "agent")
    welcome = Welcome(incarnation=1, secret=b"x").encode()
    seen: list[dict[str, object]] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            sock, _ = listener.accept()
            decoder = codec.Decoder()
            while len(seen) < 2:
                seen.extend(decoder.feed(sock.recv(4096)))
            sock.sendall(codec.pack(welcome))
            sock.close()

        thread = threading.Thread(target=answer)
        thread.start()
        control, got = boot.greet(path)
        thread.join()
    control.close()
    assert Preamble.decode(seen[0]) == Preamble(kind="control", version=codec.VERSION)
    assert Hello.decode(seen[1]) == Hello(pid=os.getpid())
    assert got == welcome


def test_arguments() -> None:
    assert boot.parse(["--socket-dir", "/a", "--vol", "/b/../c"]) == ("/a", "/c")
    for wrong in ([], ["--vol", "/b"], ["--vol", "/b", "--vol", "/c"], ["--socket-dir", "/a", "--vol", "/b", "x"]):
        with pytest.raises(ValueError):
            boot.parse(wrong)


def test_no_broker_is_an_end_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "BOOT_TIMEOUT_S", 0.2)
    with pytest.raises(TimeoutError, match="no welcome"):
        boot.first_welcome(str(tmp_path / "agent"))


def test_a_taken_port_is_replaced() -> None:
    first = boot.listen(0)
    second = boot.listen(first.getsockname()[1])
    assert second.getsockname()[1] != first.getsockname()[1]
    first.close()
    second.close()


GUARDED = """
import sys; sys.path += {path!r}
import ctypes, os
from sandbox_agent import boot
boot.guard()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), os.get_inheritable({stray}))
"""


def test_guarded_means_undumpable_and_no_stray_descriptor_for_the_agent() -> None:
    read, stray = os.pipe()
    program = GUARDED.format(path=[str(ROOT), *dependency_dirs()], stray=stray)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], pass_fds=[stray], stdout=subprocess.PIPE, check=True, timeout=10
    )
    os.close(read)
    os.close(stray)
    assert done.stdout.split() == [b"0", b"False"]


def test_dependencies_are_found_next_to_the_package_first_then_at_the_interpreter(tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    (lib / "msgpack").mkdir(parents=True)
    assert dependency_dirs(str(tmp_path))[0] == str(lib)
    assert dependency_dirs(str(tmp_path / "elsewhere"))


def test_boot_imports_nothing_slow(tmp_path: Path) -> None:
    """Everything before the hello: no asyncio, no dataclasses, no json."""
    program = (
        f"import sys; sys.path += {[str(ROOT), *dependency_dirs()]!r}; import sandbox_agent.boot; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, check=True, timeout=10)
    loaded = set(done.stdout.decode().split())
    assert "sandbox_agent.boot" in loaded
    slow = loaded & {"asyncio", "dataclasses", "inspect", "json", "logging", "subprocess", "ssl"}
    assert not slow


def test_wrong_arguments_end_with_64() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", str(ENTRY)], capture_output=True, check=False, timeout=10)
    assert done.returncode == 64
    assert b"--socket-dir" in done.stderr
