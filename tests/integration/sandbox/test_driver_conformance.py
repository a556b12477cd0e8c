"""What every driver must do: the life and the death of sandboxes.

Docker, bubblewrap (as whoever runs the tests; test_process_driver runs it as others), plain
processes and the fake.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.sandbox import ram_dirs
from broker.sandbox.driver import CREDENTIALS_BYTES, SandboxDriver
from broker.sandbox.process import ProcessDriver
from broker.sandbox.procfs import tree
from tests.integration.sandbox.kinds import EVERY, REAL
from tests.integration.sandbox.rig import UID, Rig


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
    assert {f.image for f in await world.driver.list()} == {await world.driver.prepare_image()}
    if before is not None:
        await before.close()
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
async def test_what_sandboxes_are_made_from_has_an_id_that_stays(world: Rig) -> None:
    image = await world.driver.prepare_image()
    assert await world.driver.prepare_image() == image
    assert bool(image) == (world.kind in ("docker", "fake"))


@EVERY
async def test_the_memory_of_a_sandbox_is_told_whether_it_runs_or_is_paused(world: Rig) -> None:
    ref = await _started(world)
    running = await world.driver.memory(ref)
    assert 2**20 < running < 2**30
    await world.driver.pause(ref)
    assert 2**20 < await asyncio.wait_for(world.driver.memory(ref), 10) < 2**30
    await world.driver.remove(ref)
    with pytest.raises(CortexError) as caught:
        await world.driver.memory(ref)
    assert caught.value.code is Code.SANDBOX_DIED


@REAL
async def test_memory_is_that_of_all_its_processes(world: Rig) -> None:
    ref, _, peer = await world.up()
    before = await world.driver.memory(ref)
    hog = "import sys, time; held = bytearray(48 * 2**20); print(len(held), flush=True); time.sleep(1000)"
    started = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hog!r}], stdout=subprocess.PIPE)"
    assert await peer.run(f"{started}; result = p.stdout.readline().decode()") == f"{48 * 2**20}\n"
    assert await world.driver.memory(ref) - before > 40 * 2**20


@EVERY
async def test_many_at_once(world: Rig) -> None:
    refs = await asyncio.gather(*(_started(world) for _ in range(4)))
    assert {found.ref for found in await world.driver.list()} == set(refs)
    waiters = [asyncio.ensure_future(world.driver.wait(ref)) for ref in refs]
    await asyncio.gather(*(world.driver.remove(ref) for ref in refs))
    await asyncio.wait_for(asyncio.gather(*waiters), 20)
    assert await world.driver.list() == []


# Credentials

LOOK = (
    "import os, stat\n"
    "found = os.lstat({path!r})\n"
    "mounts = dict(line.split(' ')[1:4:2] for line in open('/proc/self/mounts'))\n"
    "kinds = dict(line.split(' ')[1:3] for line in open('/proc/self/mounts'))\n"
    "space = os.statvfs({path!r})\n"
    "result = [oct(found.st_mode), found.st_uid, found.st_uid == os.getuid(), os.listdir({path!r}), \n"
    "    kinds.get({path!r}), mounts.get({path!r}), space.f_frsize * space.f_blocks]"
)
WRITE = (
    "import os\n"
    "file = os.open({path!r} + '/key', os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)\n"
    "result = os.write(file, b'secret')"
)


@REAL
async def test_it_has_a_private_place_in_memory_for_credentials(world: Rig) -> None:
    ref, slot, peer = await world.up()
    path = world.driver.credentials_dir(slot.spec.slot, 1)
    mode, uid, own, content, kind, options, size = await peer.run(LOOK.format(path=path))
    assert (mode, uid, own, content) == (oct(0o40700), os.getuid() if world.kind == "plain" else UID, True, [])
    assert await peer.run(WRITE.format(path=path)) == 6
    if world.kind == "plain":
        assert not path.startswith(str(world.base))
        assert ram_dirs._on_tmpfs(path)
    else:
        assert kind == "tmpfs"
        assert {"nosuid", "nodev"} <= set(options.split(","))
        assert size == CREDENTIALS_BYTES
        assert "No space" in await peer.fails(
            f"import pathlib; pathlib.Path({path!r}, 'more').write_bytes(bytes({size}))"
        )
        assert await peer.fails(f"import os; os.rmdir({path!r})")
    assert ("noexec" in (options or "")) == (world.kind == "docker")
    await world.driver.remove(ref)
    assert not os.path.exists(path)
    left = subprocess.run(["grep", "-rl", "--include=key", "secret", str(world.base)], capture_output=True, timeout=20)
    assert left.stdout == b""


@REAL
async def test_the_place_for_credentials_is_known_to_a_driver_that_adopted_it(world: Rig) -> None:
    ref, slot, peer = await world.up()
    path = world.driver.credentials_dir(slot.spec.slot, 1)
    await peer.run(WRITE.format(path=path))
    world.driver = world.another()
    await world.driver.open()
    assert world.driver.credentials_dir(slot.spec.slot, 1) == path
    await world.driver.remove(ref)
    assert not os.path.exists(path)


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
    assert len(pids) >= (2 if world.kind == "plain" else 3)
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
