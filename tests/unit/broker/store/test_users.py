from __future__ import annotations

from broker.metrics import REGISTRY
from broker.store.db import Database
from broker.store.tokens import TokenStore
from broker.store.users import StoredSection, UserStore


async def test_sections_are_versioned(db: Database) -> None:
    store = UserStore(db, clock=lambda: 7.0)
    assert await store.section("ann", "env") is None
    assert await store.put_section("ann", "env", {"A": "1"}) == 1
    assert await store.put_section("ann", "env", {"A": "ü"}) == 2
    assert await store.section("ann", "env") == StoredSection({"A": "ü"}, 2, 7.0)


async def test_all_sections_cost_one_query(db: Database) -> None:
    store = UserStore(db)
    await store.put_section("ann", "env", {"A": "1"})
    await store.put_section("ann", "mcp", {})
    await store.put_section("bob", "env", {"B": "1"})
    before = REGISTRY.get_sample_value("cortex_store_reads_total") or 0
    assert await store.sections("ann") == {"env": {"A": "1"}, "mcp": {}}
    assert REGISTRY.get_sample_value("cortex_store_reads_total") == before + 1


async def test_deleting_a_user_takes_all_of_theirs_and_nobody_elses(db: Database) -> None:
    users, tokens = UserStore(db), TokenStore(db)
    for user in ("ann", "bob"):
        await users.put_section(user, "env", {"A": "1"})
        await tokens.put(user.encode(), user, "main", 10)
        await tokens.receipt_put(user, user, "main", b"h", 1)
    await users.delete("ann")
    assert await users.sections("ann") == {}
    assert await tokens.get(b"ann") is None
    assert await tokens.receipt_get("ann") is None
    assert await users.sections("bob") == {"env": {"A": "1"}}
    assert await tokens.get(b"bob") is not None
    assert await tokens.receipt_get("bob") is not None
