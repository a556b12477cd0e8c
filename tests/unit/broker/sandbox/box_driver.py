"""A driver whose sandboxes are scripted agent servers in this process, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from broker.errors import Code, CortexError
from broker.sandbox.driver import Exit, Found, Liveness, SandboxSpec
from tests.unit.broker.sandbox.scripted_agent import ScriptedAgent

Script = Callable[[ScriptedAgent, SandboxSpec], Awaitable[None]]


class BoxDriver:
    """``script`` is what runs in each sandbox; ``stubborn``: refs that cannot be removed."""

    name = "box"
    isolated = True

    def __init__(self, script: Script | None = None) -> None:
        self.script = script
        self.found: dict[str, Found] = {}
        self.calls: list[tuple[str, str]] = []
        self.stubborn: set[str] = set()
        self.down = False
        self.running = 0
        self.most_running = 0
        self._specs: dict[str, SandboxSpec] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def place(self, ref: str, slot: str, incarnation: int = 1, liveness: Liveness = "running") -> Found:
        """A sandbox of an earlier run."""
        self.found[ref] = Found(ref, slot, incarnation, liveness)
        return self.found[ref]

    async def open(self) -> None:
        return

    async def close(self) -> None:
        return

    async def prepare_image(self) -> str:
        return ""

    async def memory(self, ref: str) -> int:
        return 0

    async def create(self, spec: SandboxSpec) -> str:
        self._check("create", spec.slot)
        ref = f"ref-{spec.slot}"
        self._specs[ref] = spec
        self.place(ref, spec.slot, spec.incarnation, "created")
        return ref

    async def start(self, ref: str) -> None:
        self._check("start", ref)
        self._tasks[ref] = asyncio.create_task(self._run(self._specs[ref]))

    async def _run(self, spec: SandboxSpec) -> None:
        agent = ScriptedAgent(spec.sock_dir / "agent")
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.script is not None:
                await self.script(agent, spec)
        except EOFError:
            pass
        finally:
            self.running -= 1
            agent.close()

    async def pause(self, ref: str) -> None:
        self._check("pause", ref)

    async def resume(self, ref: str) -> None:
        self._check("resume", ref)

    async def stop(self, ref: str, grace_s: float) -> None:
        self._check("stop", ref)

    async def remove(self, ref: str) -> None:
        self._check("remove", ref)
        if ref in self.stubborn:
            raise CortexError(Code.ENGINE_TIMEOUT, "hung", hint="look at the engine")
        self.found.pop(ref, None)
        task = self._tasks.pop(ref, None)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def wait(self, ref: str) -> Exit:
        await asyncio.wait([self._tasks[ref]])
        return Exit(1, tail="last words")

    async def inspect(self, ref: str) -> Liveness:
        return self.found[ref].liveness if ref in self.found else "gone"

    def credentials_dir(self, slot: str, incarnation: int) -> str:
        return ""

    async def list(self) -> list[Found]:
        self._check("list", "")
        return list(self.found.values())

    def _check(self, call: str, what: str) -> None:
        self.calls.append((call, what))
        if self.down:
            raise CortexError(Code.ENGINE_DOWN, "down", hint="start it")
