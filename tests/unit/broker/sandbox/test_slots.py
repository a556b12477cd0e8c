from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.errors import Code, CortexError
from broker.sandbox.slots import Slots, home_key

SANDBOX_UID = 64321
KEY = home_key("ann", "main")
OTHER = home_key("bob", "main")


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    made = Slots(tmp_path / "state", uid=os.geteuid())
    made.check()
    return made


def write(home: Path, text: str) -> None:
    (home / "note").write_text(text)


def test_home_key_is_stable_and_tells_users_and_workspaces_apart() -> None:
    assert home_key("ann", "main") == home_key("ann", "main")
    assert len({home_key("ann", "main"), home_key("ann", "x"), home_key("bob", "main"), home_key("annmain", "x")}) == 4
    assert len(KEY) == 32


def test_a_new_slot_has_a_blank_home_and_a_top_the_sandbox_cannot_write(slots: Slots) -> None:
    slot = slots.create(slots.new_id())
    assert list(slot.home_dir.iterdir()) == []
    for path, mode in ((slot.root, 0o700), (slot.sock_dir, 0o750), (slot.vol_dir, 0o750), (slot.home_dir, 0o700)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert slots.ids() == [slot.id]
    assert slots.get(slot.id) == slot
    assert slots.get("00000000") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_as_root_home_is_the_sandbox_uids_and_the_rest_is_not(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "state", uid=SANDBOX_UID)
    slots.check()
    slot = slots.create(slots.new_id())
    home, vol, sock = slot.home_dir.stat(), slot.vol_dir.stat(), slot.sock_dir.stat()
    assert (home.st_uid, home.st_gid) == (SANDBOX_UID, SANDBOX_UID)
    assert (vol.st_uid, vol.st_gid, sock.st_uid, sock.st_gid) == (0, SANDBOX_UID, 0, SANDBOX_UID)


def test_a_new_users_home_is_the_blank_one_and_comes_back(slots: Slots) -> None:
    slot = slots.create(slots.new_id())
    assert slots.adopt_home(slot.id, KEY) is False
    assert slots.adopt_home(slot.id, KEY) is False
    write(slot.home_dir, "first")
    assert slots.release_home(slot.id, KEY) is True
    assert slots.release_home(slot.id, KEY) is True
    assert slots.has_home(KEY)
    again = slots.create(slots.new_id())
    assert slots.adopt_home(again.id, KEY) is True
    assert (again.home_dir / "note").read_text() == "first"
    assert not slots.has_home(KEY)


def test_a_blank_home_that_is_not_blank_any_more_gives_way(slots: Slots) -> None:
    first = slots.create(slots.new_id())
    slots.adopt_home(first.id, KEY)
    write(first.home_dir, "mine")
    slots.release_home(first.id, KEY)
    second = slots.create(slots.new_id())
    write(second.home_dir, "someone wrote before the claim")
    slots.adopt_home(second.id, KEY)
    assert (second.home_dir / "note").read_text() == "mine"


def test_a_slot_is_claimed_once_and_a_home_is_in_one_slot(slots: Slots) -> None:
    first, second = slots.create(slots.new_id()), slots.create(slots.new_id())
    slots.adopt_home(first.id, KEY)
    for slot, key in ((first.id, OTHER), (second.id, KEY)):
        with pytest.raises(CortexError) as caught:
            slots.adopt_home(slot, key)
        assert caught.value.code is Code.SESSION_CONFLICT
    with pytest.raises(CortexError):
        slots.release_home(first.id, OTHER)
    slots.release_home(first.id, KEY)
    with pytest.raises(CortexError):
        slots.adopt_home(first.id, OTHER)


def test_owners_are_known_after_a_restart(slots: Slots, tmp_path: Path) -> None:
    slot = slots.create(slots.new_id())
    slots.adopt_home(slot.id, KEY)
    again = Slots(tmp_path / "state", uid=os.geteuid())
    assert again.owner(slot.id) == KEY
    with pytest.raises(CortexError):
        again.adopt_home(again.create(again.new_id()).id, KEY)


def test_a_crash_between_owner_and_rename_loses_nothing(slots: Slots, tmp_path: Path) -> None:
    first = slots.create(slots.new_id())
    slots.adopt_home(first.id, KEY)
    write(first.home_dir, "mine")
    slots.release_home(first.id, KEY)
    second = slots.create(slots.new_id())
    second.home_dir.rmdir()
    os.rename(second.root / "owner.", second.root / f"owner.{KEY}")
    again = Slots(tmp_path / "state", uid=os.geteuid())
    assert again.release_home(second.id, KEY) is True
    assert again.has_home(KEY)
    assert again.adopt_home(second.id, KEY) is True
    assert (second.home_dir / "note").read_text() == "mine"


def test_a_home_in_two_places_is_quarantined_not_overwritten(slots: Slots, tmp_path: Path) -> None:
    slot = slots.create(slots.new_id())
    slots.adopt_home(slot.id, KEY)
    write(slot.home_dir, "in the slot")
    rest = tmp_path / "state" / "homes" / KEY / "home"
    rest.mkdir(parents=True)
    write(rest, "at rest")
    assert slots.release_home(slot.id, KEY) is False
    assert (rest / "note").read_text() == "at rest"
    (aside,) = (tmp_path / "state" / "quarantine").iterdir()
    assert (aside / "note").read_text() == "in the slot"
    assert slots.owner(slot.id) is None


def test_a_home_that_became_a_link_is_never_taken_home(slots: Slots, tmp_path: Path) -> None:
    slot = slots.create(slots.new_id())
    slots.adopt_home(slot.id, KEY)
    slot.home_dir.rmdir()
    slot.home_dir.symlink_to("/etc")
    assert slots.release_home(slot.id, KEY) is False
    assert not slots.has_home(KEY)
    assert Path("/etc").is_dir()


async def test_remove_refuses_while_a_home_is_inside_and_then_erases(slots: Slots, tmp_path: Path) -> None:
    slot = slots.create(slots.new_id())
    slots.adopt_home(slot.id, KEY)
    with pytest.raises(CortexError):
        await slots.remove(slot.id)
    slots.release_home(slot.id, KEY)
    await slots.remove(slot.id)
    await slots.remove(slot.id)
    assert slots.ids() == []
    assert list((tmp_path / "state" / "trash").iterdir()) == []
    assert slots.has_home(KEY)


async def test_erase_home_takes_home_and_journal_but_not_from_a_slot(slots: Slots, tmp_path: Path) -> None:
    slot = slots.create(slots.new_id())
    slots.adopt_home(slot.id, KEY)
    (slots.journal_dir(KEY) / "0000000000.seg").write_bytes(b"x")
    with pytest.raises(CortexError):
        await slots.erase_home(KEY)
    slots.release_home(slot.id, KEY)
    await slots.erase_home(KEY)
    await slots.erase_home(KEY)
    assert not slots.has_home(KEY)
    assert list((tmp_path / "state" / "homes").iterdir()) == []


async def test_hostile_trees_are_erased_and_links_are_not_followed(tmp_path: Path) -> None:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        state = Path(directory) / "state"
        slots = Slots(state, uid=os.geteuid())
        slots.check()
        write(tmp_path, "keep")
        slot = slots.create(slots.new_id())
        here = os.open(slot.home_dir, os.O_RDONLY)
        for _ in range(1500):
            os.symlink(tmp_path, "link", dir_fd=here)
            os.mkdir("d", dir_fd=here)
            inner = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        os.fchmod(here, 0)
        os.close(here)
        for number in range(2100):
            (slot.home_dir / f"f{number}").touch()
        await slots.remove(slot.id)
        assert (tmp_path / "note").read_text() == "keep"
        assert list((state / "trash").iterdir()) == []


async def test_trash_of_an_earlier_run_is_emptied(slots: Slots, tmp_path: Path) -> None:
    (tmp_path / "state" / "trash" / "abc" / "d").mkdir(parents=True)
    (tmp_path / "state" / "trash" / "file").touch()
    await slots.empty_trash()
    assert list((tmp_path / "state" / "trash").iterdir()) == []


def test_check_says_when_socket_paths_would_be_too_long(tmp_path: Path) -> None:
    fits = 107 - len("/slots/00000000/sock/gateway")
    short = tmp_path / ("x" * (fits - len(str(tmp_path)) - 1))
    Slots(short, uid=os.geteuid()).check()
    with pytest.raises(CortexError) as caught:
        Slots(Path(f"{short}x"), uid=os.geteuid()).check()
    assert caught.value.code is Code.BAD_CONFIG
    assert str(fits) in caught.value.hint


@pytest.mark.parametrize("bad", ["../x", "", "a/b", "..", "A" * 200, "x\n"])
def test_names_cannot_leave_the_state_directory(slots: Slots, bad: str) -> None:
    with pytest.raises(ValueError):
        slots.create(bad)
    with pytest.raises(ValueError):
        slots.journal_dir(bad)


class Moves(RuleBasedStateMachine):
    """Whatever the order of moves, a home's text is in exactly one place and never another's."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.state = Path(self.directory.name) / "s"
        self.slots = Slots(self.state, uid=os.geteuid())
        self.slots.check()
        self.known: set[str] = set()

    @rule()
    @precondition(lambda self: len(self.slots.ids()) < 3)
    def create(self) -> None:
        self.slots.create(self.slots.new_id())

    @rule(pick=st.integers(0, 2), key=st.sampled_from([KEY, OTHER]))
    def adopt(self, pick: int, key: str) -> None:
        ids = self.slots.ids()
        if pick < len(ids):
            try:
                had = self.slots.adopt_home(ids[pick], key)
            except CortexError:
                return
            home = self.slots._at(ids[pick]).home_dir
            if had or (home / "note").exists():
                assert (home / "note").read_text() == key
            write(home, key)
            self.known.add(key)

    @rule(pick=st.integers(0, 2), key=st.sampled_from([KEY, OTHER]))
    def release(self, pick: int, key: str) -> None:
        ids = self.slots.ids()
        if pick < len(ids):
            try:
                self.slots.release_home(ids[pick], key)
            except CortexError:
                assert self.slots.owner(ids[pick]) != key

    @rule()
    def restart(self) -> None:
        self.slots = Slots(self.state, uid=os.geteuid())

    @invariant()
    def each_home_is_in_one_place(self) -> None:
        notes = [path.read_text() for path in self.state.rglob("note")]
        assert sorted(notes) == sorted(self.known)

    def teardown(self) -> None:
        self.directory.cleanup()


TestMoves = settings(max_examples=25, stateful_step_count=20, deadline=None)(Moves).TestCase


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
@settings(max_examples=50)
def test_home_key_is_always_a_plain_name(user: str, workspace: str) -> None:
    key = home_key(user, workspace)
    assert len(key) == 32
    assert set(key) <= set("0123456789abcdef")


def test_a_stray_file_among_the_slots_is_no_slot(slots: Slots, tmp_path: Path) -> None:
    slot = slots.create(slots.new_id())
    (tmp_path / "state" / "slots" / "stray").touch()
    assert slots.ids() == [slot.id]
    assert slots.owners() == {}
