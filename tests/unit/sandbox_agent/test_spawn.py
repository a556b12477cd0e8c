from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sandbox_agent import spawn
from sandbox_agent.spawn import SpawnError, Surroundings


def surroundings(home: Path) -> Surroundings:
    return Surroundings(home=str(home), gateway_port=4180, egress_port=4181, python=sys.executable, package="/pkg")


def _output(child: spawn.Child) -> str:
    os.set_blocking(child.stdout, True)
    with open(child.stdout, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child.pid, 0)
    for number in (child.stdin, child.stderr, child.pidfd):
        os.close(number)
    return data.decode()


def test_placeholders_and_only_they_are_filled_in(tmp_path: Path) -> None:
    places = surroundings(tmp_path).places()
    assert spawn.fill('{"a": "{gateway}/x", "b": {}, "c": "{nothing}"}', places) == (
        '{"a": "http://127.0.0.1:4180/x", "b": {}, "c": "{nothing}"}'
    )


def test_environment_files_and_directory_of_an_agent(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    child = spawn.launch(
        ["sh", "-c", "pwd; echo $HOME $URL $https_proxy $NO_PROXY; cat ~/.conf; echo {port}"],
        {"URL": "{gateway}/v1"},
        {".conf": "home={home}\n"},
        "{home}",
        surroundings(home),
    )
    before = os.getcwd()
    pwd, env, conf, port = _output(child).splitlines()
    assert pwd == str(home)
    assert env == f"{home} http://127.0.0.1:4180/v1 http://127.0.0.1:4181 127.0.0.1,localhost,::1"
    assert conf == f"home={home}"
    assert int(port) == child.port > 0
    assert os.getcwd() == before


def test_the_child_leads_a_session_and_has_default_signals(tmp_path: Path) -> None:
    child = spawn.spawn(["cat", "/proc/self/stat", "/proc/self/status"], dict(os.environ), "/")
    stat, *status = _output(child).splitlines()
    pid, group, session = stat.split()[0], stat.split()[4], stat.split()[5]
    assert pid == group == session == str(child.pid)
    ignored = next(line for line in status if line.startswith("SigIgn:"))
    assert int(ignored.split()[1], 16) & (1 << 31) - 1 == 0  # Python itself ignores SIGPIPE; 32 and 33 are libc's


def test_the_child_inherits_no_descriptor_that_python_opened(tmp_path: Path) -> None:
    stray = os.open("/dev/null", os.O_RDONLY)
    os.dup2(stray, 777, inheritable=False)
    child = spawn.spawn(["ls", "/proc/self/fd"], dict(os.environ), "/")
    os.close(stray)
    os.close(777)
    assert "777" not in _output(child).split()


@pytest.mark.parametrize("command", [["no-such-program"], ["/no/such"], ["/etc/passwd"], ["/etc"], [""], []])
def test_a_program_that_cannot_run_says_so(command: list[str], tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpawnError) as caught:
        spawn.spawn(command, dict(os.environ), "/")
    assert caught.value.code == "agent.not_in_image"
    assert caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_script_whose_interpreter_is_missing(tmp_path: Path) -> None:
    script = tmp_path / "agent"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(SpawnError) as caught:
        spawn.spawn([str(script)], {}, "/")
    assert caught.value.code == "agent.not_in_image"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpawnError):
        spawn.spawn(["true"], dict(os.environ), str(tmp_path / "gone"))


def test_check_looks_in_the_agents_own_path(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    spawn.check(["tool"], {"PATH": "{home}"}, surroundings(tmp_path))
    with pytest.raises(SpawnError):
        spawn.check(["tool"], {}, surroundings(tmp_path))
