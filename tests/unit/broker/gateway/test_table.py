"""What one slot may cause outside of it."""

from __future__ import annotations

from typing import Any

import pytest

from broker.errors import CortexError
from broker.gateway.context import Context
from broker.gateway.egress_ledger import MAX_HOSTS
from broker.gateway.messages import SlotEntry
from broker.gateway.table import SlotState
from broker.host.tasks import TaskOwner


async def test_a_slot_that_asks_for_ever_new_hosts_is_told_of_so_many_only() -> None:
    tasks = TaskOwner("test")
    context, told = Context(tasks), []

    def report(facts: dict[str, Any]) -> bool:
        told.append(facts)
        return True

    context.report = report
    state = SlotState(SlotEntry("a", 1, {"user": "ann", "workspace": "main"}), context)
    for number in range(3 * MAX_HOSTS):
        for _ in range(2):
            with pytest.raises(CortexError):
                state.out.open(f"h{number}", 443, "pip", tunnel=True)
    state.out.tell(state.out._told_at + 0.5)
    assert not told, "not more than once a second"
    state.out.tell(state.out._told_at + 1.0)
    (facts,) = told
    assert {key: facts[key] for key in ("kind", "slot", "user", "workspace")} == {
        "kind": "egress", "slot": "a", "user": "ann", "workspace": "main",
    }  # fmt: skip
    counts = {row["host"]: row["denied"] for row in facts["hosts"]}
    assert counts == {f"h{number}": 2 for number in range(MAX_HOSTS)} | {"": 4 * MAX_HOSTS}
    assert facts["hosts"][0]["tool"] == "pip"
    state.out.flush()
    assert len(told) == 1, "told once"
    await context.close()
    await tasks.close()
