"""Warm sandboxes that are nobody's: how one is made, and by what a stale one is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import both
from broker.sandbox.reconcile import Adopted
from broker.sandbox.slots import Slot
from broker.session.bringup import Prepared, Subject, agent_of, or_exit, prepare
from broker.session.fingerprint import fingerprint
from broker.session.sandbox import NOBODY, Runtime, Sandbox, place

log = structlog.get_logger(__name__)

FIRST = 1
"""Incarnation of a warm sandbox; its slot is new."""

OnLost = Callable[[Sandbox, str], None]
OnLeft = Callable[[Sandbox], None]


def _until_restart(box: Sandbox) -> None:
    """Nobody takes care of what is left; the next broker finds it."""


class Warmer(Protocol):
    """Makes generic warm sandboxes; ``session.pool`` decides how many and when."""

    def recipe(self, agent: str) -> str:
        """Hash of what a warm sandbox of ``agent`` would be made with now. Raises ``CortexError``."""

    async def make(self, agent: str, on_lost: OnLost, on_left: OnLeft = _until_restart) -> Sandbox:
        """A new one, its agent ready (and its conversation opened ahead, where the agent has that) and unclaimed.

        ``on_lost(box, reason)`` is called once when its link is lost before it is claimed. Raises ``CortexError``
        when it cannot be made, and has put away what there was; ``on_left(box)`` hears of one that the engine does
        not let go of, to be put away again.
        """

    async def adopt(self, adopted: Adopted, on_lost: OnLost, on_left: OnLeft = _until_restart) -> Sandbox:
        """Takes over one that outlived the last broker; like ``make``."""


class WarmMaker:
    """The ``Warmer`` over driver, slots and links. Warm sandboxes are made with the defaults of config.toml."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def recipe(self, agent: str) -> str:
        runtime = self._runtime
        config = runtime.config()
        told = {
            "agent": agent_of(config, agent).model_dump(mode="json"),
            "defaults": config.defaults.model_dump(mode="json"),
            "image": runtime.image,
        }
        return fingerprint(runtime.installation_key, "recipe", told)

    async def make(self, agent: str, on_lost: OnLost, on_left: OnLeft = _until_restart) -> Sandbox:
        runtime = self._runtime
        slot = runtime.slots.create(runtime.slots.new_id())
        try:
            box = self._place(agent, slot, FIRST, on_lost, welcomed=False)
        except CortexError:
            await runtime.slots.remove(slot.id)
            raise
        return await self._or_put_away(box, self._make(box), on_left)

    async def adopt(self, adopted: Adopted, on_lost: OnLost, on_left: OnLeft = _until_restart) -> Sandbox:
        record = adopted.record
        try:
            box = self._place(record.agent, adopted.slot, record.incarnation, on_lost, welcomed=True)
        except CortexError:
            await self._remove(adopted)
            raise
        box.ref, box.boot_hash = adopted.found.ref, record.boot
        box.paused = adopted.found.liveness == "paused"
        return await self._or_put_away(box, self._adopt(box), on_left)

    def _place(self, agent: str, slot: Slot, incarnation: int, on_lost: OnLost, *, welcomed: bool) -> Sandbox:
        box = place(
            self._runtime,
            NOBODY,
            slot,
            incarnation,
            agent=agent,
            welcomed=welcomed,
            on_status=lambda status: None,
            on_lost=lambda reason: on_lost(box, reason),
        )
        return box

    async def _remove(self, adopted: Adopted) -> None:
        """Ends one that cannot even be listened to."""
        runtime, slot = self._runtime, adopted.slot.id
        await runtime.driver.remove(adopted.found.ref)
        await runtime.slots.remove(slot)
        await runtime.store.sandbox_delete(slot)

    async def _or_put_away(self, box: Sandbox, work: Coroutine[Any, Any, None], on_left: OnLeft) -> Sandbox:
        timeout = self._runtime.config().session.bringup_timeout_s
        try:
            async with asyncio.timeout(timeout):
                await work
        except TimeoutError as error:
            await self._put_away(box, on_left)
            raise CortexError(
                Code.BRINGUP_TIMEOUT,
                f"a warm sandbox of {box.agent} was not ready in {timeout:g} s",
                cause=box.status.what if box.status else None,
                hint="try `cortex session create` with this agent; its error says more",
            ) from error
        except BaseException:
            await self._put_away(box, on_left)
            raise
        return box

    async def _put_away(self, box: Sandbox, on_left: OnLeft) -> None:
        """Never hides why it is put away."""
        try:
            await box.put_away(grace_s=0)
        except (CortexError, OSError) as error:
            log.warning("warm_sandbox_left", slot=box.slot.id, error=str(error))
            on_left(box)

    async def _make(self, box: Sandbox) -> None:
        prepared = await self._prepare(box)
        await both(self._launch(box, prepared), box.tell_gateway_unclaimed())
        await or_exit(box, self._settle(box, prepared), "before it was warm")

    async def _adopt(self, box: Sandbox) -> None:
        prepared = await self._prepare(box)
        if prepared.wanted.hashes["boot"] != box.boot_hash:
            raise CortexError(
                Code.SESSION_CONFLICT, "a warm sandbox was made with other settings", hint="it is replaced by itself"
            )
        await box.resume()
        await both(self._hello(box), box.tell_gateway_unclaimed())
        await box.link.probe()
        await or_exit(box, self._settle(box, prepared), "before it was taken over")

    async def _prepare(self, box: Sandbox) -> Prepared:
        box.recipe = self.recipe(box.agent)
        runtime = self._runtime
        return await prepare(runtime, Subject.nobody(box.agent), runtime.assembler.generic(), runtime.home_of(box.slot))

    async def _launch(self, box: Sandbox, prepared: Prepared) -> None:
        await box.launch(prepared.assembled, prepared.wanted)
        await self._hello(box)

    async def _hello(self, box: Sandbox) -> None:
        timeout = self._runtime.config().sandbox.hello_timeout_s
        await or_exit(box, box.link.wait_hello(timeout), "before its agent server said hello")

    async def _settle(self, box: Sandbox, prepared: Prepared) -> None:
        await box.bind(prepared.wanted, 0)
        await box.agent_ready()
        if prepared.wanted.values["settings"]["open_ahead"] and prepared.wanted.agent.protocol == "acp":
            await box.opened_ahead()
