"""What every driver must do. Docker, bubblewrap (as whoever runs the tests), plain processes, the fake.

Run by root, the suite runs the bubblewrap part once more as a user without privileges.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.config import DockerConfig, ProcessConfig
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox.docker import DockerDriver
from broker.sandbox.driver import SandboxDriver
from broker.sandbox.fake import FakeDriver, FakeEngine
from broker.sandbox.process import ProcessDriver
from broker.sandbox.procfs import tree
from tests.integration.sandbox.rig import DIALLER, Rig, rig

IMAGE = os.environ.get("CORTEX_TEST_IMAGE", "cortex-sandbox:latest")
SUITE_IN_DOCKER = "/opt/cortex/packages/dialler.py"


def _docker_missing() -> str:
    if os.environ.get("CORTEX_TEST_DOCKER") == "required":
        return ""
    command = ["docker", "image", "inspect", IMAGE]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else f"no Docker Engine with image {IMAGE}"


def _docker(tasks: TaskOwner, installation: str, state: Path) -> SandboxDriver:
    config = DockerConfig(image=IMAGE, memory_bytes=256 * 2**20, cpus=1, pids=64, tmp_bytes=16 * 2**20)
    entry = ("python3", "-I", "-S", SUITE_IN_DOCKER)
    return DockerDriver(config, installation=installation, node="here", tasks=tasks, entry=entry, state_dir=state)


def _process(tasks: TaskOwner, installation: str, state: Path) -> SandboxDriver:
    entry = (sys.executable, "-I", "-S", str(DIALLER))
    return ProcessDriver(ProcessConfig(), installation=installation, state_dir=state, tasks=tasks, entry=entry)


def _plain(tasks: TaskOwner, installation: str, state: Path) -> SandboxDriver:
    entry = (sys.executable, "-I", "-S", str(DIALLER))
    return ProcessDriver(
        ProcessConfig(allow_unisolated=True),
        installation=installation,
        state_dir=state,
        tasks=tasks,
        entry=entry,
        bwrap_path="no-bwrap-here",
    )


def _bwrap_missing() -> str:
    return "" if shutil.which("bwrap") else "bubblewrap is not installed"


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    made = FakeEngine()
    yield made
    await made.close()


@pytest.fixture
async def world(request: pytest.FixtureRequest, engine: FakeEngine) -> AsyncIterator[Rig]:
    kind = str(request.param)
    missing = {"docker": _docker_missing, "process": _bwrap_missing}.get(kind, str)()
    if missing:
        pytest.skip(missing)

    def fake(tasks: TaskOwner, installation: str, state: Path) -> SandboxDriver:
        return FakeDriver(engine, installation=installation)

    make = {"docker": _docker, "process": _process, "plain": _plain, "fake": fake}[kind]
    async with rig(kind, make) as made:
        (made.base / "packages").mkdir()
        shutil.copy(DIALLER, made.base / "packages")
        yield made


DOCKER = pytest.param("docker", marks=pytest.mark.docker)
EVERY = pytest.mark.parametrize("world", [DOCKER, "process", "plain", "fake"], indirect=True)
REAL = pytest.mark.parametrize("world", [DOCKER, "process", "plain"], indirect=True)
ISOLATED = pytest.mark.parametrize("world", [DOCKER, "process"], indirect=True)


async def _started(world: Rig) -> str:
    """A running sandbox, whatever speaks in it."""
    slot = await world.slot()
    ref = await world.create(slot)
    await world.driver.start(ref)
    if world.kind != "fake":
        await slot.peer()
    return ref


async def _found(driver: SandboxDriver, ref: str) -> Any:
    return next((found for found in await driver.list() if found.ref == ref), None)


# Life


@EVERY
async def test_life_from_create_to_gone(world: Rig) -> None:
    slot = await world.slot()
    ref = await world.create(slot)
    assert await world.driver.inspect(ref) == "created"
    await world.driver.start(ref)
    assert await world.driver.inspect(ref) == "running"
    found = await _found(world.driver, ref)
    assert (found.slot, found.incarnation, found.liveness) == (slot.spec.slot, 1, "running")
    await world.driver.pause(ref)
    assert await world.driver.inspect(ref) == "paused"
    await world.driver.pause(ref)
    await world.driver.resume(ref)
    assert await world.driver.inspect(ref) == "running"
    waiter = asyncio.ensure_future(world.driver.wait(ref))
    await world.driver.stop(ref, 5)
    await asyncio.wait_for(waiter, 10)
    assert await world.driver.inspect(ref) == "exited"
    await world.driver.stop(ref, 5)
    await world.driver.remove(ref)
    assert await world.driver.inspect(ref) == "gone"
    assert await _found(world.driver, ref) is None


@EVERY
async def test_what_is_gone_can_be_stopped_and_removed_again(world: Rig) -> None:
    ref = await _started(world)
    await world.driver.remove(ref)
    await world.driver.remove(ref)
    await world.driver.stop(ref, 1)
    assert (await asyncio.wait_for(world.driver.wait(ref), 10)).code is None
    with pytest.raises(CortexError) as caught:
        await world.driver.start(ref)
    assert caught.value.code is Code.SANDBOX_DIED


@EVERY
async def test_starts_again_after_it_ended(world: Rig) -> None:
    ref = await _started(world)
    await world.driver.stop(ref, 0.1)
    await world.driver.start(ref)
    assert await world.driver.inspect(ref) == "running"
    waiter = asyncio.ensure_future(world.driver.wait(ref))
    done, _ = await asyncio.wait([waiter], timeout=0.2)
    assert not done
    await world.driver.remove(ref)
    await asyncio.wait_for(waiter, 10)


@EVERY
async def test_a_wait_can_be_cancelled_and_repeated(world: Rig) -> None:
    ref = await _started(world)
    first = asyncio.ensure_future(world.driver.wait(ref))
    second = asyncio.ensure_future(world.driver.wait(ref))
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.wait([first])
    await world.driver.stop(ref, 0.1)
    await asyncio.wait_for(second, 10)
    await asyncio.wait_for(world.driver.wait(ref), 10)


@EVERY
async def test_lists_only_what_is_of_its_installation(world: Rig) -> None:
    ref = await _started(world)
    if world.kind in ("docker", "fake"):
        neighbour = world.another("neighbour")
        await neighbour.open()
        assert await _found(neighbour, ref) is None
        await neighbour.close()
    assert [found.ref for found in await world.driver.list()] == [ref]


@EVERY
async def test_a_create_that_was_repeated_leaves_one(world: Rig) -> None:
    slot = await world.slot()
    await world.create(slot)
    ref = await world.create(slot)
    assert [found.ref for found in await world.driver.list()] == [ref]


@EVERY
async def test_a_new_driver_adopts_what_runs(world: Rig) -> None:
    slot = await world.slot()
    ref = await world.create(slot)
    await world.driver.start(ref)
    before = None if world.kind == "fake" else await slot.peer()
    created = await world.create(await world.slot())

    world.driver = world.another()
    await world.driver.open()
    assert {(f.ref, f.liveness) for f in await world.driver.list()} == {(ref, "running"), (created, "created")}
    if before is not None:
        before.close()
        assert (await slot.peer()).pid == before.pid
    waiter = asyncio.ensure_future(world.driver.wait(ref))
    await world.driver.pause(ref)
    await world.driver.resume(ref)
    await world.driver.stop(ref, 5)
    await asyncio.wait_for(waiter, 10)
    await world.driver.start(created)
    assert await world.driver.inspect(created) == "running"


@EVERY
async def test_a_paused_sandbox_can_be_adopted_stopped_and_removed(world: Rig) -> None:
    first, second = await _started(world), await _started(world)
    await world.driver.pause(first)
    await world.driver.pause(second)
    world.driver = world.another()
    await world.driver.open()
    assert await world.driver.inspect(first) == "paused"
    await world.driver.stop(first, 2)
    assert await world.driver.inspect(first) == "exited"
    await world.driver.remove(second)
    assert await world.driver.inspect(second) == "gone"


@EVERY
async def test_many_at_once(world: Rig) -> None:
    refs = await asyncio.gather(*(_started(world) for _ in range(4)))
    assert {found.ref for found in await world.driver.list()} == set(refs)
    waiters = [asyncio.ensure_future(world.driver.wait(ref)) for ref in refs]
    await asyncio.gather(*(world.driver.remove(ref) for ref in refs))
    await asyncio.wait_for(asyncio.gather(*waiters), 20)
    assert await world.driver.list() == []


# Death


def _host_pid(world: Rig, ref: str) -> int:
    """A pid on the host whose death is the sandbox's."""
    if world.kind == "docker":
        command = ["docker", "inspect", "-f", "{{.State.Pid}}", ref]
        return int(subprocess.run(command, capture_output=True, check=True, timeout=20).stdout)
    assert isinstance(world.driver, ProcessDriver)
    init = world.driver._boxes[ref].record.init
    assert init is not None
    return init.pid


