from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import CortexError
from broker.sandbox.driver import Found, Liveness
from broker.sandbox.reconcile import Outcome, SandboxRecord, plan, reconcile
from broker.sandbox.slots import Slots, home_key
from tests.unit.broker.sandbox.box_driver import BoxDriver


@dataclass(frozen=True)
class Row:
    slot: str
    incarnation: int = 1
    driver: str = "box"
    ref: str = "r"
    user: str = "ann"
    workspace: str = "main"
    role: str = "session"
    welcomed: bool = True
    agent: str = "demo"
    boot: str = ""


class House:
    """Slots on a real disk, a driver, and the rows of a store."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.slots = Slots(state, uid=os.geteuid())
        self.slots.check()
        self.driver = BoxDriver()
        self.forgotten: list[str] = []

    def slot(self, user: str | None = "ann") -> str:
        """A slot of an earlier run, with the user's home and a note in it."""
        slot = self.slots.create(self.slots.new_id())
        if user is not None:
            self.slots.adopt_home(slot.id, home_key(user, "main"))
            (slot.home_dir / "note").write_text(user)
        return slot.id

    async def forget(self, slot: str) -> None:
        self.forgotten.append(slot)

    async def run(self, *rows: SandboxRecord) -> Outcome:
        self.slots = Slots(self.state, uid=os.geteuid())
        return await reconcile(self.driver, self.slots, rows, self.forget)

    def at_rest(self, user: str = "ann") -> str:
        return (self.state / "homes" / home_key(user, "main") / "home" / "note").read_text()


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "state")


@pytest.mark.parametrize("liveness", ["running", "paused"])
async def test_ours_and_known_is_adopted_untouched(house: House, liveness: Liveness) -> None:
    slot = house.slot()
    found = house.driver.place("r", slot, 4, liveness)
    row = Row(slot, 4)
    outcome = await house.run(row)
    (adopted,) = outcome.adopted
    assert (adopted.record, adopted.found, adopted.slot.id) == (row, found, slot)
    assert (adopted.slot.home_dir / "note").read_text() == "ann"
    assert house.driver.calls == [("list", "")]
    assert house.forgotten == []


@pytest.mark.parametrize(
    ("change", "liveness"),
    [
        ({"welcomed": False}, "running"),
        ({"incarnation": 3}, "running"),
        ({"ref": "another"}, "running"),
        ({"user": "bob"}, "running"),
        ({"role": "builder"}, "running"),
        ({}, "exited"),
        ({}, "created"),
    ],
)
async def test_what_does_not_match_is_removed_and_its_home_put_to_rest(
    house: House, change: dict[str, object], liveness: Liveness
) -> None:
    slot = house.slot()
    house.driver.place("r", slot, 1, liveness)
    outcome = await house.run(Row(slot, **change))  # type: ignore[arg-type]
    assert (outcome.adopted, outcome.removed, outcome.freed) == ([], ["r"], [slot])
    assert house.at_rest() == "ann"
    assert house.forgotten == [slot]
    assert house.slots.ids() == []


async def test_orphans_of_every_kind_go(house: House) -> None:
    no_row, no_sandbox, blank = house.slot("ann"), house.slot("bob"), house.slot(None)
    house.driver.place("a", no_row)
    house.driver.place("b", "ffffffff")
    outcome = await house.run(Row(no_sandbox, user="bob"), Row("eeeeeeee", user="eve"))
    assert sorted(outcome.removed) == ["a", "b"]
    assert sorted(outcome.freed) == sorted([no_row, no_sandbox, blank, "ffffffff", "eeeeeeee"])
    assert (house.at_rest("ann"), house.at_rest("bob")) == ("ann", "bob")
    assert sorted(house.forgotten) == sorted(outcome.freed)


async def test_a_home_stays_where_a_process_may_still_write(house: House) -> None:
    slot = house.slot()
    house.driver.place("r", slot)
    house.driver.stubborn.add("r")
    outcome = await house.run()
    assert list(outcome.failed) == [slot]
    assert house.slots.owner(slot) == home_key("ann", "main")
    assert not house.slots.has_home(home_key("ann", "main"))
    assert house.forgotten == []
    house.driver.stubborn.clear()
    assert (await house.run()).freed == [slot]
    assert house.at_rest() == "ann"


async def test_another_drivers_sandbox_is_left_alone(house: House) -> None:
    slot = house.slot()
    house.driver.place("ours", slot)
    outcome = await house.run(Row(slot, driver="docker"))
    assert (outcome.foreign, outcome.removed) == ([slot], ["ours"])
    assert house.slots.owner(slot) == home_key("ann", "main")
    assert house.forgotten == []


