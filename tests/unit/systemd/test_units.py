"""The units are what systemd and the settings expect."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from broker.settings import load

UNITS = Path(__file__).parents[3] / "systemd"


def values(unit: str, key: str) -> list[str]:
    text = (UNITS / unit).read_text()
    return [word for line in re.findall(rf"^{key}=(.*)$", text, re.MULTILINE) for word in line.split()]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    files = []
    for unit in sorted(UNITS.glob("*.s*")):
        if unit.suffix in (".service", ".socket"):
            # The program is not installed here; another one stands in for it.
            text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE)
            (tmp_path / unit.name).write_text(text)
            files.append(str(tmp_path / unit.name))
    done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, timeout=30)
    complaints = [line for line in done.stderr.splitlines() if "cortex" in line]
    assert (done.returncode, complaints) == (0, [])


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None or os.geteuid() != 0, reason="needs systemd and root")
def test_systemd_accepts_users_and_directories(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    users = subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", str(UNITS / "cortex.sysusers")], capture_output=True, text=True
    )
    assert users.returncode == 0, users.stderr
    accounts = (tmp_path / "etc" / "passwd").read_text()
    assert re.search(r"^cortex-sandbox:x:64321:64321:", accounts, re.MULTILINE)
    files = subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", str(UNITS / "cortex.tmpfiles")],
        capture_output=True,
        text=True,
    )
    assert files.returncode == 0, files.stderr
    assert (tmp_path / "etc" / "cortex" / "credentials").is_dir()


def test_the_environment_of_the_unit_is_valid_and_names_its_sockets() -> None:
    env = dict(item.split("=", 1) for item in values("cortex.service", "Environment"))
    directories = {"STATE_DIRECTORY": "/var/lib/cortex", "RUNTIME_DIRECTORY": "/run/cortex", "HOME": "/nonexistent"}
    config = load(None, env | directories | {"XDG_CONFIG_HOME": "/nonexistent"}, root=False).config
    assert config.front.listen == f"systemd:{values('cortex.socket', 'FileDescriptorName')[0]}"
    assert config.control.listen == f"systemd:{values('cortex-control.socket', 'FileDescriptorName')[0]}"
    assert config.gateway.mode == "external"
    assert [config.gateway.user] == values("cortex-gateway.service", "User")
    assert values("cortex-gateway.service", "SupplementaryGroups") == values("cortex.service", "Group")
    assert config.gateway.link in values("cortex-gateway.service", "ExecStart")


def test_the_sockets_listen_where_the_defaults_say() -> None:
    config = load(None, {"HOME": "/nonexistent"}, root=False).config
    assert values("cortex.socket", "ListenStream") == [config.front.listen]
    assert values("cortex-control.socket", "ListenStream") == [config.control.listen]


def test_sandboxes_outlive_the_broker_and_bad_settings_do_not_loop() -> None:
    assert values("cortex.service", "Type") == ["notify"]
    assert values("cortex.service", "KillMode") == ["process"]
    assert values("cortex.service", "RestartPreventExitStatus") == ["78"]
    assert values("cortex.service", "WatchdogSec")
