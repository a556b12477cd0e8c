from __future__ import annotations

from broker.store.db import Database
from broker.store.tokens import Receipt, TokenRow, TokenStore


async def test_a_token_lives_until_revoked_and_is_never_revived(db: Database) -> None:
    store = TokenStore(db)
    await store.put(b"h1", "ann", "main", 100)
    await store.put(b"h2", "ann", "main", 200)
    await store.put(b"h3", "ann", "other", 200)
    assert await store.get(b"h1") == TokenRow(b"h1", "ann", "main", 100, False)
    assert await store.revoke("ann", "main") == 2
    assert await store.revoke("ann", "main") == 0
    await store.put(b"h1", "ann", "main", 900)
    assert await store.get(b"h1") == TokenRow(b"h1", "ann", "main", 100, True)
    other = await store.get(b"h3")
    assert other is not None
    assert not other.revoked
    assert await store.get(b"nope") is None


async def test_prune_takes_expired_tokens_only(db: Database) -> None:
    store = TokenStore(db)
    await store.put(b"old", "ann", "main", 100)
    await store.put(b"new", "ann", "main", 101)
    assert await store.prune(100) == 1
    assert await store.get(b"old") is None
    assert await store.get(b"new") is not None


async def test_a_receipt_is_written_once(db: Database) -> None:
    store = TokenStore(db)
    assert await store.receipt_put("id", "ann", "main", b"body", 5) is True
    assert await store.receipt_put("id", "bob", "main", b"other", 6) is False
    assert await store.receipt_get("id") == Receipt("id", "ann", "main", b"body", 5)
    assert await store.receipts_prune(5) == 0
    assert await store.receipts_prune(6) == 1
    assert await store.receipt_get("id") is None
