"""The configuration of one session: what was assembled last, how old it is, and how a change reaches its sandbox."""

from __future__ import annotations

from collections.abc import Callable

from broker.metrics import CONFIG_ASSEMBLY
from broker.session.bringup import Prepared, Subject, prepare
from broker.session.clients import Clients
from broker.session.providers import egress_for
from broker.session.sandbox import Runtime, Sandbox
from broker.store.sessions import SessionRow


class Configuration:
    """``clock`` gives seconds since the epoch.

    ``generation`` counts changes. It is read before assembling and noted as done after, so that a
    change that comes meanwhile leaves the configuration dirty.
    """

    def __init__(self, runtime: Runtime, subject: Subject, row: SessionRow, clock: Callable[[], float]) -> None:
        self._runtime = runtime
        self._subject = subject
        self._clock = clock
        self.generation = row.generation
        self._done = -1
        self.assembled = runtime.assembler.restore(row.config) if row.config is not None else None
        self.assembled_at = row.config_at
        self.warnings: tuple[str, ...] = ()
        self.pending: frozenset[str] = frozenset()
        """Packages that are being installed for it."""

    def told(self) -> list[str]:
        """What people should know: the warnings, and hosts that the sandbox was denied."""
        config, subject = self._runtime.config(), self._subject
        if self.assembled is None:
            return list(self.warnings)
        user = self.assembled.config
        section = user.egress.model_dump(mode="json", exclude_unset=True)
        rules = egress_for(config, subject.agent, user).hosts
        return [*self.warnings, *self._runtime.egress.warnings(subject.user, subject.workspace, rules, section)]

    def landed(self, spec: str) -> None:
        """An install has ended, well or not."""
        self.pending -= {spec}
        self.changed()

    def changed(self) -> None:
        """A source, config.toml or the shelf of packages says something else now."""
        self.generation += 1

    @property
    def dirty(self) -> bool:
        """What the sandbox has was assembled before the last change."""
        return self._done != self.generation

    @property
    def old(self) -> bool:
        """Older than ``config_max_age_s``, so that the sources may say something else by now. One from the future is,
        too: the clock was set back."""
        return not 0 <= self._clock() - self.assembled_at < self._runtime.config().session.config_max_age_s

    def keep(self, prepared: Prepared, generation: int) -> None:
        """The sandbox has this one; ``generation`` was read before it was assembled."""
        self.assembled = prepared.assembled
        self.warnings = prepared.warnings
        self.pending = frozenset(prepared.pending)
        self._done = generation
        self.assembled_at = self._clock()
        CONFIG_ASSEMBLY.labels("assembled").inc()

    async def apply(self, box: Sandbox, clients: Clients) -> dict[str, str]:
        """Assembles and sends what differs; returns the effect by part. Raises ``CortexError``; dirty then."""
        generation = self.generation
        assembled = await self._runtime.assembler.assemble(self._subject.user, self.assembled)
        prepared = await prepare(self._runtime, self._subject, assembled, self._runtime.home_of(box.slot))
        effect = await self._send(box, clients, prepared, generation)
        self.keep(prepared, generation)
        return effect

    async def _send(self, box: Sandbox, clients: Clients, prepared: Prepared, generation: int) -> dict[str, str]:
        """Tells gateway and agent server what differs; client frames wait meanwhile, bounded."""
        effect = {}
        if await box.tell_gateway(prepared.assembled):
            effect["gateway"] = "now"
        if prepared.wanted.hashes["boot"] != box.boot_hash:
            effect["boot"] = "next_start"
        if not box.differing(prepared.wanted):
            await box.bind(prepared.wanted, generation)
            return effect
        with clients.held(self._runtime.config().session.bind_hold_s):
            bound = await box.bind(prepared.wanted, generation)
        return effect | bound.effect if bound is not None else effect
