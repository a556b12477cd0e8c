"""What goes wrong in the middle of a claim: the user gets a session or is told to try again, and their home is safe."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.sandbox.procfs import tree
from tests import host
from tests.e2e.conftest import short_directory
from tests.e2e.harness import BrokerProcess, running
from tests.e2e.pools import claims, filled, homes, inits, killed, newest, pooled, run, seen, slots, stop, until
from tests.e2e.stepping import Halting

pytestmark = pytest.mark.timeout(240)

CLAIM = (
    "before sandbox_claim",
    "after sandbox_claim",
    "after adopt_home",
    "after put_slot",
    "before bind",
    "after bind",
)
"""Steps of a claim, in the order in which most of them are reached."""
WAKING = ("before resume", "after resume")


async def post(broker: BrokerProcess, path: str, body: Any = None) -> tuple[int, str]:
    """A call of the control API, however it ends."""
    headers = {"Authorization": f"Bearer {broker.admin_token}"}
    async with (
        aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=100)) as http,
        http.post(f"{broker.control_url}{path}", json=body) as response,
    ):
        return response.status, await response.text()


async def create(broker: BrokerProcess, user: str) -> tuple[int, dict[str, Any]]:
    """Asks for a session; status and answer."""
    status, answer = await post(broker, "/v1/sessions", {"user": user, "agent": "demo", "wait": "ready"})
    return status, json.loads(answer)


@asynccontextmanager
async def claiming(broker: Halting, step: str) -> AsyncIterator[asyncio.Future[tuple[int, dict[str, Any]]]]:
    """The broker stands still at this step of a claim by ann; afterwards it goes on, and her answer comes."""
    broker.arm(step)
    asked = asyncio.ensure_future(create(broker, "ann"))
    try:
        await broker.halted()
        yield asked
    finally:
        broker.go_on()
        await asyncio.wait([asked], timeout=100)


async def at_home(broker: BrokerProcess, marks: list[str], user: str = "ann") -> None:
    """The user's home is there once, with all that they ever wrote; it gets one more mark.

    The answer before may have been of a sandbox that has died since, or of a try that is not over yet.
    """
    marks.append(f"mark-{len(marks)}")
    told = ""
    async with asyncio.timeout(60):
        while not told:
            while (await create(broker, user))[0] >= 400:
                await asyncio.sleep(0.02)
            with suppress(ConnectionError):
                told = await run(broker, user, f"echo {marks[-1]} >> ~/mine; cat ~/mine")
    assert [mark for mark in marks if mark not in told] == []
    assert len(homes(broker, user, "mine")) == 1
    assert not list((broker.state_dir / "quarantine").iterdir())


async def test_a_sandbox_that_dies_at_any_step_of_its_claim(place: Path, driver: str) -> None:
    async with running(place, driver, pooled(1), kind=Halting) as broker:
        assert isinstance(broker, Halting)
        marks: list[str] = []
        await at_home(broker, marks)
        for step in CLAIM:
            await stop(broker, "ann")
            await filled(broker, 1)
            ((slot, pid),) = inits(broker).items()
            async with claiming(broker, step) as asked:
                await killed(pid)
            status, answer = asked.result()
            assert status in (200, 201), (step, answer, broker.log_tail())
            await at_home(broker, marks)
            assert slot not in slots(broker), step
            if step != "after bind":  # then it was hers already
                assert (await newest(broker, "ann"))["path"] == "cold", step
        assert (await claims(broker))["generic failed"] >= len(CLAIM) - 1
        await filled(broker, 1)


async def test_a_paused_one_that_dies_as_it_is_woken(place: Path, driver: str) -> None:
    async with running(place, driver, pooled(1, 0), kind=Halting) as broker:
        assert isinstance(broker, Halting)
        marks: list[str] = []
        await at_home(broker, marks)
        for step in WAKING:
            await stop(broker, "ann")
            await filled(broker, 1)
            await until(broker, lambda: _paused(broker))
            ((slot, pid),) = inits(broker).items()
            async with claiming(broker, step) as asked:
                if step == "before resume":
                    os.kill(pid, signal.SIGKILL)  # what is frozen dies as it is thawed, or a moment later
                else:
                    await killed(pid)
            status, answer = asked.result()
            assert status in (200, 201), (step, answer, broker.log_tail())
            await at_home(broker, marks)
            assert slot not in slots(broker), step
            if step == "after resume":
                assert (await newest(broker, "ann"))["path"] == "cold"


async def _paused(broker: BrokerProcess) -> bool:
    return bool((await seen(broker))["paused"] == 1)


async def test_a_sandbox_that_hangs_in_the_middle_of_its_claim(place: Path, driver: str) -> None:
    """It neither dies nor answers: the user gets another, and nothing goes on in the home that was in it."""
    async with running(place, driver, pooled(1, after="[session]\nbind_timeout_s = 3"), kind=Halting) as broker:
        assert isinstance(broker, Halting)
        marks: list[str] = []
        await at_home(broker, marks)
        await stop(broker, "ann")
        await filled(broker, 1)
        ((slot, pid),) = inits(broker).items()
        async with claiming(broker, "before bind") as asked:
            for one in tree(pid):
                os.kill(one, signal.SIGSTOP)
        status, answer = asked.result()
        assert status in (200, 201), (answer, broker.log_tail())
        assert (await newest(broker, "ann"))["path"] == "cold"
        assert slot not in slots(broker)
        assert not Path(f"/proc/{pid}").exists()
        await at_home(broker, marks)


# An agent that is no good

MUTE = """
[agents.mute]
command = ["sleep", "100000"]
max_restarts = 0
[session]
agent_init_timeout_s = 0.5
[pool.agents.mute]
target = 3
"""


def cpu_s(broker: BrokerProcess) -> float:
    """Seconds of processor that the broker has used."""
    assert broker.process is not None
    fields = Path(f"/proc/{broker.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_an_agent_that_never_becomes_ready_is_not_tried_for_ever(place: Path, driver: str) -> None:
    """The breaker opens and is told; its users are told what is wrong; the others have what they had."""
    failed = 'cortex_pool_refills_total{agent="mute",result="failed"}'
    more = "breaker_failures = 3\nbreaker_s = 600\nbackoff_s = 0.1"
    async with running(place, driver, pooled(1, more=more, after=MUTE)) as broker:
        await until(broker, lambda: _open(broker))
        tried = await broker.metric(failed)
        assert 3 <= tried <= 4  # two may be under way at once
        told = await seen(broker, "mute")
        assert (told["hot"], told["paused"], told["making"], told["short"]) == (0, 0, 0, "breaker")
        assert "initialize" in told["error"]
        for user in ("ann", "bob"):
            problem = await broker.refused("POST", "/v1/sessions", {"user": user, "agent": "mute", "wait": "ready"})
            assert (problem["code"], problem["retryable"]) == ("agent.failed", True)
            assert "initialize" in problem["title"]
        await filled(broker, 1)
        began, now = cpu_s(broker), asyncio.get_running_loop().time()
        await asyncio.sleep(2)
        assert cpu_s(broker) - began < 0.25 * (asyncio.get_running_loop().time() - now)
        assert await broker.metric(failed) == tried
        assert len(slots(broker)) == 1
        assert await run(broker, "cid", "echo fine") == "fine"
        assert (await newest(broker, "cid"))["path"] == "generic_warm"


async def _open(broker: BrokerProcess) -> bool:
    return bool((await seen(broker, "mute")).get("breaker") == "open")


# A disk without room


def fill(state: Path) -> Callable[[], None]:
    """Takes all the room there is; the answer gives it back."""
    filler = state / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**20, 4096):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    assert shutil.disk_usage(state).free == 0
    return filler.unlink


@pytest.mark.parametrize("hot", [0, 1])
async def test_a_disk_that_is_full_in_the_middle_of_a_claim(driver: str, hot: int) -> None:
    """Served, or told so that they can try again; nothing is lost, and it heals by itself."""
    with short_directory() as place, host.small_disk(place / "state", "64m", "mode=0700"):
        config = pooled(1, hot, more="backoff_s = 0.1\nbreaker_s = 1")
        async with running(place, driver, config, kind=Halting) as broker:
            assert isinstance(broker, Halting)
            marks: list[str] = []
            await at_home(broker, marks)
            refused = 0
            for step in (*CLAIM, *(() if hot else WAKING)):
                await stop(broker, "ann")
                await filled(broker, 1)
                if not hot:
                    await until(broker, lambda: _paused(broker))
                async with claiming(broker, step) as asked:
                    free = fill(broker.state_dir)
                status, answer = asked.result()
                if status >= 400:
                    refused += 1
                    assert (status, answer["code"], answer["retryable"]) == (507, "store.disk_full", True), (
                        step,
                        answer,
                    )
                    assert answer["hint"]
                assert len(homes(broker, "ann", "mine")) == 1, step
                free()
                await at_home(broker, marks)
            assert refused > 0
            await filled(broker, 1)


# All at once


class Visitor:
    """Somebody who comes, works, leaves and comes back; what was acknowledged has to be there at the end."""

    def __init__(self, broker: BrokerProcess, name: str, chance: random.Random) -> None:
        self._broker = broker
        self._name = name
        self._chance = chance
        self.written: list[str] = []
        self.perhaps: list[str] = []

    async def lives(self, steps: int) -> None:
        for number in range(steps):
            what = self._chance.random()
            if what < 0.6:
                await self._works(f"{self._name}-{number}")
            elif what < 0.8:
                await self._asks("stop")
            else:
                await self._asks("prewarm")

    async def _asks(self, what: str) -> None:
        status, answer = await post(self._broker, f"/v1/sessions/{self._name}/main/{what}")
        assert status < 400 or json.loads(answer)["code"] == "session.not_found", answer

    async def _works(self, mark: str) -> None:
        """Whoever is refused is told that they may try again."""
        status, answer = await create(self._broker, self._name)
        if status >= 400:
            assert answer["retryable"], answer
            return
        path, text = f"/v1/sessions/{self._name}/main/prompt", f"!echo {mark} >> ~/mine; echo do''ne"
        status, said = await post(self._broker, path, {"text": text})
        done = status == 200 and '"done' in said
        (self.written if done else self.perhaps).append(mark)


@pytest.mark.slow
async def test_sandboxes_that_die_at_random_while_users_come_and_go(place: Path, driver: str) -> None:
    """Warm ones, claimed ones and used ones; killed, or held for good."""
    chance = random.Random(7)
    more = "backoff_s = 0.1\nbreaker_s = 1"
    after = "[pool.idle]\npause_after_s = 0.5\nfallback_keep_s = 2\n[session]\nbind_timeout_s = 10"
    config = pooled(4, 2, before="probe_interval_s = 0.5", more=more, after=after)
    async with running(place, driver, config) as broker:
        await filled(broker, 4)
        visitors = {name: Visitor(broker, name, chance) for name in (f"u{number}" for number in range(6))}
        visits = asyncio.ensure_future(asyncio.gather(*(one.lives(15) for one in visitors.values())))
        while not visits.done():
            with suppress(ProcessLookupError, IndexError):
                pid = chance.choice(sorted(inits(broker).values()))
                os.kill(pid, signal.SIGKILL if chance.random() < 0.8 else signal.SIGSTOP)
            await asyncio.wait([visits], timeout=chance.random())
        await visits
        for name, visitor in visitors.items():
            marks: list[str] = []
            await at_home(broker, marks, name)
            lines = Path(*homes(broker, name, "mine")).joinpath("mine").read_text().split()
            assert [mark for mark in visitor.written if mark not in lines] == []
            assert set(lines) <= {*visitor.written, *visitor.perhaps, *marks}
            assert len(lines) == len(set(lines))
        assert sum(len(visitor.written) for visitor in visitors.values()) > 10
        await filled(broker, 4)
        assert len(inits(broker)) == len(slots(broker))
