"""One incarnation of one session's sandbox: everything that has to be let go of together.

A ``Sandbox`` is made for one container start, fenced to it, and put away once. What it holds is
released in one order: link, engine, gateway, home, slot, row; a home leaves only when the sandbox
is known to be dead and the gateway no longer serves its slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import structlog

from broker.config import AgentConfig, Config
from broker.errors import Code, CortexError
from broker.gateway.link import Egress, GatewayLink
from broker.metrics import STATE_WRITES
from broker.sandbox.driver import EGRESS_PORT, GATEWAY_PORT, HOME_DIR, Exit, SandboxDriver, SandboxSpec
from broker.sandbox.journal_files import JournalFiles
from broker.sandbox.link import Link, SlotSockets
from broker.sandbox.packages import PackageShelf
from broker.sandbox.slots import Slot, Slots
from broker.session.activity import ActivityPort, NoActivity
from broker.session.assembly import Assembled, Assembler
from broker.session.egress_view import EgressView
from broker.session.fingerprint import changed, fingerprint
from broker.session.parts import BOUND, KINDS, Wanted
from broker.session.providers import Credentials, egress_for, providers_for
from broker.session.sealing import Sealing
from broker.store.sessions import WARM, SandboxRow, SessionStore
from sandbox_agent.wire.messages import Bound, Hello, Refreshed, Status, Welcome

log = structlog.get_logger(__name__)

NO_ACTIVITY = NoActivity()
FIRST_PROBE_S = 0.5
PROBE_S = 5.0
"""How long an agent server may take to say how it is, and never longer than ``probe_interval_s``."""
SEAL_S = 5.0
"""How long a sandbox that ends waits for the vault to take what its agent has renewed last."""
RESTING = 4
"""So many sessions are paused or stopped at once because nobody uses them."""
PROBES = 2
"""So many questions left unanswered, and the sandbox counts as dead."""


@dataclass(frozen=True)
class Runtime:
    """What sessions are made of; one for the whole broker."""

    config: Callable[[], Config]
    driver: SandboxDriver
    slots: Slots
    gateway: GatewayLink
    store: SessionStore
    assembler: Assembler
    shelf: PackageShelf
    credentials: Credentials
    installation_key: bytes
    image: str
    """What sandboxes are made from; part of the boot hash."""
    activity: ActivityPort = NO_ACTIVITY
    egress: EgressView = field(default_factory=EgressView)
    resting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(RESTING))
    """Held by a session while it is paused or stopped because nobody uses it."""

    def home_of(self, slot: Slot) -> str:
        """HOME as the sandbox sees it."""
        return HOME_DIR if self.driver.isolated else str(slot.home_dir)


@dataclass(frozen=True)
class Owner:
    """Whose a sandbox is. ``home_key`` names the home that is, or may be, in its slot; "": none."""

    user: str
    workspace: str
    session_id: str
    home_key: str


NOBODY = Owner("", "", "", "")
"""Of a warm sandbox."""


@dataclass
class Sandbox:
    """See the module. Times are seconds."""

    runtime: Runtime
    owner: Owner
    slot: Slot
    incarnation: int
    sockets: SlotSockets
    link: Link
    on_status: Callable[[Status], None]
    on_lost: Callable[[str], None]
    """Like ``on_status`` another's after a claim."""
    ref: str = ""
    agent: str = ""
    """Name of the agent that it was made for."""
    paused: bool = False
    """Its processes stand still, or may do so; whoever wants something of it resumes it first."""
    pauses: int = 0
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a pause has ended."""
    asked: bool = False
    """The engine was asked for a container; it may exist though no ``ref`` came back."""
    boot_hash: str = ""
    recipe: str = ""
    """Of a warm one: what it was made with, see ``session.warm``."""
    pss_bytes: int = 0
    """The agent server's own memory when it was last asked."""
    gateway_hash: str = ""
    applied: dict[str, str] = field(default_factory=dict)
    wanted: Wanted | None = None
    """What the agent server is welcomed with."""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set on a change of the agent's state; look at ``status``."""
    status: Status | None = None
    lost: str = ""
    """Why the link to its agent server is gone for good."""

    def __post_init__(self) -> None:
        self.sealing = Sealing(self.slot.id, self._keep)

    # -- what the agent server says ------------------------------------------------------------

    def heard(self, status: Status) -> None:
        """A Status came in."""
        self.status = status
        self.ready.set()
        self.on_status(status)

    def lose(self, reason: str) -> None:
        """The link is gone for good."""
        self.lost = reason or "lost"
        self.ready.set()
        self.on_lost(self.lost)

    def refreshed(self, message: Refreshed) -> None:
        """The agent has changed one of its credential files; a sandbox that is nobody's has none."""
        if self.owner.user:
            self.sealing.heard(message)

    async def _keep(self, told: Refreshed) -> None:
        agent = self.runtime.config().agents[self.agent]
        await self.runtime.credentials.refreshed(self.owner.user, agent, told.path, told.content, told.after)

    @property
    def failed(self) -> CortexError | None:
        """Why it can serve nobody, as far as it was heard."""
        if self.lost:
            return CortexError(
                Code.SANDBOX_DIED, "the sandbox was lost", cause=self.lost[:400], hint="try again: it is replaced"
            )
        status = self.status
        if status is None or status.agent != "failed":
            return None
        return CortexError(
            Code.AGENT_MISSING if status.code == Code.AGENT_MISSING.slug else Code.AGENT_FAILED,
            status.what[:400] or "the agent does not start",
            hint=status.hint[:400] or "see the agent's last words in the session's reason",
        )

    async def welcome(self, link: Link, hello: Hello) -> Welcome:
        """The answer to a Hello; durable before it is given, so that it is given once."""
        self.applied = dict(hello.applied)
        if hello.agent in ("ready", "failed"):
            self.heard(Status(agent=hello.agent, agent_info=hello.agent_info, open_turns=hello.open_turns))
        fresh = await self.runtime.store.sandbox_welcomed(self.slot.id, self.incarnation)
        config = self.runtime.config()
        # An agent that has credential files is started by the bind that puts them in place: it reads them then.
        spec = self.wanted.agent if fresh and self.wanted and not self.wanted.values["files"] else None
        if spec and self.wanted:
            self.applied["process"] = self.wanted.hashes["process"]
        return Welcome(
            incarnation=self.incarnation,
            secret=b"",
            session=self.owner.session_id,
            agent_spec=spec,
            agent_hash=self.wanted.hashes["process"] if spec and self.wanted else "",
            home=self.runtime.home_of(self.slot),
            credentials_dir=self.runtime.driver.credentials_dir(self.slot.id, self.incarnation),
            gateway_port=GATEWAY_PORT if self.runtime.driver.isolated else 0,
            egress_port=EGRESS_PORT if self.runtime.driver.isolated else 0,
            streams=config.sandbox.streams,
            max_message_bytes=config.front.max_message_bytes,
            stall_timeout_s=config.front.stall_timeout_s,
            journal_segment_bytes=config.session.journal_segment_bytes,
        )

    async def agent_ready(self) -> None:
        """Returns when the agent's initialize answer is held, or its own WebSocket accepts.

        Raises ``AGENT_MISSING``, ``AGENT_FAILED``, or ``SANDBOX_DIED`` when the link is lost meanwhile.
        """
        while True:
            failed = self.failed
            if failed is not None:
                raise failed
            status = self.status
            if status is not None and status.agent == "ready":
                return
            self.ready.clear()
            await self.ready.wait()

    async def opened_ahead(self) -> None:
        """Returns when the conversation that is opened ahead is there, or will not be. Raises as ``agent_ready``."""
        while self.status is None or self.status.ahead in ("", "opening"):
            if self.failed is not None:
                raise self.failed
            self.ready.clear()
            await self.ready.wait()

    async def unresponsive(self) -> str:
        """Asks how the agent server is, every ``probe_interval_s``; returns why when it leaves that unanswered.

        A connection that is gone is the link's to judge; one that is paused is not asked.
        """
        missed = 0
        # Whoever has waited for the sandbox comes first.
        await asyncio.sleep(min(FIRST_PROBE_S, self.runtime.config().sandbox.probe_interval_s))
        while True:
            if self.paused:
                self.resumed.clear()
                await self.resumed.wait()
            interval, pauses = self.runtime.config().sandbox.probe_interval_s, self.pauses
            try:
                self.pss_bytes = (await self.link.probe(timeout=min(PROBE_S, interval))).pss_bytes
                missed = 0
            except CortexError as error:
                missed += self.link.connected and pauses == self.pauses
                if missed == PROBES:
                    return f"its agent server left {missed} questions in a row unanswered: {error}"
            if missed == 0:
                await asyncio.sleep(interval)

    # -- what the agent server is told ---------------------------------------------------------

    def differing(self, wanted: Wanted) -> set[str]:
        """The bound parts that the sandbox does not have."""
        return changed(self.applied, wanted.bound_hashes)

    async def bind(self, wanted: Wanted, generation: int, claim: Mapping[str, Any] | None = None) -> Bound | None:
        """Sends the parts that differ, in one message; None when all are equal and nothing was sent.

        ``claim``: the part of that name, which makes a warm sandbox that of its session.
        """
        names = self.differing(wanted)
        for name in BOUND:
            STATE_WRITES.labels(KINDS[name], "written" if name in names else "skipped").inc()
        parts = {name: wanted.values[name] for name in names}
        hashes = {name: wanted.hashes[name] for name in names}
        if claim is not None:
            parts["claim"], hashes["claim"] = dict(claim), self.owner.session_id
        if not parts:
            return None
        bound = await self.link.bind(parts, hashes, generation, timeout=self.runtime.config().session.bind_timeout_s)
        self.applied = dict(bound.applied)
        if "process" in names or (claim and claim["restart"]):
            # What it said last may be of the agent that is on its way out.
            await self.link.probe()
        return bound

    def unfinished_claim(self) -> dict[str, Any] | None:
        """The part that makes it its session's, when the broker was killed before it could be told."""
        if self.applied.get("claim") == self.owner.session_id:
            return None
        return claim_part(self.owner.session_id, self.runtime.config().agents[self.agent], moved=True)

    async def tell_gateway(self, assembled: Assembled) -> bool:
        """Says whose the slot is and what it may reach; False when the gateway knows that already."""
        config = self.runtime.config()
        providers = await providers_for(config, self.runtime.credentials, self.owner.user, assembled.config.providers)
        egress = egress_for(config, self.agent, assembled.config)
        owner = self.owner
        identity = {"user": owner.user, "workspace": owner.workspace, "session": owner.session_id}
        identity |= {"agent": self.agent, "team": assembled.config.settings.team}
        told = {"providers": {name: asdict(entry) for name, entry in providers.items()}, "egress": asdict(egress)}
        told["identity"] = identity
        digest = fingerprint(self.runtime.installation_key, "gateway", told)
        if self.gateway_hash == digest:
            return False
        # What is not acknowledged may be told to the next gateway: until then it is not known what the slot has.
        self.gateway_hash = ""
        await self.runtime.gateway.put_slot(
            self.slot.id, self.incarnation, identity, providers, egress, self.sockets.fds
        )
        self.gateway_hash = digest
        return True

    async def tell_gateway_unclaimed(self) -> None:
        """Has the gateway answer for the slot, that it is nobody's."""
        await self.runtime.gateway.put_slot(self.slot.id, self.incarnation, None, {}, Egress(), self.sockets.fds)

    # -- the engine ----------------------------------------------------------------------------

    async def launch(self, assembled: Assembled, wanted: Wanted) -> None:
        """Creates and starts the container; its row is durable before the engine is asked."""
        self.boot_hash = wanted.hashes["boot"]
        self.wanted = wanted
        limits = assembled.config.limits
        await self.runtime.store.sandbox_save(self.row())
        spec = SandboxSpec(
            slot=self.slot.id,
            incarnation=self.incarnation,
            sock_dir=self.slot.sock_dir,
            vol_dir=self.slot.vol_dir,
            packages_dir=self.runtime.slots.packages_dir,
            uid=self.runtime.slots.uid,
            commands=wanted.program,
            labels={"cortex.session": self.owner.session_id},
            memory_bytes=limits.memory_bytes,
            cpus=limits.cpus,
            pids=limits.pids,
        )
        self.asked = True
        self.ref = await self.runtime.driver.create(spec)
        await self.runtime.store.sandbox_save(self.row())
        await self.runtime.driver.start(self.ref)

    async def pause(self) -> None:
        """Lets none of its processes run. Raises ``CortexError``; then it is not known whether they do."""
        self.paused = True
        self.pauses += 1
        await self.runtime.driver.pause(self.ref)

    async def resume(self) -> None:
        """Lets them go on; nothing when they do. Raises ``CortexError``."""
        if self.paused:
            await self.runtime.driver.resume(self.ref)
            self.paused = False
            self.resumed.set()

    def row(self) -> SandboxRow:
        """Its row, not yet welcomed."""
        return SandboxRow(
            slot=self.slot.id,
            incarnation=self.incarnation,
            driver=self.runtime.driver.name,
            ref=self.ref,
            user=self.owner.user,
            workspace=self.owner.workspace,
            role="session" if self.owner.user else WARM,
            welcomed=False,
            created_at=0.0,
            agent=self.agent,
            boot=self.boot_hash,
        )

    async def put_away(self, *, grace_s: float) -> None:
        """Ends the sandbox and takes all of it apart, the home to rest. Idempotent; may be repeated.

        Raises ``CortexError`` when something cannot be let go of. A sandbox that the engine does not end
        keeps the home, is out of reach of clients and gateway, and is the caller's to put away again.
        A gateway that does not answer cannot keep a home in: its listeners are closed here and it is
        told again when it comes back.
        """
        if grace_s > 0 and await self._goes():
            await self.link.stop(grace_s)
        await self.link.close("the sandbox is stopped")
        await self.sealing.drain(SEAL_S)
        try:
            await self._end(grace_s)
        except Exception:
            await self._cut_off()
            raise
        await self._cut_off()
        if self.owner.home_key:
            self.runtime.slots.release_home(self.slot.id, self.owner.home_key)
        await self.runtime.slots.remove(self.slot.id)
        await self.runtime.store.sandbox_delete(self.slot.id)

    async def _goes(self) -> bool:
        """Whether it can be asked to end: one that is paused has to be resumed for it."""
        try:
            await self.resume()
        except CortexError as error:
            log.warning("not_resumed_to_end", slot=self.slot.id, error=str(error))
        return not self.paused

    async def _end(self, grace_s: float) -> None:
        """Returns when no process of it lives."""
        driver = self.runtime.driver
        refs = {self.ref} - {""}
        if self.asked and not refs:
            # The engine may have made one that it could not tell of any more.
            refs = {found.ref for found in await driver.list() if found.slot == self.slot.id}
        for ref in refs:
            await driver.stop(ref, grace_s)
            await driver.remove(ref)

    async def _cut_off(self) -> None:
        try:
            await self.runtime.gateway.drop_slot(self.slot.id)
        except CortexError as error:
            log.warning("gateway_drop_failed", slot=self.slot.id, error=str(error))
        self.sockets.close()

    async def let_go(self) -> None:
        """Closes the broker's ends; the sandbox goes on and is adopted by the next broker."""
        await self.link.close("the broker is restarting")
        await self.sealing.drain(SEAL_S)
        await self.sealing.close()
        self.sockets.close()

    def facts(self) -> dict[str, Any]:
        """For operators."""
        status = self.status
        return {
            "slot": self.slot.id,
            "incarnation": self.incarnation,
            "agent_state": status.agent if status else "unknown",
            "agent_pid": status.agent_pid if status else 0,
            "open_turns": status.open_turns if status else 0,
            "ahead": status.ahead if status else "",
            "pss_bytes": self.pss_bytes,
            "agent_started_ms": status.started_ms if status else 0.0,
        }


