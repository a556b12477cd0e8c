"""Slots in the three set-ups: root, a service user with three capabilities, a developer with his own uid.

Each runs in a forked child that gives its rights up for good.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import stat
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.config import Config
from broker.errors import Code, CortexError
from broker.sandbox.drivers import sandbox_uid
from broker.sandbox.slots import Slots, home_key
from broker.sandbox.sockets import SlotSockets
from tests import host

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play the other users")

SANDBOX = 64321
BROKER = 64400
KEY = home_key("ann", "main")
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER = 0, 1, 3
PR_SET_KEEPCAPS = 8
CAPABILITY_VERSION_3 = 0x20080522


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory that every uid can reach."""
    path = tmp_path
    while path != Path(path.root) and path != Path("/tmp"):
        os.chmod(path, 0o755)
        path = path.parent
    made = tmp_path / "state"
    made.mkdir()
    return made


def become(uid: int, *, capabilities: tuple[int, ...] = ()) -> None:
    """Uid and gid ``uid``, no other groups, and only ``capabilities``."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    mask = sum(1 << number for number in capabilities)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    data = struct.pack("6I", mask, mask, 0, 0, 0, 0)
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def as_child(work: Callable[[], None]) -> None:
    """Runs ``work`` in a forked child; its failure is the test's."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def live(state: Path, uid: int) -> None:
    """A home's whole life, with what a hostile sandbox leaves in it."""
    slots = Slots(state, uid=uid)
    slots.check()
    slot = slots.create(slots.new_id())
    sockets = SlotSockets(slot, gid=slots.gid)
    sockets.open()
    for name in ("agent", "gateway", "egress"):
        info = (slot.sock_dir / name).stat()
        assert (info.st_gid, stat.S_IMODE(info.st_mode)) == (slots.gid, 0o660)
    sockets.close()
    slots.adopt_home(slot.id, KEY)
    assert slot.home_dir.stat().st_uid == uid
    as_sandbox(slot.home_dir, uid)
    assert slots.release_home(slot.id, KEY)
    slots.journal_dir(KEY)
    second = slots.create(slots.new_id())
    assert slots.adopt_home(second.id, KEY)
    assert slots.release_home(second.id, KEY)
    for each in (slot, second):
        asyncio.run(slots.remove(each.id))
    asyncio.run(slots.erase_home(KEY))
    assert os.listdir(state / "trash") == os.listdir(state / "homes") == os.listdir(state / "slots") == []


def as_sandbox(home: Path, uid: int) -> None:
    """Deep directories that nobody may enter, made as the sandbox's uid would."""
    inner = home / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    for path in (inner / "file", inner, home / "a", home):
        if uid != os.geteuid():
            os.chown(path, uid, uid)
        os.chmod(path, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_root_gives_the_sandbox_its_own_uid(state: Path) -> None:
    as_child(lambda: live(state, SANDBOX))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_service_user_needs_three_capabilities_only(state: Path) -> None:
    os.chown(state, BROKER, BROKER)

    def work() -> None:
        become(BROKER, capabilities=(CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER))
        live(state, SANDBOX)

    as_child(work)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_developer_uses_his_own_uid_and_needs_nothing(state: Path) -> None:
    os.chown(state, BROKER, BROKER)

    def work() -> None:
        become(BROKER)
        live(state, BROKER)

    as_child(work)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("capabilities", "driver", "uid"),
    [
        ((CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER), "docker", SANDBOX),
        ((CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER), "process", BROKER),
        ((CAP_CHOWN,), "docker", BROKER),
        ((), "docker", BROKER),
    ],
)
def test_sandboxes_of_a_service_have_a_uid_that_is_nobody_elses(
    capabilities: tuple[int, ...], driver: str, uid: int
) -> None:
    def work() -> None:
        become(BROKER, capabilities=capabilities)
        assert sandbox_uid(Config.model_validate({"sandbox": {"driver": driver}})) == uid
        assert sandbox_uid(Config.model_validate({"sandbox": {"driver": driver, "uid": 7}})) == 7

    as_child(work)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_broker_without_the_right_to_give_files_away_is_told_at_start(state: Path) -> None:
    os.chown(state, BROKER, BROKER)

    def work() -> None:
        become(BROKER)
        with pytest.raises(CortexError) as caught:
            Slots(state, uid=SANDBOX).check()
        assert caught.value.code is Code.BAD_CONFIG
        assert "CAP_CHOWN" in caught.value.hint
        assert os.listdir(state / "homes") == []

    as_child(work)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_mounts_are_found_out_at_start(state: Path) -> None:
    host.need_namespace("--mount")
    libc = ctypes.CDLL(None, use_errno=True)

    def work() -> None:
        os_unshare(libc)
        (state / "slots").mkdir()
        # A bind mount of the same file system is a mount of its own: renames across it fail.
        source = os.fsencode(state / "slots")
        if libc.mount(source, source, None, 4096, None) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        with pytest.raises(CortexError) as caught:
            Slots(state, uid=SANDBOX).check()
        assert "mount" in caught.value.hint

    as_child(work)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_full_disk_says_so_and_loses_no_home(state: Path) -> None:
    host.need_namespace("--mount")
    libc = ctypes.CDLL(None, use_errno=True)

    def work() -> None:
        os_unshare(libc)
        if libc.mount(b"tmpfs", os.fsencode(state), b"tmpfs", 0, b"size=64k,nr_inodes=40") != 0:
            raise OSError(ctypes.get_errno(), "mount")
        slots = Slots(state, uid=SANDBOX)
        slots.check()
        slot = slots.create(slots.new_id())
        slots.adopt_home(slot.id, KEY)
        with pytest.raises(CortexError) as caught:
            [slots.create(slots.new_id()) for _ in range(40)]
        assert caught.value.code is Code.DISK_FULL
        assert slots.owner(slot.id) == KEY

    as_child(work)


def os_unshare(libc: ctypes.CDLL) -> None:
    """A mount name space of the child's own, from which nothing gets out."""
    clone_newns, ms_rec, ms_private = 0x00020000, 0x4000, 1 << 18
    if libc.unshare(clone_newns) != 0 or libc.mount(b"none", b"/", None, ms_rec | ms_private, None) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
