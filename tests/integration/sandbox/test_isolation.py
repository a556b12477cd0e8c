"""What a sandbox must not see, reach or do, looked for from inside."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from tests.integration.sandbox.kinds import DOCKER, ISOLATED
from tests.integration.sandbox.rig import Rig

# Isolation


@ISOLATED
async def test_sees_its_slot_and_nothing_of_the_host(world: Rig) -> None:
    _, slot, peer = await world.up()
    other = await world.slot()
    (other.spec.vol_dir / "home/secret").write_text("theirs")
    assert await peer.run("import os; result = sorted(os.listdir('/run/cortex'))") == ["agent"]
    assert await peer.run("result = open('/opt/cortex/packages/tool').read()") == "shared"
    for path in (other.root, slot.root, world.base / "state", Path("/var/run/docker.sock"), Path("/run/docker.sock")):
        assert await peer.run(f"import os; result = os.path.lexists({str(path)!r})") is False, path
    assert await peer.run("import os; result = [p for p in os.listdir('/proc') if p.isdigit() and int(p) > 50]") == []


@ISOLATED
async def test_a_home_renamed_in_is_seen_and_writable(world: Rig) -> None:
    _, slot, peer = await world.up()
    theirs = world.base / "theirs"
    theirs.mkdir()
    (theirs / "notes").write_text("mine")
    os.chown(theirs, slot.spec.uid, slot.spec.group)
    (slot.spec.vol_dir / "home").rmdir()
    theirs.rename(slot.spec.vol_dir / "home")
    assert await peer.run("result = open('/vol/home/notes').read()") == "mine"
    await peer.run("open('/vol/home/more', 'w').write('x')")
    assert (slot.spec.vol_dir / "home/more").stat().st_uid == slot.spec.uid


@ISOLATED
async def test_has_no_network(world: Rig) -> None:
    _, _, peer = await world.up()
    assert await peer.run("import socket; result = [name for _, name in socket.if_nameindex()]") == ["lo"]
    for host in ("1.1.1.1", "169.254.169.254", "172.17.0.1"):
        error = await peer.fails(f"import socket; socket.create_connection(({host!r}, 80), 3)")
        assert "unreachable" in error, error
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert "refused" in await peer.fails(f"import socket; socket.create_connection(('127.0.0.1', {port}), 3)")


@ISOLATED
async def test_loopback_works_inside(world: Rig) -> None:
    _, _, peer = await world.up()
    assert (
        await peer.run(
            "import socket\n"
            "with socket.create_server(('127.0.0.1', 4180)):\n"
            "    socket.create_connection(('127.0.0.1', 4180), 3).close()\n"
            "result = 'ok'"
        )
        == "ok"
    )


@ISOLATED
async def test_cannot_write_where_it_must_not(world: Rig) -> None:
    _, slot, peer = await world.up()
    targets = ["/run/cortex/x", "/opt/cortex/packages/x", "/etc/x", "/usr/x", "/x", "/dev/x", "/opt/x"]
    if slot.spec.uid != os.getuid():
        targets.append("/vol/x")
    for target in targets:
        error = await peer.fails(f"open({target!r}, 'w')")
        assert "PermissionError" in error or "Read-only" in error, (target, error)
    assert await peer.fails("import os; os.unlink('/run/cortex/agent')")
    for target in ("/vol/home/x", "/tmp/x", "/dev/shm/x"):
        await peer.run(f"open({target!r}, 'w').write('ok')")
    await peer.run("import os, subprocess; open('/tmp/t', 'w').write('#!/bin/sh\\nexit 0'); os.chmod('/tmp/t', 0o755)")
    assert await peer.run("import subprocess; result = subprocess.run(['/tmp/t']).returncode") == 0


@ISOLATED
async def test_has_no_privilege_and_cannot_gain_one(world: Rig) -> None:
    _, slot, peer = await world.up()
    status = await peer.run("result = dict(l.split(':', 1) for l in open('/proc/self/status'))")
    sets = {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert not any(sets.values()), sets
    assert status["NoNewPrivs"].strip() == "1"
    if world.kind == "docker":
        assert status["Seccomp"].strip() == "2"
    ids = await peer.run("import os; result = [*os.getresuid(), *os.getresgid(), *os.getgroups()]")
    assert set(ids) == {slot.spec.uid, slot.spec.group} or set(ids) == {slot.spec.uid}
    assert await peer.fails("open('/etc/shadow').read()")
    assert await peer.fails("import os; os.setuid(0)")
    assert await peer.fails("import os; os.chown('/vol/home', 0, 0)")


@ISOLATED
async def test_inherits_no_descriptor_and_no_variable(world: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_CANARY", "secret")
    with socket.socket() as leak:
        leak.set_inheritable(True)
        _, _, peer = await world.up()
        code = "import os; result = {f: os.readlink(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd') if "
        fds = await peer.run(code + "os.path.lexists(f'/proc/self/fd/{f}')}")
        assert len(fds) == 4, fds
    assert await peer.run("import os; result = os.environ.get('CORTEX_CANARY')") is None
    assert await peer.run("import os; result = os.environ['HOME']") == "/vol/home"
    init = await peer.run("result = ''\ntry: result = open('/proc/1/environ').read()\nexcept OSError: pass")
    assert "CANARY" not in init


@ISOLATED
async def test_knows_who_it_is(world: Rig) -> None:
    """Node and git fail for a uid without a passwd entry."""
    _, _, peer = await world.up()
    entry = await peer.run("import os, pwd; e = pwd.getpwuid(os.getuid()); result = [e.pw_dir, e.pw_shell]")
    assert entry == ["/vol/home", "/bin/sh"]
    assert await peer.run("import os, grp; result = grp.getgrgid(os.getgid()).gr_gid == os.getgid()") is True


@ISOLATED
async def test_orphans_inside_are_reaped(world: Rig) -> None:
    _, _, peer = await world.up()
    await peer.run("import subprocess; subprocess.run(['sh', '-c', 'for i in 1 2 3 4 5; do (true &) ; done'])")
    count = (
        "import os, time\n"
        "def stats(): return [open(f'/proc/{p}/stat').read() for p in os.listdir('/proc') if p.isdigit()]\n"
        "def zombies(): return sum(') Z' in stat for stat in stats())\n"
        "end = time.monotonic() + 5\n"
        "while zombies() and time.monotonic() < end: time.sleep(0.01)\n"
        "result = zombies()"
    )
    assert await peer.run(count) == 0


@pytest.mark.parametrize("world", [DOCKER], indirect=True)
async def test_limits_hold(world: Rig) -> None:
    ref, _, peer = await world.up(memory_bytes=64 * 2**20)
    forks = "import subprocess\nkids = []\ntry:\n for _ in range(100): kids.append(subprocess.Popen(['sleep', '5']))\n"
    forks += "except OSError as e: result = str(e)\nfor k in kids: k.kill(); k.wait()"
    assert "unavailable" in await peer.run(forks)
    with pytest.raises((AssertionError, ValueError)):
        await peer.run("x = bytearray(200 * 2**20); result = len(x)")
    end = await asyncio.wait_for(world.driver.wait(ref), 10)
    assert (end.code, end.oom) == (137, True)
