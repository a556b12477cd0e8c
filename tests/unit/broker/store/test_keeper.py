from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from broker.errors import Code, CortexError
from broker.store import keeper
from broker.store.db import Database
from broker.store.keeper import Keeper, open_vault
from broker.store.keys import KeyFile, new_key
from broker.store.sealed import Keyring
from broker.store.vault import Secret, Vault
from tests.unit.broker.store.rotating import ROWS, STEP

ROOT = Path(__file__).parents[4]
KEY = b"i" * 32


def secret(number: int) -> Secret:
    return Secret("api_key", "gateway", f"sk-{number}")


@asynccontextmanager
async def opened(directory: Path, *, passed: bool = False) -> AsyncIterator[tuple[Vault, Keeper]]:
    """One start of a broker."""
    db = await Database.open(directory)
    try:
        file = KeyFile(directory / "vault.key", passed)
        vault = await open_vault(db, file, KEY)
        keys = Keeper(vault, file)
        yield vault, keys
        await keys.close()
    finally:
        await db.close()


async def fill(vault: Vault, rows: int = ROWS) -> None:
    for number in range(rows):
        await vault.put(f"u{number}", "p", secret(number))


async def whole(vault: Vault, rows: int = ROWS) -> None:
    for number in range(rows):
        entry = await vault.get(f"u{number}", "p")
        assert entry is not None
        assert entry.secret == secret(number)


async def settled(keys: Keeper) -> None:
    """What ``start`` began has ended."""
    await asyncio.gather(*keys._tasks._tasks)


async def test_the_key_is_made_once_and_only_where_nothing_is_sealed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (vault, _):
        await fill(vault, 1)
    made = (tmp_path / "vault.key").read_bytes()
    async with opened(tmp_path) as (vault, _):
        await whole(vault, 1)
    assert (tmp_path / "vault.key").read_bytes() == made


async def refused(directory: Path, *, passed: bool = False) -> CortexError:
    """Why a start is refused; nothing on the disk is changed by it."""
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(CortexError) as caught:
        async with opened(directory, passed=passed):
            raise AssertionError("it starts")
    after = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert {name: text for name, text in after.items() if name.startswith("vault")} == {
        name: text for name, text in before.items() if name.startswith("vault")
    }
    return caught.value


async def test_a_missing_key_is_told_and_no_other_is_made(tmp_path: Path) -> None:
    async with opened(tmp_path) as (vault, _):
        await fill(vault, 1)
        known = vault.ring.first.id.hex()
    path = tmp_path / "vault.key"
    path.rename(tmp_path / "copy")
    error = await refused(tmp_path)
    assert error.code is Code.VAULT_KEY
    assert known in str(error)
    assert not path.exists()
    (tmp_path / "copy").rename(path)
    async with opened(tmp_path) as (vault, _):
        await whole(vault, 1)


@pytest.mark.parametrize("damage", ["another", "cut", "empty"])
async def test_a_wrong_key_is_told_and_stays_as_it_is(tmp_path: Path, damage: str) -> None:
    async with opened(tmp_path) as (vault, _):
        await fill(vault, 1)
    path = tmp_path / "vault.key"
    text = path.read_bytes()
    if damage == "another":
        path.unlink()
        KeyFile(path).create()
    else:
        path.write_bytes(text[:-9] if damage == "cut" else b"")
    error = await refused(tmp_path)
    assert error.code is Code.VAULT_KEY
    assert "copy" in error.hint
    path.write_bytes(text)
    async with opened(tmp_path) as (vault, _):
        await whole(vault, 1)


async def test_a_store_that_lost_only_an_unused_key_gets_a_new_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as (vault, _):
        await fill(vault, 1)
        await vault.erase("u0")
    (tmp_path / "vault.key").unlink()
    async with opened(tmp_path) as (vault, _):
        await fill(vault)
        await whole(vault)


async def test_a_damaged_canary_stops_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as (vault, _):
        await fill(vault, 1)
        await vault._db.write(("UPDATE vault SET canary = (SELECT sealed FROM credentials)", ()))
    assert (await refused(tmp_path)).code is Code.VAULT_TAMPERED


async def test_a_canary_that_is_gone_is_made_anew_and_no_version_comes_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as (vault, _):
        await fill(vault)
        before = max([facts.version for n in range(ROWS) for facts in await vault.list(f"u{n}")])
        await vault._db.write(("DELETE FROM vault", ()))
    async with opened(tmp_path) as (vault, _):
        facts = await vault.put("u0", "p", secret(0))
        assert facts is not None
        assert facts.version > before


