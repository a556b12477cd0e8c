"""A broker's vault that rotates its keys and is killed on the way: python -m tests.unit.broker.store.rotating DIR.

Prints a line before and after every step, and goes on when it is told to.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from broker.store import keeper
from broker.store.db import Database
from broker.store.keys import KeyFile
from broker.store.vault import Vault

ROWS = 6
STEP = "step: "


def told(name: str) -> None:
    print(STEP + name, flush=True)
    sys.stdin.readline()


def step(kind: type, name: str) -> None:
    """Has ``kind.name`` say when it begins and ends."""
    inner = getattr(kind, name)

    async def awaited(*args: Any) -> Any:
        told(name)
        result = await inner(*args)
        told(f"{name} done")
        return result

    def called(*args: Any) -> Any:
        told(name)
        result = inner(*args)
        told(f"{name} done")
        return result

    setattr(kind, name, awaited if asyncio.iscoroutinefunction(inner) else called)


async def main(directory: Path) -> None:
    keeper.BATCH = 2
    for kind, name in ((KeyFile, "replace"), (Vault, "seal_canary"), (Vault, "reseal"), (Vault, "keys_in_use")):
        step(kind, name)
    db = await Database.open(directory)
    file = KeyFile(directory / "vault.key")
    vault = await keeper.open_vault(db, file, b"i" * 32)
    await keeper.Keeper(vault, file).rotate()
    told("rotated")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
