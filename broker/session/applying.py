"""How a change of configuration reaches the sandbox of a session that is up."""

from __future__ import annotations

import asyncio

import structlog

from broker.errors import Code, CortexError
from broker.session.bringup import Subject
from broker.session.clients import Clients
from broker.session.configuration import Configuration
from broker.session.custody import Custody
from broker.session.life import Life
from broker.session.mailbox import Mailbox
from broker.session.port import Applied
from broker.session.sandbox import Runtime, Sandbox

log = structlog.get_logger(__name__)

SLACK_S = 5.0
"""What whoever waits gives the actor beyond its own deadlines, so that its own error is told."""


class Applying:
    """Done by the session's actor; ``changed`` and ``soon`` are for everybody."""

    def __init__(
        self,
        runtime: Runtime,
        subject: Subject,
        life: Life,
        clients: Clients,
        custody: Custody,
        configuration: Configuration,
        mailbox: Mailbox,
    ) -> None:
        self._runtime = runtime
        self._subject = subject
        self._life = life
        self._clients = clients
        self._custody = custody
        self._configuration = configuration
        self._mailbox = mailbox

    async def changed(self) -> Applied:
        """A source says something else: assembles anew, and returns when the sandbox has acknowledged."""
        self._configuration.changed()
        settings = self._runtime.config().session
        limit = settings.bringup_timeout_s + settings.bind_timeout_s + SLACK_S
        try:
            async with asyncio.timeout(limit):
                await self._life.until(lambda: self._life.state != "starting")
                result: Applied = await self._mailbox.ask(self._apply)
        except (TimeoutError, CortexError) as error:
            failed = error if isinstance(error, CortexError) else _too_busy(limit)
            return self._failed(failed)
        return result

    def soon(self) -> None:
        """Coalesced: however often it is called before the actor comes to it, it is done once."""
        self._mailbox.post_once("apply", self.refresh)

    async def refresh(self) -> None:
        """Applies what there is to apply; the log tells what cannot be."""
        applied = await self._apply()
        if applied.error is not None:
            log.warning("config_not_applied", session=self._subject.session_id, error=applied.error)

    async def _apply(self) -> Applied:
        """Sends what differs to a running sandbox; one that is starting, or paused, applies it when it is up."""
        box, configuration = self._custody.box, self._configuration
        if self._life.state not in ("ready", "paused") or box is None:
            return Applied(self._subject.user, self._subject.workspace, "stored", {})
        try:
            if self._life.state == "paused":
                await self._tell_gateway(box)
                return Applied(self._subject.user, self._subject.workspace, "stored", {})
            effect = await configuration.apply(box, self._clients)
        except CortexError as error:
            configuration.warnings = (str(error),)
            return self._failed(error)
        # The cached copy is for the next broker; whoever waits for the change need not wait for it.
        self._mailbox.post_once("save", self._save)
        return Applied(self._subject.user, self._subject.workspace, "applied", effect)

    async def _tell_gateway(self, box: Sandbox) -> None:
        """The gateway does not stand still: an erased credential is of no use to a sandbox from the moment it wakes."""
        if self._configuration.assembled is not None:
            await box.tell_gateway(self._configuration.assembled)

    def _failed(self, error: CortexError) -> Applied:
        return Applied(self._subject.user, self._subject.workspace, "failed", {}, error.problem())

    async def _save(self) -> None:
        configuration = self._configuration
        if configuration.assembled is not None:
            await self._life.save(config=configuration.assembled.dump(), config_at=configuration.assembled_at)


def _too_busy(limit: float) -> CortexError:
    return CortexError(
        Code.BRINGUP_TIMEOUT,
        f"the session did not come to it within {limit:g} s",
        hint="the change is stored and applied when it is up",
    )
