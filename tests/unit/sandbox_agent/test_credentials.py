"""Credential files on real file systems: what the agent may do to them, and what is left of them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox_agent import credentials, homefiles
from sandbox_agent.credentials import CredentialFiles
from sandbox_agent.homefiles import UnsafePath
from sandbox_agent.wire.messages import MAX_CREDENTIAL_FILE, Refreshed

PATH = ".agent/auth.json"


def token(value: str) -> bytes:
    return json.dumps({"token": f"canary-{value}"}).encode()


class Box:
    """A home, a directory that stands for the tmpfs, and what the broker was sent."""

    def __init__(self, root: Path) -> None:
        self.home, self.ram, self.outside = root / "home", root / "ram", root / "outside"
        for path in (self.home, self.ram, self.outside):
            path.mkdir(mode=0o700)
        self.link = self.home / PATH
        self.sent: asyncio.Queue[Refreshed] = asyncio.Queue(1000)
        self.files = CredentialFiles(home=str(self.home), directory=str(self.ram), send=self.sent.put_nowait)

    def put(self, value: str, path: str = PATH) -> None:
        self.files.put([(path, token(value))])

    async def told(self) -> bytes:
        async with asyncio.timeout(10):
            return (await self.sent.get()).content

    async def quiet_until(self, value: str) -> None:
        """What was done before made no message: the next one is about this change."""
        self.link.write_bytes(token(value))
        assert await self.told() == token(value)
        assert self.sent.empty()

    async def linked(self) -> None:
        async with asyncio.timeout(10):
            while not self.link.is_symlink():
                await asyncio.sleep(0)

    def on_disk(self) -> list[Path]:
        """Files of the home that hold a credential."""
        found = [path for path in self.home.rglob("*") if path.is_file() and not path.is_symlink()]
        return [path for path in found if b"canary" in path.read_bytes()]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "SEND_EVERY_S", 0.0)


@pytest.fixture
def box(tmp_path: Path, at_once: None) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    with asyncio.Runner() as runner:  # the test's own loop has ended
        runner.run(_closed(made))


async def _closed(box: Box) -> None:
    box.files.close()


# -- from the broker --------------------------------------------------------------------------------


async def test_the_content_is_on_the_tmpfs_and_the_home_has_a_link(box: Box) -> None:
    box.put("1")
    target = Path(os.readlink(box.link))
    assert target.parent == box.ram
    assert box.link.read_bytes() == token("1")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert stat.S_IMODE(box.link.parent.stat().st_mode) == 0o700
    assert box.on_disk() == []
    assert os.listdir(box.ram) == [target.name]
    box.files.close()


async def test_what_was_in_the_way_is_replaced_never_followed(box: Box) -> None:
    box.link.parent.mkdir()
    (box.outside / "victim").write_text("theirs")
    box.link.symlink_to(box.outside / "victim")
    box.put("1")
    assert (box.outside / "victim").read_text() == "theirs"
    box.files.put([])
    box.link.write_text("a login of the user's own: canary")
    box.put("2")
    assert box.on_disk() == []
    await box.quiet_until("3")
    box.files.close()


async def test_own_writes_and_repeated_binds_make_no_message(box: Box) -> None:
    box.put("1")
    box.put("1")
    box.put("2")
    box.put("2")
    await box.quiet_until("3")
    box.put("3")
    await box.quiet_until("4")
    box.files.close()


async def test_what_is_no_longer_bound_goes_with_its_link(box: Box) -> None:
    box.files.put([(PATH, token("1")), ("b/c.json", token("2"))])
    box.files.put([("b/c.json", token("2"))])
    assert not os.path.lexists(box.link)
    assert len(os.listdir(box.ram)) == 1
    (box.home / "b/c.json").unlink()
    (box.home / "b/c.json").symlink_to("mine")
    box.files.put([])
    assert os.listdir(box.ram) == []
    assert os.readlink(box.home / "b/c.json") == "mine", "the user's own link stays"
    box.files.close()


@pytest.mark.parametrize("path", ["~/.agent/auth.json", "{home}/.agent/auth.json", ".agent//./auth.json"])
async def test_a_path_is_the_same_however_it_is_written_and_told_as_it_was_bound(box: Box, path: str) -> None:
    path = path.replace("{home}", str(box.home))
    box.put("1")
    box.put("1", path)
    assert len(os.listdir(box.ram)) == 1
    box.link.write_bytes(token("2"))
    async with asyncio.timeout(10):
        sent = await box.sent.get()
    assert (sent.path, sent.content) == (path, token("2"))
    box.files.close()


async def test_a_link_on_the_way_is_an_error_not_a_way_out(box: Box) -> None:
    (box.home / ".agent").symlink_to(box.outside)
    with pytest.raises(UnsafePath):
        box.put("1")
    (box.home / ".agent").unlink()
    box.link.mkdir(parents=True)
    with pytest.raises(OSError):
        box.put("1")
    assert os.listdir(box.outside) == []
    box.link.rmdir()
    box.put("2")
    assert box.link.read_bytes() == token("2")
    box.files.close()


async def test_an_answer_that_is_older_than_the_file_leaves_it(box: Box) -> None:
    box.put("1")
    for value in ("2", "3"):
        box.link.write_bytes(token(value))
        assert await box.told() == token(value)
    for value in ("1", "2"):
        box.put(value)
        assert box.link.read_bytes() == token("3")
    box.put("3")
    await box.quiet_until("4")
    box.put("1")
    assert box.link.read_bytes() == token("1"), "who gives an older one after the answer means it"
    box.files.close()


async def test_an_answer_does_not_cut_into_a_write(box: Box) -> None:
    box.put("1")
    box.link.write_bytes(token("2"))
    assert await box.told() == token("2")
    with box.link.open("wb") as file:
        file.write(token("3")[:9])
        file.flush()
        box.put("2")
        file.write(token("3")[9:])
    assert await box.told() == token("3")
    assert box.link.read_bytes() == token("3")
    box.files.close()


async def test_the_users_new_credential_goes_before_what_the_agent_made_of_the_old_one(box: Box) -> None:
    box.put("1")
    box.link.write_bytes(token("2"))
    assert await box.told() == token("2")
    box.put("new")
    assert box.link.read_bytes() == token("new")
    await box.quiet_until("newer")
    box.files.close()


async def test_a_home_that_was_moved_in_gets_links_of_its_own(box: Box) -> None:
    box.put("1")
    box.home.rename(box.home.with_name("blank"))
    box.home.mkdir()
    box.link.parent.mkdir()
    box.link.write_text('{"left": "canary"}')
    box.files.relink()
    assert box.link.read_bytes() == token("1")
    assert box.on_disk() == []
    await box.quiet_until("2")
    box.files.close()


async def test_the_broker_is_told_what_a_change_may_have_been_made_of(box: Box) -> None:
    def digests(*values: str) -> list[str]:
        return [hashlib.sha256(token(value)).hexdigest() for value in values]

    async def after() -> list[str]:
        async with asyncio.timeout(10):
            return (await box.sent.get()).after

    box.put("1")
    box.link.write_bytes(token("2"))
    assert await after() == digests("1")
    box.link.write_bytes(token("3"))
    assert await after() == digests("1", "2")
    box.put("2")
    box.link.write_bytes(token("4"))
    assert await after() == digests("2", "2", "3")
    box.put("new")
    box.link.write_bytes(token("5"))
    assert await after() == digests("new")
    box.files.close()


# -- from the agent ---------------------------------------------------------------------------------


def in_place(box: Box, content: bytes) -> None:
    box.link.write_bytes(content)


def by_rename(box: Box, content: bytes) -> None:
    (box.link.parent / "auth.json.tmp").write_bytes(content)
    (box.link.parent / "auth.json.tmp").rename(box.link)


def by_rename_of_the_target(box: Box, content: bytes) -> None:
    target = Path(os.path.realpath(box.link))
    target.with_suffix(".tmp").write_bytes(content)
    target.with_suffix(".tmp").rename(target)


def removed_and_written(box: Box, content: bytes) -> None:
    box.link.unlink()
    box.link.write_bytes(content)


def with_the_directory(box: Box, content: bytes) -> None:
    shutil.rmtree(box.link.parent)
    box.link.parent.mkdir()
    box.link.write_bytes(content)


def directory_moved(box: Box, content: bytes) -> None:
    box.link.parent.rename(box.home / "aside")
    by_rename_into_new(box, content)


def by_rename_into_new(box: Box, content: bytes) -> None:
    (box.home / "new").mkdir()
    (box.home / "new/auth.json").write_bytes(content)
    (box.home / "new").rename(box.link.parent)


WAYS = [in_place, by_rename, by_rename_of_the_target, removed_and_written, with_the_directory, directory_moved]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_a_change_is_told_and_leaves_nothing_on_the_disk(box: Box, way: Callable[[Box, bytes], None]) -> None:
    box.put("1")
    for value in ("2", "3"):
        if (box.home / "aside").exists():
            shutil.rmtree(box.home / "aside")
        way(box, token(value))
        assert await box.told() == token(value)
        await box.linked()
        assert box.link.read_bytes() == token(value)
        assert box.on_disk() == []
    box.files.close()
    assert box.on_disk() == []


async def test_half_a_file_is_not_told_nor_moved(box: Box) -> None:
    box.put("1")
    with box.link.open("wb") as file:
        file.write(token("2")[:8])
        file.flush()
        box.files._look()
        file.write(token("2")[8:])
    assert await box.told() == token("2")
    box.link.unlink()
    with box.link.open("wb") as file:
        file.write(token("3")[:8])
        file.flush()
        box.files._look()
        assert not box.link.is_symlink(), "who writes has it open"
        file.write(token("3")[8:])
    assert await box.told() == token("3")
    await box.linked()
    assert box.sent.empty()
    box.files.close()


async def test_what_replaces_a_file_while_it_is_moved_is_not_lost(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.put("1")
    put = homefiles.write_in

    def meanwhile(directory: int, name: str, content: bytes, mode: int = 0o600) -> None:
        put(directory, name, content, mode)
        if content == token("2"):
            by_rename(box, token("3"))

    monkeypatch.setattr(homefiles, "write_in", meanwhile)
    by_rename(box, token("2"))
    while await box.told() != token("3"):
        pass
    await box.linked()
    assert box.link.read_bytes() == token("3")
    assert box.on_disk() == []
    box.files.close()


async def test_the_end_of_a_write_that_comes_while_the_file_is_moved_is_not_lost(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.put("1")
    link = homefiles.link_in
    (box.home / "new").write_bytes(token("2"))
    with (box.home / "new").open("r+b", buffering=0) as file:

        def meanwhile(directory: int, name: str, target: str) -> None:
            file.write(token("3"))
            link(directory, name, target)

        monkeypatch.setattr(homefiles, "link_in", meanwhile)
        (box.home / "new").rename(box.link)
        assert await box.told() == token("3")
    assert box.link.read_bytes() == token("3")
    box.files.close()


NOT_ONE = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"no JSON",
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"a": 1}' + b" " * (MAX_CREDENTIAL_FILE - 7),
]


@pytest.mark.parametrize("content", [*NOT_ONE, b'{"a": 1'], ids=lambda content: content[:8].decode("latin1"))
async def test_what_is_no_credential_file_is_not_told(box: Box, content: bytes) -> None:
    box.put("1")
    box.link.write_bytes(content)
    box.files._look()
    await box.quiet_until("2")
    by_rename(box, content)
    box.files._look()
    by_rename(box, token("3"))
    assert await box.told() == token("3")
    assert box.sent.empty()
    box.files.close()


async def test_links_pipes_and_directories_that_were_planted_are_not_read(box: Box) -> None:
    (box.outside / "key.json").write_bytes(token("host"))
    box.put("1")
    target = Path(os.path.realpath(box.link))
    for plant in (lambda p: p.symlink_to(box.outside / "key.json"), os.mkfifo, Path.mkdir):
        for place in (target, box.link):
            place.unlink()
            plant(place)
            box.files._look()
            place.rmdir() if stat.S_ISDIR(place.lstat().st_mode) else place.unlink()
            target.unlink(missing_ok=True)
            box.link.unlink(missing_ok=True)
            box.put("1")
    shutil.rmtree(box.link.parent)
    box.link.parent.symlink_to(box.outside)
    (box.outside / "auth.json").write_bytes(token("host"))
    box.files._look()
    assert sorted(os.listdir(box.outside)) == ["auth.json", "key.json"]
    assert not (box.outside / "auth.json").is_symlink()
    box.link.parent.unlink()
    box.put("1")
    await box.quiet_until("2")
    box.files.close()
    assert sorted(os.listdir(box.outside)) == ["auth.json", "key.json"]


async def test_nothing_leaves_the_home_while_directories_are_swapped_for_links(tmp_path: Path) -> None:
    """An agent that races: whatever it manages, no credential comes to lie outside of home and tmpfs."""
    box = Box(tmp_path)
    stop = threading.Event()

    def swap() -> None:
        (box.home / "link").symlink_to(box.outside)
        (box.home / "real").mkdir()
        while not stop.is_set():
            for name in ("real", "link"):
                with_suppressed(os.rename, box.home / name, box.home / ".agent")
                with_suppressed(os.rename, box.home / ".agent", box.home / name)

    agent = threading.Thread(target=swap)
    agent.start()
    done = 0
    try:
        for number in range(400):
            try:
                box.put(str(number))
                done += 1
            except (UnsafePath, OSError):
                continue
    finally:
        stop.set()
        agent.join()
    box.files.close()
    assert list(box.outside.iterdir()) == []
    assert box.on_disk() == []
    assert done


def with_suppressed(call: Callable[[Path, Path], None], old: Path, new: Path) -> None:
    try:
        call(old, new)
    except OSError:
        return


# -- rates, ends and a broker that is away ----------------------------------------------------------


async def test_many_changes_are_few_messages_and_the_last_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "SEND_EVERY_S", 0.3)
    box = Box(tmp_path)
    box.put("0")
    for number in range(200):
        box.link.write_bytes(token(str(number)))
        box.files._look()
    seen = [await box.told()]
    while seen[-1] != token("199"):
        seen.append(await box.told())
    assert len(seen) < 20
    assert box.sent.empty()
    box.files.close()


async def test_what_was_not_answered_is_told_again_when_the_broker_is_back(box: Box) -> None:
    box.put("1")
    box.link.write_bytes(token("2"))
    assert await box.told() == token("2")
    box.files.reconnected()
    assert await box.told() == token("2")
    box.put("2")
    box.files.reconnected()
    await box.quiet_until("3")
    box.files.close()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_the_last_word_is_told_and_the_home_is_left_clean(
    tmp_path: Path, way: Callable[[Box, bytes], None]
) -> None:
    box = Box(tmp_path)
    box.put("0")
    box.link.write_bytes(token("1"))
    assert await box.told() == token("1")
    way(box, token("2"))
    box.files.close()
    assert box.sent.get_nowait().content == token("2"), "at once, though the last was told just now"
    assert not os.path.lexists(box.link)
    assert os.listdir(box.ram) == []
    assert box.on_disk() == []
    box.files.close()
    assert box.sent.empty()


async def test_what_the_agent_left_half_written_does_not_stay_in_the_home(box: Box) -> None:
    box.put("1")
    by_rename(box, b'{"canary":')
    box.files.close()
    assert not os.path.lexists(box.link)
    assert box.sent.empty()


async def test_a_host_without_watches_is_looked_at_now_and_then(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(wanted: object) -> None:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(box.files._watch, "set", none_left)
    monkeypatch.setattr(credentials, "LOOK_EVERY_S", 0.01)
    box.put("1")
    for way in (in_place, by_rename):
        way(box, token(way.__name__))
        assert await box.told() == token(way.__name__)
    box.files.close()


async def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.ram.rmdir()
    with pytest.raises(OSError):
        box.put("1")
    box.files.put([])
    box.files.close()
