"""One MCP server behind the multiplexer: started, greeted, asked for its lists, restarted, ended.

One task (``run``) does all of it, woken by one event.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Protocol

from sandbox_agent import mcp_lists, mcp_protocol
from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_peer import Gone, Peer, Query
from sandbox_agent.mcp_process import ServerProcess
from sandbox_agent.mcp_protocol import KINDS, Listing, McpError
from sandbox_agent.mcp_spec import ServerSpec
from sandbox_agent.process import RestartPolicy
from sandbox_agent.spawn import SpawnError
from sandbox_agent.tasks import log

INIT_S = 60.0
"""npx may have something to fetch."""
RELIST_PAUSE_S = 0.1
"""Between two looks at the lists of a server that keeps changing them."""
MAX_RESTARTS = 5
MAX_HELD = 64
"""Messages for a server that is not up yet."""
MAX_PROBLEM = 1000
CLIENT_INFO = {"name": "cortex", "title": "Cortex MCP multiplexer", "version": "1"}


class Host(Protocol):
    """Who keeps the servers, and hears of them."""

    def environment(self) -> dict[str, str]: ...
    def directory(self) -> str: ...
    def features(self) -> dict[str, Any]:
        """The capabilities of clients that a server may count on."""
        ...

    def save(self, spec: ServerSpec, listing: Listing) -> None:
        """Keeps the lists for the next start. Called in a thread."""
        ...

    def up(self, server: Server) -> None:
        """It takes requests; it was started anew."""
        ...

    def asked(self, server: Server, message: Message) -> None:
        """Its request."""
        ...

    def told(self, server: Server, message: Message) -> None:
        """Its notification, if it is not about progress."""
        ...

    def changed(self, server: Server) -> None:
        """Its lists, its state or its problem."""
        ...


class Server(Peer):
    """``state``: starting, up, waiting (for its restart), failed or stopped. ``problem``: why it is not up; "" while it
    is, or may be soon. ``listing``: what it has, or had when it last ran; None while nobody knows."""

    def __init__(self, spec: ServerSpec, host: Host, listing: Listing | None) -> None:
        super().__init__()
        self.spec = spec
        self.state = "starting"
        self.problem = ""
        self.listing = listing
        self._host = host
        self._kept = listing
        self._stale: set[str] = set()
        self._held: list[Message] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._process: ServerProcess | None = None

    @property
    def who(self) -> str:
        return f"MCP server {self.spec.name!r}"

    @property
    def pid(self) -> int:
        """0 when it does not run."""
        return self._process.pid if self._process is not None else 0

    def knows(self, kind: str) -> bool:
        """Its list of that kind is known, or will not be."""
        if self.problem or self.listing is None:
            return self.problem != ""
        return kind in self.listing.lists or not self.listing.can(KINDS[kind].capability)

    def refusal(self) -> str:
        """Why a request cannot even wait; "": it can."""
        if self.state in ("failed", "stopped"):
            return self.problem or f"{self.who} was removed"
        return f"{self.who} is not up yet, and too much waits for it" if len(self._held) >= MAX_HELD else ""

    def send(self, message: Message) -> None:
        if self.state == "up" and self._process is not None:
            self._process.send(message)
        elif len(self._held) < MAX_HELD:
            self._held.append(message)

    def relist(self, capability: str) -> None:
        """It said that these lists have changed."""
        self._stale |= self._having(capability)
        self._wake.set()

    async def run(self) -> None:
        """Until ``stop``, or until it has failed for good."""
        loop = asyncio.get_running_loop()
        policy = RestartPolicy(MAX_RESTARTS)
        while not self._stopping:
            begun = loop.time()
            again = await self._live()
            pause = policy.died(loop.time() - begun) if again else None
            if self._stopping:
                break
            if pause is None:
                self._set("failed")
                return
            end = loop.time() + pause
            while not self._stopping and loop.time() < end:
                await self._woken(end - loop.time())
        self._set("stopped")

    def stop(self) -> None:
        """``run`` is to end, and the process with it."""
        self._stopping = True
        self._fall("was removed")

    # -- one life -------------------------------------------------------------------------------

    async def _live(self) -> bool:
        """Starts it and sees it through to its end. False: there is no use in starting it again."""
        self._set("starting")
        try:
            process = self._process = ServerProcess(
                self.spec,
                self._host.environment(),
                self._host.directory(),
                on_message=self._heard,
                on_dropped=self._dropped,
                on_over=lambda: self._fall(process.over),
            )
        except (SpawnError, OSError) as error:
            self._fall(f"cannot be started: {error}")
            return False
        try:
            await self._greet(process)
            await self._serve(process)
        except (Gone, McpError, ValueError) as error:
            process.give_up(f"could not be initialized: {error}")
        finally:
            await process.end()
            self._process = None
        return True

    async def _greet(self, process: ServerProcess) -> None:
        params = {
            "protocolVersion": mcp_protocol.VERSIONS[0],
            "capabilities": self._host.features(),
            "clientInfo": CLIENT_INFO,
        }
        hello = Query(self, INIT_S)
        process.send(mcp_protocol.request(hello.number, "initialize", params))
        listing = mcp_lists.greeting(await hello.future)
        process.send(mcp_protocol.notification("notifications/initialized"))
        # What it had stays until it has said what it has.
        known = self.listing.lists if self.listing is not None else {}
        listing.lists = {kind: items for kind, items in known.items() if listing.can(KINDS[kind].capability)}
        self.listing = listing
        self._stale = self._having()
        self.problem = ""
        self._set("up")
        self._host.up(self)
        held, self._held = self._held, []
        for message in held:
            process.send(message)

    async def _serve(self, process: ServerProcess) -> None:
        loop = asyncio.get_running_loop()
        while not process.over and not self._stopping:
            for kind in [kind for kind in KINDS if kind in self._stale]:
                await self._list(kind)
            if self._kept != self.listing and self.listing is not None:
                self._kept = self.listing
                await asyncio.to_thread(self._host.save, self.spec, self.listing)
            again = loop.time() + RELIST_PAUSE_S
            while not process.over and not self._stopping and (not self._stale or loop.time() < again):
                await self._woken(again - loop.time() if self._stale else None)

    async def _list(self, kind: str) -> None:
        self._stale.discard(kind)
        if self.state != "up":
            return
        try:
            found = await mcp_lists.fetch(self, kind)
        except Gone:  # not answered in time; if it has died, the old list is still the best
            found = self.listing.lists.get(kind, []) if self.listing is not None else []
        if self.state == "up" and self.listing is not None and self.listing.lists.get(kind) != found:
            self.listing = replace(self.listing, lists={**self.listing.lists, kind: found})
            self._host.changed(self)

    def _having(self, capability: str = "") -> set[str]:
        """The kinds of lists that it says it has; of one capability if there is one."""
        able = self.listing
        return {
            name
            for name, kind in KINDS.items()
            if able is not None and able.can(kind.capability) and capability in ("", kind.capability)
        }

    def _heard(self, kind: str, message: Message) -> None:
        if kind == "response":
            self.answered(message)
        elif kind == "request":
            self._host.asked(self, message)
        elif message["method"] == "notifications/progress":
            self.progressed(mcp_protocol.params(message))
        else:
            self._host.told(self, message)

    def _dropped(self) -> None:
        """Which answer was in the line that was too long is not known."""
        self.unanswered(f"{self.who} sent a message of more than {mcp_protocol.MAX_LINE >> 20} MiB, which was dropped")

    def _fall(self, why: str) -> None:
        """It is down: whoever waits for it is told."""
        self.problem = f"{self.who} {why}"[:MAX_PROBLEM]
        if not self._stopping:
            log.warning("%s", self.problem)
        self._set("waiting")
        self._held = []
        self.lost(self.problem)
        self._wake.set()

    def _set(self, state: str) -> None:
        self.state = state
        self._host.changed(self)

    async def _woken(self, timeout: float | None) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()