@REAL
async def test_a_kill_from_outside_is_seen(world: Rig) -> None:
    ref = await _started(world)
    waiter = asyncio.ensure_future(world.driver.wait(ref))
    await asyncio.sleep(0.05)
    os.kill(_host_pid(world, ref), signal.SIGKILL)
    end = await asyncio.wait_for(waiter, 10)
    assert end.code == 137
    assert "dialler is up" in end.tail
    assert await world.driver.inspect(ref) == "exited"


@REAL
async def test_a_kill_is_seen_by_the_driver_that_adopted_it(world: Rig) -> None:
    ref = await _started(world)
    world.driver = world.another()
    await world.driver.open()
    waiter = asyncio.ensure_future(world.driver.wait(ref))
    os.kill(_host_pid(world, ref), signal.SIGKILL)
    await asyncio.wait_for(waiter, 10)
    assert await world.driver.inspect(ref) == "exited"


@REAL
async def test_exit_code_and_last_words(world: Rig) -> None:
    ref, _, peer = await world.up()
    with pytest.raises((AssertionError, ValueError)):
        await peer.run("import os, sys; print('so long', file=sys.stderr, flush=True); os._exit(7)")
    end = await asyncio.wait_for(world.driver.wait(ref), 10)
    assert (end.code, end.oom) == (7, False)
    assert "so long" in end.tail


