"""The agent server after the boot: puts the parts together, runs and stops them."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import uvloop

from sandbox_agent import memory, packages
from sandbox_agent.bind import Binder, Claim
from sandbox_agent.boot import Booted, say
from sandbox_agent.control import Control
from sandbox_agent.credentials import CredentialFiles
from sandbox_agent.forward import Forwarder
from sandbox_agent.handover import Handover
from sandbox_agent.homefiles import UnsafePath, write_missing
from sandbox_agent.port import AgentHub
from sandbox_agent.process import AgentProcess, reap_orphans
from sandbox_agent.raw import RawClients, port_ready, refuse
from sandbox_agent.servers import Multiplexer
from sandbox_agent.spawn import fill
from sandbox_agent.streams import Streams
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.wire.codec import WireError
from sandbox_agent.wire.messages import (
    AgentSpec,
    Attach,
    Bind,
    Build,
    Built,
    Hello,
    Message,
    Probe,
    Status,
    Stop,
    Welcome,
)

SIGNAL_GRACE_S = 5.0
COUNTS_S = 0.25
"""How late the broker may learn of open turns and clients."""
MAX_AGENT_INFO = 65_536
"""Characters."""
REAP_AGAIN_S = 0.1
WEIGH_EVERY_S = 60.0
"""What a process takes of the memory costs the kernel a millisecond to say."""

CACHE = ".cache/cortex/mcp"
"""Below HOME: what MCP servers had when they last ran."""

MakeHub = Callable[[Booted, Welcome, Callable[[], None], Callable[[], AgentSpec | None]], AgentHub]
"""Arguments: what boot left, the welcome, on_change, the agent that runs or will next."""


def make_acp_hub(
    booted: Booted, welcome: Welcome, on_change: Callable[[], None], spec: Callable[[], AgentSpec | None]
) -> AgentHub:
    """The real hub, with its journal."""
    from sandbox_agent.acp import AcpHub
    from sandbox_agent.journal_link import granter

    path = os.path.join(booted.socket_dir, "agent")
    grant = granter(lambda: path, lambda: welcome.secret)
    surroundings = booted.surroundings
    run_dir = f"/tmp/cortex-{os.urandom(8).hex()}"

    def environment() -> dict[str, str]:
        agent = spec()
        return surroundings.environment_with(agent.env if agent is not None else {})

    def mux(cwd: Callable[[], str], claimed: Callable[[], bool], on_change: Callable[[], None]) -> Multiplexer:
        from sandbox_agent.mux import Mux  # most memory of all parts, and not everybody has MCP servers

        cache = os.path.join(surroundings.home, CACHE)
        return Mux(run_dir, environment, cwd, lambda: cache if claimed() else None, on_change)

    return AcpHub(welcome=welcome, grant=grant, on_change=on_change, mux=mux, spec=spec)


def serve(booted: Booted, make_hub: MakeHub = make_acp_hub) -> int:
    """Runs until told to stop; returns the exit code."""
    try:
        welcome = Welcome.decode(booted.welcome)
    except WireError as error:
        say(f"the welcome is broken: {error}")
        return 70
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(booted, welcome, make_hub))


async def _run(booted: Booted, welcome: Welcome, make_hub: MakeHub) -> int:
    return await Server(booted, welcome, make_hub).run()


class Server:
    """Owns every part; each of them knows only the callables it was given."""

    def __init__(self, booted: Booted, welcome: Welcome, make_hub: MakeHub) -> None:
        self._booted = booted
        self._welcome = welcome
        self._tasks = TaskOwner("server")
        self._stop: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._said: Status | None = None
        self._saying = False
        self._counts: asyncio.TimerHandle | None = None
        self._building = False
        self._weigh_at = 0.0
        self._pss = 0
        path = os.path.join(booted.socket_dir, "agent")
        self.raw = RawClients(port=lambda: self.process.port, on_change=self._changed)
        self.hub = make_hub(booted, welcome, self._changed, lambda: self.process.upcoming)
        self.process = AgentProcess(
            hub=self.hub,
            surroundings=booted.surroundings,
            max_line=welcome.max_message_bytes,
            on_change=self._changed,
            port_ready=port_ready,
            raw_clients=lambda: self.raw.count,
        )
        self.credentials = CredentialFiles(
            home=booted.surroundings.home, directory=welcome.credentials_dir, send=lambda said: self.control.send(said)
        )
        self.binder = Binder(
            home=booted.surroundings.home,
            hub=self.hub,
            process=self.process,
            files=self.credentials,
            session=welcome.session,
            on_claim=self._claimed,
        )
        self.streams = Streams(path, secret=welcome.secret, count=welcome.streams, serve=self._attached)
        self.control = Control(
            path,
            secret=welcome.secret,
            hello=self._hello,
            on_message=self._message,
            on_up=self._up,
            on_down=self.streams.down,
        )
        self.ports: tuple[Handover | Forwarder, ...] = (
            Handover(booted.gateway, os.path.join(booted.socket_dir, "gateway")),
            Forwarder(booted.egress, os.path.join(booted.socket_dir, "egress")),
        )

    async def run(self) -> int:
        """Until a stop message, SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_to_stop, SIGNAL_GRACE_S)
        self._adopt_agent()
        self._essential(self.control.run(self._booted.control), "control")
        agent = self._essential(self.process.run(), "agent")
        for port in self.ports:
            await port.start()
        if os.getpid() == 1:
            self._mind_orphans()
        gc.collect()
        gc.freeze()  # what is imported stays: the collector need not look at it again
        grace = await self._stop
        await self._shut_down(agent, grace)
        return 0

    def _adopt_agent(self) -> None:
        spec = self._welcome.agent_spec
        if spec is None:
            return
        self.process.adopt(self._booted.child, self._booted.failure, spec)
        if self._booted.child is not None:
            self.binder.applied["process"] = self._welcome.agent_hash

    async def _shut_down(self, agent: asyncio.Task[None], grace_s: float) -> None:
        await self.process.stop(grace_s * 0.6)
        await asyncio.wait([agent], timeout=1.0)
        try:
            async with asyncio.timeout(max(0.5, grace_s * 0.3)):
                await self.hub.close()
        except TimeoutError:
            log.error("the journal did not close in time")
        self._say()
        self.credentials.close()
        await self.control.close()
        await self.streams.close()
        await self.raw.close()
        for port in self.ports:
            await port.close()
        await self._tasks.close(timeout=1.0)

    def _essential(self, coro: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A part without which there is no server: its crash ends the sandbox, which the broker sees."""

        def crashed(error: BaseException) -> None:
            log.error("%s failed", name, exc_info=error)
            self._ask_to_stop(1.0)

        return self._tasks.start(coro, name, on_error=crashed)

    def _ask_to_stop(self, grace_s: float) -> None:
        if not self._stop.done():
            self._stop.set_result(grace_s)

    # -- to the broker --------------------------------------------------------------------------

    def _agent_info(self) -> str:
        """The broker asks whether there is an answer, not what is in it: an outsized one must not break the link."""
        info = self.hub.agent_info
        return info if len(info) <= MAX_AGENT_INFO else "{}"

    def _hello(self) -> Hello:
        return Hello(
            pid=os.getpid(),
            applied=dict(self.binder.applied),
            agent=self.process.state,
            agent_info=self._agent_info(),
            open_turns=self.hub.open_turns,
        )

    def _status(self, number: int = 0, *, pss: int = 0, pending: int = 0) -> Status:
        process = self.process
        return Status(
            agent=process.state,
            id=number,
            agent_info=self._agent_info(),
            agent_pid=process.pid,
            code=process.code,
            what=process.what,
            hint=process.hint,
            open_turns=self.hub.open_turns,
            clients=self.hub.clients + self.raw.count,
            turns=self.hub.turns,
            ahead=self.hub.ahead,
            pending=pending,
            pss_bytes=pss,
            started_ms=self._booted.started_ms,
        )

    def _up(self) -> None:
        self.streams.up()
        self.credentials.reconnected()
        self._said = None
        self._changed()

    def _changed(self) -> None:
        """Many changes in one turn of the loop make one status."""
        if not self._saying:
            self._saying = True
            asyncio.get_running_loop().call_soon(self._say)

    def _say(self) -> None:
        self._saying = False
        self.process.noticed()
        if self.process.state == "failed":
            self.binder.forget_process()
        status = self._status()
        if status == self._said or not self.control.up:
            return
        said = self._said
        if said is not None and _counted(said, status) == status:
            # Counts alone change with every turn: the broker has no hurry for them, the turn has.
            if self._counts is None:
                self._counts = asyncio.get_running_loop().call_later(COUNTS_S, self._send_status)
            return
        self._send_status()

    def _send_status(self) -> None:
        if self._counts is not None:
            self._counts.cancel()
            self._counts = None
        self._said = self._status()
        self.control.send(self._said)

    # -- from the broker ------------------------------------------------------------------------

    def _message(self, message: Message) -> None:
        if isinstance(message, Bind):
            self._put_agent_files()
            self.control.send(self.binder.apply(message))
        elif isinstance(message, Probe):
            self.control.send(self._status(message.id, pss=self._memory(), pending=self.hub.pending))
        elif isinstance(message, Stop):
            self._ask_to_stop(message.grace_s)
        elif isinstance(message, Build):
            self._tasks.start(self._build(message), "build")

    def _memory(self) -> int:
        now = asyncio.get_running_loop().time()
        if now >= self._weigh_at:
            self._weigh_at = now + WEIGH_EVERY_S
            self._pss = memory.pss(self._booted.memory)
        return self._pss

    def _claimed(self, claim: Claim) -> None:
        """The sandbox has become a session's; its home may be another from now on."""
        self.hub.claim(moved=claim.moved, keep_ahead=claim.keep_ahead)

    def _put_agent_files(self) -> None:
        """The home may be another than the one the agent was started with."""
        spec, surroundings = self.process.spec, self._booted.surroundings
        if spec is None or not spec.files:
            return
        places = surroundings.places()
        try:
            files = {fill(path, places): fill(text, places) for path, text in spec.files.items()}
            write_missing(surroundings.home, files)
        except (UnsafePath, OSError) as error:
            log.warning("a file of the agent cannot be written: %s", error)

    async def _build(self, message: Build) -> None:
        if self._building:
            self.control.send(Built(message.id, False, what="another build is running in this sandbox"))
            return
        self._building = True
        try:
            self.control.send(await packages.build(message, self._booted.surroundings))
        finally:
            self._building = False
            if os.getpid() == 1:
                self._mind_orphans()

    def _attached(self, sock: Any, attach: Attach) -> None:
        wanted = "raw" if self.process.websocket else "acp"
        if not self.binder.session:
            refuse(sock, 1013, "session.not_found: this sandbox is nobody's yet; ask for a session")
        elif attach.protocol != wanted:
            refuse(sock, 4400, f"session.wrong_protocol: this agent is reached at /{wanted}")
        elif wanted == "raw":
            self.raw.serve(sock, attach)
        else:
            self.hub.serve(sock, attach)

    def _mind_orphans(self) -> None:
        """uvloop keeps this signal from add_signal_handler, for subprocesses that only builds have; when the last of
        them has ended nobody has it."""
        loop = asyncio.get_running_loop()
        signal.signal(signal.SIGCHLD, lambda *_: loop.call_soon_threadsafe(self._reap))
        self._reap()

    def _reap(self) -> None:
        """A build minds its own children."""
        if not self._building and not reap_orphans():
            asyncio.get_running_loop().call_later(REAP_AGAIN_S, self._reap)


def _counted(said: Status, now: Status) -> Status:
    """``said`` with the counts of ``now``."""
    return replace(said, open_turns=now.open_turns, clients=now.clients, turns=now.turns)
