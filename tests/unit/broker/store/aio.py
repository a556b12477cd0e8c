"""A database of its own for each example of a property test, which pytest's fixtures do not give."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from broker.store.db import Database


def in_database(work: Callable[[Database], Coroutine[Any, Any, None]]) -> None:
    """Runs ``work`` on a new, empty database."""

    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            db = await Database.open(Path(directory))
            try:
                await work(db)
            finally:
                await db.close()

    asyncio.run(run())