@REAL
async def test_a_flood_of_output_blocks_nothing_and_is_cut(world: Rig) -> None:
    ref, _, peer = await world.up()
    flood = (
        "import os\nfor _ in range(200):\n try: os.write(2, b'x' * 60000)\n except BlockingIOError: pass\nresult = 1"
    )
    assert await peer.run(flood) == 1
    await world.driver.stop(ref, 0.1)
    assert len((await world.driver.wait(ref)).tail) <= 4096


@REAL
async def test_sigterm_is_ignored_and_sigkill_is_not(world: Rig) -> None:
    ref, _, peer = await world.up()
    await peer.run("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    began = time.monotonic()
    await world.driver.stop(ref, 1)
    assert time.monotonic() - began >= 0.9
    assert await world.driver.inspect(ref) == "exited"


@REAL
async def test_sigterm_reaches_the_agent_server(world: Rig) -> None:
    ref, slot, peer = await world.up()
    path = "home/left" if world.kind != "plain" else f"{slot.spec.vol_dir}/home/left"
    path = f"/vol/{path}" if world.kind != "plain" else path
    await peer.run(
        f"import signal, os\ndef bye(*_): open({path!r}, 'w').close(); os._exit(0)\nsignal.signal(signal.SIGTERM, bye)"
    )
    await world.driver.stop(ref, 10)
    assert (slot.spec.vol_dir / "home/left").exists()


STRAY = "import subprocess; result = subprocess.Popen(['sleep', '1000'], start_new_session=True).pid"


@REAL
async def test_no_process_of_it_outlives_it(world: Rig) -> None:
    ref, _, peer = await world.up()
    await peer.run(STRAY)
    pids = tree(_host_pid(world, ref))
    sleeper = [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"]
    assert sleeper
    await world.driver.remove(ref)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists() and not _zombie(pid)]


def _zombie(pid: int) -> bool:
    return ") Z" in Path(f"/proc/{pid}/stat").read_text()


@REAL
async def test_a_paused_sandbox_does_nothing(world: Rig) -> None:
    ref, _, peer = await world.up()
    await peer.run(STRAY)
    await world.driver.pause(ref)
    answer = asyncio.ensure_future(peer.run("result = 42"))
    done, _ = await asyncio.wait([answer], timeout=0.3)
    assert not done
    await world.driver.resume(ref)
    assert await asyncio.wait_for(answer, 10) == 42


@REAL
async def test_it_runs_on_when_the_driver_closes(world: Rig) -> None:
    ref, _, peer = await world.up()
    await world.driver.close()
    assert await peer.run("result = 1") == 1
    await world.driver.open()
    assert await world.driver.inspect(ref) == "running"


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
    ids = await peer.run("import os; result = [*os.getresuid(), *os.getresgid(), *os.getgroups()]")
    assert set(ids) == {slot.spec.uid, slot.spec.group} or set(ids) == {slot.spec.uid}
    assert await peer.fails("open('/etc/shadow').read()")
    assert "PermissionError" in await peer.fails("import os; os.setuid(0)")
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


# When the engine is not well


async def _refused(driver: SandboxDriver, code: Code, hint: str) -> CortexError:
    began = time.monotonic()
    with pytest.raises(CortexError) as caught:
        await driver.open()
    assert caught.value.code is code
    assert hint in caught.value.hint
    assert time.monotonic() - began < 8
    await driver.close()
    return caught.value


async def _docker_at(monkeypatch: pytest.MonkeyPatch, host: str, **changes: Any) -> DockerDriver:
    monkeypatch.setenv("DOCKER_HOST", host)
    config = DockerConfig(**{"image": IMAGE, "call_timeout_s": 0.5, **changes})
    return DockerDriver(config, installation="none", node="here", tasks=TaskOwner("docker"))


async def test_an_engine_that_is_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = await _docker_at(monkeypatch, f"unix://{tmp_path}/none.sock")
    await _refused(driver, Code.ENGINE_DOWN, "systemctl start docker")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "dead.sock"))
    dead.close()
    await _refused(await _docker_at(monkeypatch, f"unix://{tmp_path}/dead.sock"), Code.ENGINE_DOWN, "Docker Engine")


