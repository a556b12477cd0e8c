from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from broker.errors import Code, CortexError
from broker.session import sealing
from broker.session.sealing import MAX_PATHS, Sealing
from sandbox_agent.wire.messages import Refreshed

FULL = CortexError(Code.DISK_FULL, "no space", hint="Make room.")
BAD = CortexError(Code.BAD_CREDENTIAL, "no JSON object", hint="send one")


class Vault:
    """Takes one file at a time, when ``open``; raises what is in ``errors`` first."""

    def __init__(self) -> None:
        self.kept: list[Refreshed] = []
        self.errors: list[CortexError] = []
        self.open = asyncio.Event()
        self.open.set()
        self.asked = asyncio.Event()
        self.busy = 0

    async def keep(self, refreshed: Refreshed) -> None:
        self.busy += 1
        assert self.busy == 1, "two at once"
        self.asked.set()
        try:
            await self.open.wait()
            if self.errors:
                raise self.errors.pop(0)
            self.kept.append(refreshed)
        finally:
            self.busy -= 1

    async def was_asked(self) -> None:
        async with asyncio.timeout(5):
            await self.asked.wait()
        self.asked.clear()

    async def has(self, refreshed: Refreshed) -> None:
        async with asyncio.timeout(5):
            while refreshed not in self.kept:
                await asyncio.sleep(0)


@pytest.fixture
def vault() -> Vault:
    return Vault()


@pytest.fixture
async def seals(vault: Vault) -> AsyncIterator[Sealing]:
    made = Sealing("slot", vault.keep)
    yield made
    await made.close()


def changed(number: int, path: str = "p") -> Refreshed:
    return Refreshed(path, str(number).encode())


async def test_the_latest_of_each_path_is_kept_one_at_a_time(vault: Vault, seals: Sealing) -> None:
    vault.open.clear()
    seals.heard(changed(1))
    await vault.was_asked()
    for number in (2, 3):
        seals.heard(changed(number))
        seals.heard(changed(number, "q"))
    vault.open.set()
    await seals.drain(5)
    assert vault.kept == [changed(1), changed(3), changed(3, "q")]
    seals.heard(changed(4))
    await seals.drain(5)
    assert vault.kept[-1] == changed(4)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "RETRY_S", (0.0, 0.0))


async def test_what_the_vault_refuses_is_dropped_and_what_comes_next_is_kept(
    vault: Vault, seals: Sealing, at_once: None
) -> None:
    vault.errors.append(BAD)
    for path in ("p", "q"):
        seals.heard(changed(1, path))
    await vault.has(changed(1, "q"))
    seals.heard(changed(1, "r"))
    await vault.has(changed(1, "r"))
    assert vault.kept == [changed(1, "q"), changed(1, "r")]


async def test_a_vault_that_cannot_be_written_is_tried_again(vault: Vault, seals: Sealing, at_once: None) -> None:
    vault.errors += [FULL, FULL]
    seals.heard(changed(1))
    await vault.has(changed(1))
    assert vault.kept == [changed(1)]


async def test_while_it_waits_a_newer_one_takes_the_place(vault: Vault, seals: Sealing, at_once: None) -> None:
    vault.errors.append(FULL)
    vault.open.clear()
    seals.heard(changed(1))
    await vault.was_asked()
    seals.heard(changed(2))
    vault.open.set()
    await vault.has(changed(2))
    assert vault.kept == [changed(2)]


async def test_an_end_does_not_wait_for_a_pause_nor_try_for_ever(
    vault: Vault, seals: Sealing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "RETRY_S", (1000.0, 1000.0))
    vault.errors.append(FULL)
    seals.heard(changed(1))
    await vault.was_asked()
    async with asyncio.timeout(5):
        await seals.drain(1000)
    assert vault.kept == [changed(1)], "once more, at once"
    vault.errors += [FULL] * 3
    vault.asked.clear()
    seals.heard(changed(2))
    await vault.was_asked()
    async with asyncio.timeout(5):
        await seals.drain(1000)
    assert (len(vault.kept), len(vault.errors)) == (1, 1)


async def test_what_cannot_be_kept_when_the_sandbox_ends_is_kept_later(vault: Vault, seals: Sealing) -> None:
    vault.errors += [FULL, FULL]
    seals.heard(changed(1))
    await vault.was_asked()
    async with asyncio.timeout(5):
        await seals.drain(1000)
    assert vault.kept == []
    await vault.has(changed(1))


async def test_a_vault_that_hangs_holds_nothing_up(vault: Vault, seals: Sealing) -> None:
    vault.open.clear()
    seals.heard(changed(1))
    await seals.drain(0.01)
    assert vault.kept == []
    async with asyncio.timeout(5):
        await seals.close()


async def test_paths_that_wait_are_bounded(vault: Vault, seals: Sealing) -> None:
    for number in range(MAX_PATHS + 3):
        seals.heard(changed(1, str(number)))
    seals.heard(changed(2, "0"))
    await seals.drain(5)
    assert len(vault.kept) == MAX_PATHS
    assert vault.kept[0] == changed(2, "0")
