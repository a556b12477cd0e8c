from __future__ import annotations

from broker.store.db import Database
from broker.store.packages import PackageRow, PackageStore


async def test_packages_are_replaced_by_spec(db: Database) -> None:
    store = PackageStore(db)
    assert await store.get("npm:a@1") is None
    await store.put("npm:b", "k0", {}, "0")
    await store.put("npm:a@1", "k1", {"a": "bin/a"}, "1.0")
    await store.put("npm:a@1", "k2", {"a": "bin/b"}, "1.1")
    assert await store.get("npm:a@1") == PackageRow("npm:a@1", "k2", {"a": "bin/b"}, "1.1")
    assert [row.spec for row in await store.list()] == ["npm:a@1", "npm:b"]