async def test_an_engine_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(tmp_path / "hung.sock"))
        hung.listen(8)
        driver = await _docker_at(monkeypatch, f"unix://{tmp_path}/hung.sock")
        await _refused(driver, Code.ENGINE_TIMEOUT, "docker version")
        for call in (driver.list(), driver.start("x"), driver.remove("x"), driver.stop("x", 0.1), driver.inspect("x")):
            began = time.monotonic()
            with pytest.raises(CortexError) as caught:
                await call
            assert caught.value.code is Code.ENGINE_TIMEOUT
            assert time.monotonic() - began < 4
        await driver.close()


async def test_an_engine_that_answers_rubbish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def rubbish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        writer.close()

    server = await asyncio.start_unix_server(rubbish, tmp_path / "ssh.sock")
    await _refused(await _docker_at(monkeypatch, f"unix://{tmp_path}/ssh.sock"), Code.ENGINE_DOWN, "Docker Engine")
    server.close()


async def test_no_engine_address(monkeypatch: pytest.MonkeyPatch) -> None:
    await _refused(await _docker_at(monkeypatch, "gopher://x"), Code.BAD_CONFIG, "unix:///var/run/docker.sock")


@pytest.mark.docker
@pytest.mark.skipif(bool(_docker_missing()), reason=_docker_missing())
async def test_image_and_runtime_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    driver = await _docker_at(monkeypatch, host, image="cortex-none:none", call_timeout_s=5)
    await _refused(driver, Code.IMAGE_MISSING, "make image")
    driver = await _docker_at(monkeypatch, host, runtime="no-such-runtime", call_timeout_s=5)
    await _refused(driver, Code.ENGINE_ERROR, "daemon.json")


@pytest.mark.parametrize("world", [DOCKER], indirect=True)
async def test_a_wait_outlasts_an_engine_that_is_away(world: Rig, tmp_path: Path, monkeypatch: Any) -> None:
    """The way to the engine is cut and comes back: the end of a sandbox in between is learned."""
    ref, _, _ = await world.up()
    way = _Way(tmp_path / "way.sock")
    await way.open()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{way.path}")
    driver = world.another()
    await driver.open()
    waiter = asyncio.ensure_future(driver.wait(ref))
    await asyncio.sleep(0.2)
    way.cut()
    await world.driver.stop(ref, 0.1)
    done, _ = await asyncio.wait([waiter], timeout=0.3)
    assert not done
    await way.open()
    assert (await asyncio.wait_for(waiter, 15)).code is not None
    await driver.close()
    way.cut()