async def test_a_rotation_seals_everything_anew_and_drops_the_old_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "BATCH", 4)
    async with opened(tmp_path) as (vault, keys):
        await fill(vault, 10)
        await whole(vault, 10)
        old = vault.ring.first
        done = await keys.rotate()
        assert (done.sealed, done.refused, done.dropped) == (10, 0, (old.id.hex(),))
        assert done.kept == (done.key,) == (vault.ring.first.id.hex(),)
        assert vault.ring.first != old
        await whole(vault, 10)
        assert await keys.view() == [(done.key, 10)]
    ring = KeyFile(tmp_path / "vault.key").read()
    assert ring is not None
    assert ring.keys == (vault.ring.first,)
    async with opened(tmp_path) as (vault, _):
        await whole(vault, 10)


async def test_credentials_that_are_stored_while_keys_rotate_are_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "BATCH", 1)
    async with opened(tmp_path) as (vault, keys):
        await fill(vault)

        async def writing() -> int:
            number = 0
            while not all(task.done() for task in rotations):
                await vault.put(f"w{number % 7}", "p", secret(number))
                number += 1
            return number

        rotations = [asyncio.ensure_future(keys.rotate()) for _ in range(3)]
        written = await writing()
        assert written > 3
        assert len({(await task).key for task in rotations}) == 3
        await whole(vault)
    async with opened(tmp_path) as (vault, _):
        assert len(vault.ring.keys) == 1
        await whole(vault)
        for number in range(max(0, written - 7), written):
            entry = await vault.get(f"w{number % 7}", "p")
            assert entry is not None
            assert entry.secret == secret(number)


async def test_a_row_that_does_not_open_keeps_its_key_and_stops_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as (vault, keys):
        await fill(vault)
        await vault._db.write(("UPDATE credentials SET version = version + 100 WHERE user = 'u3'", ()))
        old = vault.ring.first.id.hex()
        with capture_logs() as logs:
            done = await keys.rotate()
        assert (done.sealed, done.refused, done.dropped) == (ROWS - 1, 1, ())
        assert done.kept == (done.key, old)
        assert [entry["user"] for entry in logs if entry["event"] == "credential_refused"] == ["u3"]


async def test_an_operators_new_first_key_is_taken_at_the_next_start(tmp_path: Path) -> None:
    async with opened(tmp_path, passed=False) as (vault, _):
        await fill(vault)
        old = vault.ring
    fresh = new_key()
    KeyFile(tmp_path / "vault.key").replace(Keyring((fresh, *old.keys)))
    text = (tmp_path / "vault.key").read_bytes()
    async with opened(tmp_path, passed=True) as (vault, keys):
        keys.start()
        await settled(keys)
        await whole(vault)
        assert [sealed for _, sealed in await keys.view()] == [ROWS, 0]
        with pytest.raises(CortexError) as caught:
            await keys.rotate()
        assert caught.value.code is Code.VAULT_KEY_READ_ONLY
        assert "LoadCredential" in caught.value.hint
    assert (tmp_path / "vault.key").read_bytes() == text
    KeyFile(tmp_path / "vault.key").replace(Keyring((fresh,)))
    async with opened(tmp_path, passed=True) as (vault, _):
        await whole(vault)


async def test_a_passed_key_is_never_made(tmp_path: Path) -> None:
    error = await refused(tmp_path, passed=True)
    assert error.code is Code.VAULT_KEY
    assert not (tmp_path / "vault.key").exists()


async def test_a_key_file_that_was_changed_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    async with opened(tmp_path) as (vault, keys):
        await fill(vault, 1)
        KeyFile(tmp_path / "vault.key").replace(Keyring((*vault.ring.keys, new_key())))
        text = (tmp_path / "vault.key").read_bytes()
        with pytest.raises(CortexError) as caught:
            await keys.rotate()
        assert caught.value.code is Code.VAULT_KEY
        assert (tmp_path / "vault.key").read_bytes() == text
        await whole(vault, 1)


async def steps(directory: Path, kill_at: int) -> list[str]:
    """Lets a rotation take its steps up to one, and kills it there; what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.unit.broker.store.rotating", str(directory)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    said: list[str] = []
    try:
        async with asyncio.timeout(30):
            while len(said) < kill_at and (line := (await process.stdout.readline()).decode()):
                # Logs come here too.
                if line.startswith(STEP):
                    said.append(line.removeprefix(STEP).strip())
                    if len(said) < kill_at:
                        process.stdin.write(b"\n")
    finally:
        process.kill()
        await process.wait()
    return said


async def test_a_rotation_that_is_killed_at_any_step_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as (vault, _):
        await fill(vault)
    seen: set[str] = set()
    for kill_at in range(1, 100):
        said = await steps(tmp_path, kill_at)
        assert len(said) == kill_at
        seen |= set(said)
        async with opened(tmp_path) as (vault, keys):
            await whole(vault)
            keys.start()
            await settled(keys)
            await whole(vault)
            assert len(vault.ring.keys) == 1
            assert KeyFile(tmp_path / "vault.key").read() == vault.ring
        if said[-1] == "rotated":
            break
    assert kill_at >= 10
    assert seen >= {"replace", "replace done", "seal_canary done", "reseal", "reseal done", "keys_in_use done"}
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]
