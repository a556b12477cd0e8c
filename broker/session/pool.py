"""The pool: generic warm sandboxes of each agent, made ahead so that nobody waits for one.

``take`` hands one out, once, without a suspension; everything else is a consequence of events: a claim,
a loss, new settings, the end of a pause. Each event leads to one look at all shelves (``pool_policy``
decides what to do) and sets the timer for the next, so that no shelf stays short unless a reason says so.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from broker.config import PoolAgentConfig
from broker.errors import Code, CortexError
from broker.host.memory import HostMemory
from broker.host.memory import read as read_memory
from broker.host.tasks import TaskOwner
from broker.metrics import POOL_CLAIMS, POOL_REFILLS, POOL_TARGET
from broker.sandbox.limits import TokenBucket
from broker.sandbox.reconcile import Adopted
from broker.session.breaker import Patience
from broker.session.mailbox import crashed
from broker.session.pool_care import Care
from broker.session.pool_ends import Ends
from broker.session.pool_policy import Limits, Plan, Stock, plan, wanted
from broker.session.pool_view import (
    Facts,
    Row,
    Users,
    expect_refills,
    forget,
    publish,
    publish_memory,
    publish_users,
    view,
)
from broker.session.sandbox import Runtime, Sandbox
from broker.session.shelf import GUESS_BYTES, Member, Shelf
from broker.session.warm import Warmer

log = structlog.get_logger(__name__)

TICK_S = 15.0
"""Between looks that no event asks for: at the image, and at the host's memory, which bring none."""
YIELD_S = 5.0
"""Users' starts go first for so long without a break; then one sandbox is made at a time beside them."""
SLACK_S = 10.0
"""What the maker of a sandbox is given beyond its own deadline."""
AFTER_CLAIM_S = 0.02
"""Whoever has taken one is served before it is looked at what is lacking."""
NONE_WANTED = PoolAgentConfig(minimum=0, target=0, maximum=0, hot=0)