def place(
    runtime: Runtime,
    owner: Owner,
    slot: Slot,
    incarnation: int,
    *,
    agent: str,
    welcomed: bool,
    on_status: Callable[[Status], None],
    on_lost: Callable[[str], None],
) -> Sandbox:
    """Opens the slot's sockets and a link on them; nothing runs yet. Raises ``CortexError``.

    One of ``NOBODY`` has no journal before it is claimed.
    """
    journal = journal_of(runtime, owner.home_key) if owner.home_key else None
    sockets = SlotSockets(slot, gid=runtime.slots.gid)
    sockets.open()
    box: Sandbox | None = None

    async def welcome(link: Link, hello: Hello) -> Welcome:
        assert box is not None
        return await box.welcome(link, hello)

    def heard(status: Status) -> None:
        if box is not None:
            box.heard(status)

    def lost(reason: str) -> None:
        if box is not None:
            box.lose(reason)

    def refreshed(message: Refreshed) -> None:
        if box is not None:
            box.refreshed(message)

    link = Link(
        sockets,
        incarnation,
        installation_key=runtime.installation_key,
        on_hello=welcome,
        on_status=heard,
        on_lost=lost,
        on_refreshed=refreshed,
        journal=journal,
        welcomed=welcomed,
    )
    box = Sandbox(runtime, owner, slot, incarnation, sockets, link, on_status, on_lost, agent=agent)
    link.start()
    return box


def journal_of(runtime: Runtime, home_key: str) -> JournalFiles:
    """The journal that belongs to a home. Raises ``CortexError``."""
    return JournalFiles(runtime.slots.journal_dir(home_key), keep=runtime.config().session.journal_segments)


def claim_part(session_id: str, agent: AgentConfig, *, moved: bool) -> dict[str, Any]:
    """Part ``claim`` of a bind. ``moved``: a home was moved into the sandbox, or may have been."""
    return {
        "session": session_id,
        "moved": moved,
        "restart": moved and agent.prewarm == "server",
        "keep_ahead": agent.open_ahead == "any" or (agent.open_ahead == "new" and not moved),
    }


def how_ended(exit_: Exit) -> str:
    """For people."""
    if exit_.oom:
        return "ran out of memory"
    return "ended" if exit_.code is None else f"ended with code {exit_.code}"
