from __future__ import annotations

from dataclasses import replace

from broker.store.db import Database
from broker.store.sessions import SandboxRow, SessionRow, SessionStore

ROW = SessionRow("ann", "main", "s1", "demo", "stopped", "", "", 0, 3, b'{"a":1}', 5.0, 1.0, 2.0)
BOX = SandboxRow("slot1", 1, "docker", "ref", "ann", "main", "session", False, 1.0)


async def test_a_session_is_kept_and_replaced(db: Database) -> None:
    store = SessionStore(db)
    assert await store.get("ann", "main") is None
    await store.save(ROW)
    assert await store.get("ann", "main") == ROW
    changed = replace(ROW, state="ready", slot="slot1", incarnation=2, config=None)
    await store.save(changed)
    assert await store.get("ann", "main") == changed
    await store.delete("ann", "main")
    await store.delete("ann", "main")
    assert await store.get("ann", "main") is None


async def test_pages_are_in_order_without_gap_or_repeat(db: Database) -> None:
    store = SessionStore(db)
    keys = [(user, workspace) for user in ("a", "a|b", "b", "c") for workspace in ("main", "x")]
    for user, workspace in reversed(keys):
        await store.save(replace(ROW, user=user, workspace=workspace, id=f"{user}/{workspace}"))
    seen: list[tuple[str, str]] = []
    after = ("", "")
    while page := await store.page(after, limit=3):
        assert all(row.config is None for row in page)
        seen += [(row.user, row.workspace) for row in page]
        after = seen[-1]
    assert seen == keys
    assert [row.workspace for row in await store.of_user("a")] == ["main", "x"]


async def test_an_incarnation_is_welcomed_once(db: Database) -> None:
    store = SessionStore(db)
    await store.sandbox_save(BOX)
    assert await store.sandbox_welcomed("slot1", 2) is False
    assert await store.sandbox_welcomed("slot1", 1) is True
    assert await store.sandbox_welcomed("slot1", 1) is False
    assert await store.sandbox_get("slot1") == replace(BOX, welcomed=True)
    await store.sandbox_save(replace(BOX, incarnation=2))
    assert await store.sandboxes() == [replace(BOX, incarnation=2)]
    await store.sandbox_delete("slot1")
    await store.sandbox_delete("slot1")
    assert await store.sandbox_get("slot1") is None