async def test_nothing_is_touched_when_the_engine_does_not_answer(house: House) -> None:
    slot = house.slot()
    house.driver.down = True
    with pytest.raises(CortexError):
        await house.run(Row(slot))
    assert house.slots.owner(slot) == home_key("ann", "main")
    assert house.forgotten == []


async def test_a_second_home_is_quarantined(house: House) -> None:
    running, orphan = house.slot(), house.slot(None)
    root = house.state / "slots" / orphan
    os.rename(root / "owner.", root / f"owner.{home_key('ann', 'main')}")
    (house.state / "slots" / orphan / "vol" / "home" / "note").write_text("impostor")
    rest = house.state / "homes" / home_key("ann", "main") / "home"
    rest.mkdir(parents=True)
    (rest / "note").write_text("at rest")
    house.driver.place("r", running)
    outcome = await house.run(Row(running))
    assert [adopted.slot.id for adopted in outcome.adopted] == [running]
    assert sorted(outcome.quarantined) == sorted([running, orphan])
    assert not house.slots.has_home(home_key("ann", "main"))
    texts = [(path / "note").read_text() for path in (house.state / "quarantine").iterdir()]
    assert sorted(texts) == ["at rest", "impostor"]


async def test_two_sandboxes_in_one_slot_leave_one(house: House) -> None:
    slot = house.slot()
    house.driver.place("r", slot, 2)
    house.driver.place("old", slot, 1)
    outcome = await house.run(Row(slot, 2))
    assert outcome.removed == ["old"]
    assert [adopted.found.ref for adopted in outcome.adopted] == ["r"]


SLOTS = st.sampled_from(["a1", "b2", "c3"])
FOUND = st.builds(
    Found, st.text("xyz", min_size=1, max_size=2), SLOTS, st.integers(1, 2), st.sampled_from(["running", "exited"])
)
ROWS = st.builds(Row, SLOTS, st.integers(1, 2), st.sampled_from(["box", "docker"]), st.sampled_from(["", "x"]))
OWNERS = st.dictionaries(SLOTS, st.sampled_from([None, home_key("ann", "main")]))


@given(st.lists(FOUND, max_size=5), st.lists(ROWS, max_size=4, unique_by=lambda row: row.slot), OWNERS)
@settings(max_examples=200)
def test_every_sandbox_and_slot_has_one_fate(
    found: list[Found], rows: list[Row], owners: dict[str, str | None]
) -> None:
    decided = plan("box", found, rows, owners)
    removed = [sandbox for group in decided.remove.values() for sandbox in group]
    assert len(removed) + len(decided.adopt) == len(found)
    fates = [*decided.adopt, *decided.free, *decided.foreign]
    assert len(fates) == len(set(fates))
    assert set(fates) == {*owners, *(row.slot for row in rows), *(sandbox.slot for sandbox in found)}
    for slot, (row, sandbox) in decided.adopt.items():
        assert row.slot == slot == sandbox.slot
        assert row.welcomed
        assert owners[slot] == home_key(row.user, row.workspace)


async def test_a_home_that_cannot_be_set_aside_keeps_no_broker_from_starting(house: House) -> None:
    running, other = house.slot(), house.slot("bob")
    (house.state / "homes" / home_key("ann", "main") / "home").mkdir(parents=True)
    (house.state / "quarantine").rmdir()
    house.driver.place("r", running)
    outcome = await house.run(Row(running))
    assert [adopted.slot.id for adopted in outcome.adopted] == [running]
    assert "quarantine" in outcome.failed[running]
    assert outcome.freed == [other]
    assert house.at_rest("bob") == "bob"


async def test_a_warm_sandbox_goes_on_with_the_blank_home_that_is_nobodys(house: House) -> None:
    slot = house.slot(user=None)
    house.driver.place("r", slot)
    outcome = await house.run(Row(slot, role="warm", user="", workspace=""))
    assert [adopted.slot.id for adopted in outcome.adopted] == [slot]


@pytest.mark.parametrize("user", [None, "ann"])
async def test_a_warm_sandbox_that_was_about_to_be_somebodys_goes(house: House, user: str | None) -> None:
    """Killed in the middle of a claim: the row says warm though a home is inside, or there is no home at all."""
    slot = house.slot(user=user)
    if user is None:
        os.rmdir(house.state / "slots" / slot / "vol" / "home")
    house.driver.place("r", slot)
    outcome = await house.run(Row(slot, role="warm", user="", workspace=""))
    assert (outcome.adopted, outcome.removed) == ([], ["r"])
    if user is not None:
        assert house.at_rest() == "ann"
