"""What only the process driver does, and its suite again as other users."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from broker.config import ProcessConfig
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox import procfs
from broker.sandbox.process import ProcessDriver
from broker.sandbox.process_records import Record, Records
from tests.integration.sandbox.kinds import bwrap_missing
from tests.integration.sandbox.rig import DIALLER, Rig, rig

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
    record.write_text(json.dumps({**json.loads(text), "stage": "starting", "init": None, "monitor": None}))
    world.driver = world.another()
    await world.driver.open()
    assert await world.driver.inspect(ref) == "running"
    assert await peer.run("result = 1") == 1
    waiter = asyncio.ensure_future(world.driver.wait(ref))
    await world.driver.stop(ref, 0.1)
    await asyncio.wait_for(waiter, 10)


@pytest.mark.parametrize("world", ["process", "plain"], indirect=True)
async def test_what_cannot_be_noted_does_not_run(world: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up between the start and the note of it: the slot would be given back, still in use."""
    slot = await world.slot()
    ref = await world.create(slot)
    save = Records.save

    def full(records: Records, record: Record) -> None:
        if record.stage == "running":
            raise CortexError(Code.DISK_FULL, "no space", hint="Make room.")
        save(records, record)

    monkeypatch.setattr(Records, "save", full)
    with pytest.raises(CortexError) as caught:
        await world.driver.start(ref)
    assert caught.value.code is Code.DISK_FULL
    mark = str(slot.spec.sock_dir if world.kind == "plain" else slot.spec.vol_dir).encode()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _mentions(path, mark)]
    assert left == []
    monkeypatch.undo()
    await world.driver.start(ref)
    assert await world.driver.inspect(ref) == "running"


def _mentions(path: Path, word: bytes) -> bool:
    with suppress(OSError):
        return word in path.read_bytes()
    return False


@pytest.mark.parametrize("world", ["process"], indirect=True)
async def test_a_broker_that_dies_while_it_pauses_or_resumes_leaves_none_that_stands_still_unknown(
    world: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, _, _ = await world.up()
    (noted,) = (world.base / "state" / "process").glob("*.json")
    stages: list[str] = []

    def look(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            stages.append(json.loads(noted.read_text())["stage"])
            result = real(*arguments)
            stages.append(json.loads(noted.read_text())["stage"])
            return result

        return call

    monkeypatch.setattr(procfs, "freeze", look(procfs.freeze))
    monkeypatch.setattr(procfs, "thaw", look(procfs.thaw))
    await world.driver.pause(ref)
    await world.driver.resume(ref)
    assert stages == ["paused"] * 4
    assert json.loads(noted.read_text())["stage"] == "running"


@pytest.mark.parametrize("world", ["process"], indirect=True)
async def test_a_pause_that_cannot_be_noted_does_not_happen_and_a_resume_does(
    world: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, _, peer = await world.up()
    save = Records.save

    def full(self: Records, record: Record) -> None:
        raise CortexError(Code.DISK_FULL, "the disk is full", hint="make room")

    monkeypatch.setattr(Records, "save", full)
    with pytest.raises(CortexError, match="disk is full"):
        await world.driver.pause(ref)
    assert await peer.run("result = 1") == 1
    assert await world.driver.inspect(ref) == "running"
    monkeypatch.setattr(Records, "save", save)
    await world.driver.pause(ref)
    monkeypatch.setattr(Records, "save", full)
    await world.driver.resume(ref)
    assert await peer.run("result = 2") == 2
    assert await world.driver.inspect(ref) == "running"


@pytest.mark.parametrize("world", ["process"], indirect=True)
async def test_a_pipe_that_cannot_be_made_is_told(world: Rig) -> None:
    slot = await world.slot()
    ref = await world.create(slot)
    (world.base / f"state/process/{ref}.status").mkdir()
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CortexError):
        await world.driver.start(ref)
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    (world.base / f"state/process/{ref}.status").rmdir()


@pytest.mark.parametrize("world", ["process"], indirect=True)
async def test_a_cancelled_create_leaves_nothing(world: Rig) -> None:
    for _ in range(3):
        slot = await world.slot()
        task = asyncio.ensure_future(world.driver.create(slot.spec))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    async with asyncio.timeout(10):
        while len(world.tasks):
            await asyncio.sleep(0.01)
    assert await world.driver.list() == []
    assert not list((world.base / "state/process").glob("*.json"))


@pytest.mark.parametrize("place", ["/opt", "/usr/local"])
@pytest.mark.skipif(os.getuid() != 0 or bool(bwrap_missing()), reason="needs root and bubblewrap")
async def test_state_below_what_is_shown_is_hidden(place: str) -> None:
    def make(tasks: TaskOwner, installation: str, state: Path) -> ProcessDriver:
        entry = (sys.executable, "-I", "-S", str(DIALLER))
        return ProcessDriver(ProcessConfig(), installation=installation, state_dir=state, tasks=tasks, entry=entry)

    base = Path(tempfile.mkdtemp(prefix="cortex-rig-", dir=place))
    base.chmod(0o755)
    try:
        async with rig("process", make, base) as world:
            _, _, peer = await world.up()
            (base / "state/readable").touch(mode=0o644)
            assert await peer.run(f"import os; result = os.listdir({str(base / 'state')!r})") == []
            assert await peer.fails(f"open({str(base / 'state/x')!r}, 'w')")
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.skipif(os.getuid() != 0, reason="runs as an ordinary user already")
@pytest.mark.skipif(bool(bwrap_missing()), reason="bubblewrap is not installed")
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
    chosen = "process and (life or privilege or network or adopts)" if capabilities else "process or plain"
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("driver_conformance", "isolation")]
    command = [*become, python or sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(root), "-c", str(root / "pyproject.toml"), *files, "-k", chosen]
    done = subprocess.run(command, env=env, cwd="/tmp", capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
