"""What one slot may cause outside of it."""

from __future__ import annotations

from typing import Any

from broker.gateway.context import Context
from broker.gateway.messages import SlotEntry
from broker.gateway.table import MAX_DENIED_TOLD, SlotState
from broker.host.tasks import TaskOwner


async def test_a_slot_that_asks_for_ever_new_hosts_is_told_of_so_often_only() -> None:
    tasks = TaskOwner("test")
    context, told = Context(tasks), []

    def report(facts: dict[str, Any]) -> None:
        told.append(facts["host"])

    context.report = report
    entry = SlotEntry("a", 1, {"user": "ann"})
    state = SlotState(entry, context)
    for number in range(3 * MAX_DENIED_TOLD):
        state.denied(f"h{number}", 443)
        state.denied(f"h{number}", 443)
    assert told == [f"h{number}" for number in range(MAX_DENIED_TOLD)]
    state.update(entry)
    state.denied("h0", 443)
    assert told[-1] == "h0"
    context.close()
    await tasks.close()