class _Way:
    """Passes bytes to the real engine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._pass, self.path)

    def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)
        for writer in self._open:
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection("/var/run/docker.sock")
        self._open |= {writer, back}

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    target.write(data)
            except OSError:
                pass
            target.transport.abort()

        await asyncio.gather(pump(reader, back), pump(there, writer))


# The process driver's own


async def test_no_bubblewrap_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    tasks = TaskOwner("none")
    driver = ProcessDriver(
        ProcessConfig(), installation="x", state_dir=tmp_path / "state", tasks=tasks, bwrap_path="no-bwrap-here"
    )
    with pytest.raises(CortexError) as caught:
        await driver.open()
    assert caught.value.code is Code.ISOLATION_MISSING
    assert "apt install bubblewrap" in caught.value.hint
    assert "allow_unisolated" in caught.value.hint


@pytest.mark.parametrize("world", ["plain"], indirect=True)
async def test_without_isolation_the_paths_are_the_hosts(world: Rig) -> None:
    _, slot, peer = await world.up()
    assert world.driver.isolated is False
    argv = await peer.run("import sys; result = sys.argv[1:]")
    assert argv == ["--socket-dir", str(slot.spec.sock_dir), "--vol", str(slot.spec.vol_dir)]
    assert await peer.run("import os; result = os.environ['HOME']") == str(slot.spec.vol_dir / "home")
    assert await peer.run("import os; result = os.getuid()") == os.getuid()


@pytest.mark.parametrize("world", ["process"], indirect=True)
async def test_a_sandbox_survives_a_killed_broker(world: Rig) -> None:
    """Another process starts it and is killed at once; it is found by its record, or by its command line."""
    slot = await world.slot()
    script = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from broker.config import ProcessConfig\n"
        "from broker.host.tasks import TaskOwner\n"
        "from broker.sandbox.driver import SandboxSpec\n"
        "from broker.sandbox.process import ProcessDriver\n"
        "state, name, slot, sock, vol, packages, uid, entry = sys.argv[1:]\n"
        "async def main():\n"
        "    driver = ProcessDriver(ProcessConfig(), installation=name, state_dir=Path(state),\n"
        "        tasks=TaskOwner('t'), entry=(sys.executable, '-I', '-S', entry))\n"
        "    await driver.open()\n"
        "    spec = SandboxSpec(slot, 1, Path(sock), Path(vol), Path(packages), int(uid))\n"
        "    await driver.start(await driver.create(spec))\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    spec = slot.spec
    where = [world.base / "state", "test", spec.slot, spec.sock_dir, spec.vol_dir, spec.packages_dir, spec.uid, DIALLER]
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", script, *map(str, where))
    assert await asyncio.wait_for(child.wait(), 30) == -9
    peer = await slot.peer()
    ref = f"{spec.slot}.1"
    record = world.base / f"state/process/{ref}.json"
    text = record.read_text()
    world.refs.append(ref)

    # As if the kill had come before the pids were noted.
    import json

    record.write_text(json.dumps({**json.loads(text), "stage": "starting", "init": None, "monitor": None}))
    world.driver = world.another()
    await world.driver.open()
    assert await world.driver.inspect(ref) == "running"
    assert await peer.run("result = 1") == 1
    waiter = asyncio.ensure_future(world.driver.wait(ref))
    await world.driver.stop(ref, 0.1)
    await asyncio.wait_for(waiter, 10)


@pytest.mark.skipif(os.getuid() != 0, reason="runs as an ordinary user already")
@pytest.mark.skipif(bool(_bwrap_missing()), reason="bubblewrap is not installed")
@pytest.mark.parametrize("capabilities", [False, True], ids=["developer", "service"])
def test_all_of_it_as_a_user_without_privileges(capabilities: bool) -> None:
    """``service``: with the capabilities that a unit gives the broker, which bubblewrap must not see."""
    root = Path(__file__).resolve().parents[3]
    site = next(path for path in sys.path if path.endswith("site-packages"))
    python = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin:/usr/local/bin")
    become = ["setpriv", "--reuid", "61234", "--regid", "61234", "--clear-groups"]
    keep = "+chown,+dac_override,+fowner"
    become += [f"--inh-caps={keep}", f"--ambient-caps={keep}"] if capabilities else []
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{root}:{site}", "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    probe = [*become, python or sys.executable, "-c", "import pytest, pydantic_core, broker.sandbox.process"]
    if subprocess.run(probe, env=env, cwd="/", capture_output=True, timeout=30, check=False).returncode != 0:
        pytest.skip("another user cannot read this checkout or has no Python of this version")
    chosen = "process or plain" if not capabilities else "process and (life or privilege or network or adopts)"
    command = [
        *become,
        python or sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(root),
    ]
    command += ["-c", str(root / "pyproject.toml"), str(Path(__file__)), "-k", chosen]
    done = subprocess.run(command, env=env, cwd="/tmp", capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
