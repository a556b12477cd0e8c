"""A broker that is killed between any two renames loses no home and gives none to another."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.sandbox.reconcile import reconcile
from broker.sandbox.slots import Slots, home_key
from tests.unit.broker.sandbox.box_driver import BoxDriver

KEY = home_key("ann", "main")


class Killed(BaseException):
    """The process is gone."""


class Kill:
    """Kills at rename number ``at`` (from 0), before it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = os.rename
        self._left = -1
        monkeypatch.setattr(os, "rename", self._rename)

    def at(self, number: int) -> None:
        self._left = number

    def _rename(self, *args: Any, **kwargs: Any) -> None:
        if self._left == 0:
            self._left = -1
            raise Killed
        self._left -= 1
        self._real(*args, **kwargs)


def adopt(slots: Slots, slot: str) -> None:
    slots.adopt_home(slot, KEY)


def release(slots: Slots, slot: str) -> None:
    slots.release_home(slot, KEY)


async def forget(slot: str) -> None:
    """No store here."""


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("work", [adopt, release])
async def test_killed_between_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Slots, str], None], number: int
) -> None:
    kill = Kill(monkeypatch)
    slots = Slots(tmp_path / "state", uid=os.geteuid())
    slots.check()
    # A home that exists, at rest for an adoption, in its slot for a release.
    first = slots.create(slots.new_id())
    adopt(slots, first.id)
    (first.home_dir / "note").write_text("ann's")
    slot = first.id
    if work is adopt:
        release(slots, first.id)
        slot = slots.create(slots.new_id()).id
    kill.at(number)
    try:
        work(slots, slot)
    except Killed:
        ended = False
    else:
        ended = True
    kill.at(-1)
    assert ended == (number >= (3 if work is adopt else 2)), "a rename more or less: count them here too"
    after = Slots(tmp_path / "state", uid=os.geteuid())
    outcome = await reconcile(BoxDriver(), after, [], forget)
    assert outcome.failed == {}
    assert outcome.quarantined == []
    assert (tmp_path / "state" / "homes" / KEY / "home" / "note").read_text() == "ann's"
    assert after.ids() == []