class Pool:
    """See the module. ``users``: agent and state (hot or paused) of each session that is warm without being asked for.

    ``clock`` is monotonic seconds; ``memory`` is the host's; ``chance`` gives numbers from 0 to 1.
    """

    def __init__(
        self,
        runtime: Runtime,
        warmer: Warmer,
        *,
        users: Callable[[], Iterable[tuple[str, str]]] = tuple,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], HostMemory] = read_memory,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._runtime = runtime
        self._warmer = warmer
        self._users = users
        self._clock = clock
        self._memory = memory
        self._chance = chance
        self._tasks = TaskOwner("pool")
        self._shelves: dict[str, Shelf] = {}
        self._members: dict[str, tuple[Shelf, Member]] = {}
        """By slot."""
        self._expected: dict[str, int] = {}
        config = runtime.config().pool
        self._bucket = TokenBucket(config.refill_burst, config.refill_per_s)
        self._care = Care(runtime.driver, self._tasks, lose=self._lose, changed=self._soon)
        self._ends = Ends(self._tasks, changed=self._soon)
        self._with_users: set[str] = set()
        self._image = ""
        self._image_error = ""
        self._not_before = float("-inf")
        self._users_starting = 0
        self._users_since = 0.0
        self._started = False
        self._closed = False
        self._due: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- what others ask -----------------------------------------------------------------------

    def start(self) -> None:
        """Begins to fill the shelves; adopt before."""
        self._started = True
        self.settings_changed()
        self._tasks.start(self._tick(), "tick")

    def take(self, agent: str, boot: str) -> Sandbox | None:
        """A warm sandbox of ``agent`` made with ``boot``, handed out this once; None when there is none.

        It is the caller's from then on: to claim (``box.resume`` first where it is ``paused``), or to put away.
        """
        shelf = self._shelves.get(agent)
        if shelf is None or self._closed or not (len(shelf) or self._wanted(shelf)):
            return None
        box, result = self._pop(shelf, boot)
        shelf.claimed(result)
        POOL_CLAIMS.labels("generic", result).inc()
        self._lacks()
        return box

    def _pop(self, shelf: Shelf, boot: str) -> tuple[Sandbox | None, str]:
        while (member := shelf.best()) is not None:
            box = member.box
            if box.boot_hash != boot:
                self._refresh(shelf)
                return None, "stale"
            self._leave(shelf, member)
            unfit = _unfit(box)
            if not unfit:
                return box, "hit"
            self._ends.end(shelf, box, unfit)
        return None, "empty"

    @contextmanager
    def yielding(self) -> Iterator[None]:
        """Around a cold start of a user's: none are made meanwhile, unless users start without a break."""
        if self._users_starting == 0:
            self._users_since = self._clock()
        self._users_starting += 1
        try:
            yield
        finally:
            self._users_starting -= 1
            if self._users_starting == 0:
                self._soon()

    def adopt(self, adopted: Adopted) -> asyncio.Task[None]:
        """Takes in a warm sandbox that outlived the last broker; the task ends when it is here, or put away."""
        shelf = self._shelf(adopted.record.agent)
        shelf.making += 1
        return self._tasks.start(self._adopt(shelf, adopted), f"adopt.{adopted.slot.id}")

    def expect(self, agent: str, count: int | None) -> None:
        """Somebody who forecasts wants so many, between minimum and maximum; None: as many as configured."""
        if count is None:
            self._expected.pop(agent, None)
        else:
            self._expected[agent] = count
        self._soon()

    def settings_changed(self) -> None:
        """config.toml is another one now: targets apply at once, what was made otherwise goes."""
        config = self._runtime.config().pool
        self._bucket.configure(config.refill_burst, config.refill_per_s, self._clock())
        for agent in config.agents:
            self._shelf(agent)
        for shelf in self._shelves.values():
            shelf.breaker.reset()
            self._refresh(shelf)
        self._soon()

    def view(self) -> dict[str, Any]:
        """For operators; see ``control.schema.Pool``."""
        now, config = self._clock(), self._runtime.config().pool
        for shelf in self._shelves.values():
            shelf.pass_time(now)
        host = self._memory()
        facts = Facts(
            budget=self._budget(host),
            available=host.available,
            reserve=config.reserve_bytes,
            cost_per_hour=config.cost_per_hour,
            image=self._image,
            image_error=self._image_error,
            yielding=self._users_starting > 0,
            now=now,
        )
        rows = [Row(shelf, self._settings(shelf), self._wanted(shelf)) for shelf in self._shelves.values()]
        return view(rows, list(self._users()), facts)

    async def close(self) -> None:
        """Lets go of all; they go on and are adopted by the next broker. Idempotent."""
        self._closed = True
        self._ends.closed = True
        for handle in (self._due, self._timer):
            if handle is not None:
                handle.cancel()
        await self._tasks.close()
        boxes = [member.box for _, member in self._members.values()]
        boxes += [box for shelf in self._shelves.values() for box in shelf.leaving]
        for box in boxes:
            await box.let_go()
        self._members.clear()
        for agent in self._with_users | set(self._shelves):
            forget(agent)
        self._shelves.clear()

    # -- one look at everything ----------------------------------------------------------------

    def _soon(self) -> None:
        """Looks once all that happens in this turn of the loop has happened."""
        if self._due is None and self._started and not self._closed:
            self._due = asyncio.get_running_loop().call_soon(self._look)

    def _lacks(self) -> None:
        """One fewer: those that come at once are made up for together."""
        now = self._clock()
        if now >= self._not_before:
            self._not_before = now + self._runtime.config().pool.debounce_s
        self._later(AFTER_CLAIM_S)

    def _later(self, delay: float) -> None:
        loop = asyncio.get_running_loop()
        if self._started and not self._closed and (self._timer is None or self._timer.when() > loop.time() + delay):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(delay, self._timed)

    def _timed(self) -> None:
        self._timer = None
        self._look()

    def _look(self) -> None:
        """Decides, begins what was decided, and sets the timer for the next look."""
        now = self._clock()
        self._due = None
        users = list(self._users())
        stocks, limits = [self._stock(shelf, now) for shelf in self._shelves.values()], self._limits(users, now)
        decided = plan(stocks, limits)
        taken = sum(stock.held for stock in stocks) + limits.others
        publish_memory(taken, limits.budget, limits.available, limits.reserve)
        for agent in decided.make:
            self._bucket.take(now)
            self._begin(self._shelves[agent])
        for agent, shelf in list(self._shelves.items()):
            shelf.pass_time(now)
            shelf.short = decided.short[agent]
            for member in shelf.worst(decided.end.get(agent, 0)):
                self._leave(shelf, member)
                self._ends.end(shelf, member.box, "there are more than wanted, or memory is short")
            for member in shelf.to_pause(decided.pause.get(agent, 0)):
                self._care.pause(shelf, member)
            for member in shelf.to_resume(decided.resume.get(agent, 0)):
                self._care.resume(shelf, member)
            publish(shelf, now)
            POOL_TARGET.labels(agent).set(self._wanted(shelf))
            if shelf.empty and agent not in self._runtime.config().pool.agents:
                del self._shelves[agent]
                forget(agent)
        self._with_users = publish_users(users, self._with_users | set(self._shelves))
        self._set_timer(decided, now)

    def _stock(self, shelf: Shelf, now: float) -> Stock:
        settings = self._settings(shelf)
        return shelf.stock(wanted=self._wanted(shelf), maximum=settings.maximum, hot=settings.hot, now=now)

    def _limits(self, users: Users, now: float) -> Limits:
        config, host = self._runtime.config().pool, self._memory()
        return Limits(
            concurrency=self._concurrency(now),
            tokens=self._bucket.whole(now) if now >= self._not_before else 0,
            budget=self._budget(host),
            others=sum(self._cost(agent) for agent, _ in users),
            available=host.available,
            reserve=config.reserve_bytes,
        )

    def _concurrency(self, now: float) -> int:
        if not self._users_starting:
            return self._runtime.config().pool.refill_concurrency
        return 1 if now - self._users_since >= YIELD_S else 0

    def _budget(self, host: HostMemory | None = None) -> int:
        return self._runtime.config().pool.memory_bytes or (host or self._memory()).total // 2

    def _cost(self, agent: str) -> int:
        shelf = self._shelves.get(agent)
        return shelf.cost if shelf is not None else GUESS_BYTES

    def _settings(self, shelf: Shelf) -> PoolAgentConfig:
        return self._runtime.config().pool.agents.get(shelf.agent, NONE_WANTED)

    def _wanted(self, shelf: Shelf) -> int:
        settings = self._settings(shelf)
        return wanted(settings.minimum, self._expected.get(shelf.agent, settings.target), settings.maximum)

    def _set_timer(self, decided: Plan, now: float) -> None:
        """No event tells when a pause is over."""
        times = []
        if now < self._not_before:
            times.append(self._not_before)
        elif "rate" in decided.held:
            times.append(now + self._bucket.wait(now))
        if self._users_starting and now - self._users_since < YIELD_S:
            times.append(self._users_since + YIELD_S)
        if "breaker" in decided.held:
            times += [shelf.breaker.until for shelf in self._shelves.values() if shelf.breaker.until > now]
        if self._timer is not None:
            self._timer.cancel()
        if decided.end:
            self._soon()
        self._timer = None
        if times:
            self._later(max(0.0, min(times) - now))

    async def _tick(self) -> None:
        while True:
            try:
                if self._shelves or not self._image:
                    await self._see_image()
            except CortexError as error:
                log.debug("pool_image_not_seen", error=str(error))
            except Exception:
                log.exception("pool_tick_crashed")
            for shelf in self._shelves.values():
                self._refresh(shelf)
            self._soon()
            await asyncio.sleep(TICK_S)

    # -- what they are made from ---------------------------------------------------------------

    def _shelf(self, agent: str) -> Shelf:
        if agent not in self._shelves:
            self._shelves[agent] = Shelf(agent)
            expect_refills(agent)
            self._refresh(self._shelves[agent])
        return self._shelves[agent]

    async def _see_image(self) -> str:
        """The id of what sandboxes are made from, fetched if need be. Raises ``CortexError``."""
        try:
            image = await self._runtime.driver.prepare_image()
        except CortexError as error:
            if str(error) != self._image_error:
                self._image_error = str(error)
                log.error("pool_image_missing", error=str(error), hint=error.hint)
            raise
        if image != self._image or self._image_error:
            self._image, self._image_error = image, ""
            for shelf in self._shelves.values():
                shelf.breaker.reset()
                self._refresh(shelf)
            self._soon()
        return image

    def _refresh(self, shelf: Shelf) -> None:
        """What would be made now; whatever was made otherwise goes."""
        try:
            recipe, shelf.refused = self._warmer.recipe(shelf.agent), ""
        except CortexError as error:
            if str(error) != shelf.refused and self._wanted(shelf):
                log.error("pool_recipe_refused", agent=shelf.agent, error=str(error), hint=error.hint)
            shelf.refused = str(error)
            return
        if recipe != shelf.recipe:
            shelf.recipe = recipe
            shelf.breaker.reset()
        for member in shelf:
            why = "it was made with other settings" if member.box.recipe != shelf.recipe else ""
            if member.image and self._image and member.image != self._image:
                why = "it was made from another image"
            if why:
                self._leave(shelf, member)
                self._ends.end(shelf, member.box, why)

    # -- making --------------------------------------------------------------------------------

    def _begin(self, shelf: Shelf) -> None:
        shelf.making += 1
        self._tasks.start(self._make(shelf), f"make.{shelf.agent}")

    async def _make(self, shelf: Shelf) -> None:
        limit = self._runtime.config().session.bringup_timeout_s + SLACK_S
        try:
            image = await self._see_image()
            if self._stock(shelf, self._clock()).excess:
                return  # fetching an image takes its time
            async with asyncio.timeout(limit):
                box = await self._warmer.make(shelf.agent, self._lost, lambda box: self._ends.left(shelf, box))
        except TimeoutError:
            self._not_made(shelf, _too_slow(shelf.agent, limit))
        except CortexError as error:
            self._not_made(shelf, error)
        except Exception as error:
            log.exception("pool_refill_crashed", agent=shelf.agent)
            self._not_made(shelf, crashed(error))
        else:
            POOL_REFILLS.labels(shelf.agent, "made").inc()
            shelf.breaker.reset()
            self._put(shelf, Member(box, image))
        finally:
            shelf.making -= 1
            self._soon()

    def _not_made(self, shelf: Shelf, error: CortexError) -> None:
        config, breaker, now = self._runtime.config().pool, shelf.breaker, self._clock()
        before, known = breaker.state(now), breaker.error
        patience = Patience(config.backoff_s, config.breaker_failures, config.breaker_s)
        breaker.failed(now, str(error), patience, chance=self._chance(), lasting=not error.code.retryable)
        POOL_REFILLS.labels(shelf.agent, "failed").inc()
        facts = {"agent": shelf.agent, "error": str(error), "hint": error.hint}
        if before == "closed" and breaker.state(now) == "open":
            log.error("pool_breaker_open", failures=breaker.failures, seconds=config.breaker_s, **facts)
        elif str(error) not in (known, self._image_error):
            log.warning("pool_refill_failed", **facts)
        self._soon()

    async def _adopt(self, shelf: Shelf, adopted: Adopted) -> None:
        limit = self._runtime.config().session.bringup_timeout_s + SLACK_S
        try:
            async with asyncio.timeout(limit):
                box = await self._warmer.adopt(adopted, self._lost, lambda box: self._ends.left(shelf, box))
        except (CortexError, TimeoutError) as error:
            log.warning("warm_sandbox_not_adopted", slot=adopted.slot.id, error=str(error))
        else:
            self._put(shelf, Member(box, adopted.found.image))
        finally:
            shelf.making -= 1
            self._soon()

    # -- coming and going ----------------------------------------------------------------------

    def _put(self, shelf: Shelf, member: Member) -> None:
        """It is here now: from now on it can be taken, and it is looked after."""
        shelf.pass_time(self._clock())
        self._members[member.box.slot.id] = (shelf, member)
        self._care.begin(shelf, member)
        self._refresh(shelf)

    def _lost(self, box: Sandbox, reason: str) -> None:
        """Its link is gone; of one that was handed out somebody else hears."""
        shelf, member = self._members.get(box.slot.id, (None, None))
        if shelf is not None and member is not None and member.box is box:
            self._lose(shelf, member, reason)

    def _lose(self, shelf: Shelf, member: Member, reason: str) -> None:
        if member not in shelf:
            return
        self._leave(shelf, member)
        self._ends.end(shelf, member.box, reason)
        self._lacks()

    def _leave(self, shelf: Shelf, member: Member) -> None:
        """It is nobody's here any more, and nobody looks after it."""
        shelf.pass_time(self._clock())
        shelf.remove(member)
        self._members.pop(member.box.slot.id, None)
        member.let_be()


def _unfit(box: Sandbox) -> str:
    """Why it may not be handed out; "" when it may."""
    if box.failed is not None:
        return str(box.failed)
    return "" if box.link.connected else "its agent server hung up"


def _too_slow(agent: str, limit: float) -> CortexError:
    return CortexError(
        Code.BRINGUP_TIMEOUT,
        f"a warm sandbox of {agent} was not there in {limit:g} s",
        hint="look at the load of host and engine",
    )
