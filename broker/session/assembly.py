"""Assembly: eight sections from several sources, read in parallel, made into one ``SandboxConfig``.

Sources are layers, the stronger over the weaker: the store over the web app over the directory
over the defaults of config.toml. A source that fails, and a section that does not check, keep
their last good value and say so in ``warnings``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from broker.config import Config, DefaultsConfig
from broker.errors import Code, CortexError
from broker.metrics import CONFIG_SOURCE
from broker.session.sections import SECTIONS, SandboxConfig, assemble, validate
from broker.session.sources import Answer, Source

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Assembled:
    """One assembled configuration. ``answers``: last good answer by source, kept for the next time.

    ``origins`` names the strongest source of each section. ``defaults``: those of config.toml that it stands on.
    """

    config: SandboxConfig
    answers: Mapping[str, Answer] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    defaults: DefaultsConfig | None = None

    def dump(self) -> bytes:
        """For the session's row."""
        answers = {name: {"sections": dict(a.sections), "tag": a.tag} for name, a in self.answers.items()}
        return json.dumps({"answers": answers}).encode()


class Assembler:
    """``sources`` from weakest to strongest."""

    def __init__(self, sources: Sequence[Source], config: Callable[[], Config]) -> None:
        self._sources = sources
        self._config = config

    async def assemble(self, user: str, last: Assembled | None) -> Assembled:
        """Reads all sources at once, each within ``config_timeout_s``. Never raises for a failed source.

        ``last`` itself where nothing has changed since.
        """
        kept = dict(last.answers) if last else {}
        results = await asyncio.gather(*(self._read(source, user, kept.get(source.name)) for source in self._sources))
        answers = dict(kept)
        warnings = []
        for source, result in zip(self._sources, results, strict=True):
            if isinstance(result, Answer):
                answers[source.name] = result
            else:
                warnings.append(str(result))
        if (
            last is not None
            and not (warnings or last.warnings)
            and answers == last.answers
            and last.defaults is self._config().defaults
        ):
            return last
        return self._merge(answers, warnings, last)

    def generic(self) -> Assembled:
        """The defaults of config.toml alone: what a sandbox that is nobody's is made with."""
        return self._merge({}, [], None)

    def restore(self, dumped: bytes) -> Assembled | None:
        """The configuration cached in a session's row; None when it no longer checks."""
        try:
            answers = {
                name: Answer(value["sections"], value["tag"]) for name, value in json.loads(dumped)["answers"].items()
            }
            return self._merge(answers, [], None)
        except (ValueError, KeyError, TypeError, CortexError) as error:
            log.warning("cached_config_unusable", error=str(error))
            return None

    async def _read(self, source: Source, user: str, last: Answer | None) -> Answer | CortexError:
        timeout = self._config().session.config_timeout_s
        try:
            async with asyncio.timeout(timeout):
                answer = await source.read(user, last)
        except TimeoutError:
            error = CortexError(
                Code.BAD_SECTION,
                f"configuration source {source.name} did not answer in {timeout:g} s",
                hint="its last good answer is used; check the source or raise session.config_timeout_s",
            )
        except CortexError as failed:
            error = failed
        else:
            CONFIG_SOURCE.labels(source.name, "unchanged" if answer is last else "read").inc()
            return answer
        CONFIG_SOURCE.labels(source.name, "failed").inc()
        log.warning("config_source_failed", source=source.name, user=user, error=str(error), hint=error.hint)
        return error

    def _merge(self, answers: Mapping[str, Answer], warnings: list[str], last: Assembled | None) -> Assembled:
        origins = dict.fromkeys(SECTIONS, "defaults")
        defaults = self._config().defaults
        layers: list[Mapping[str, Any]] = [defaults.model_dump()]
        checked: dict[str, Answer] = {}
        for source in self._sources:
            if source.name not in answers:
                continue
            answer = answers[source.name]
            before = last.answers.get(source.name) if last else None
            sections = {}
            told = len(warnings)
            for section, value in answer.sections.items():
                good = self._check(source.name, section, value, before, warnings)
                if good is not None and self._fits(source.name, section, good, layers, warnings):
                    sections[section] = good
                    origins[section] = source.name
            layers.append(sections)
            # Without its tag an answer that is in part wrong is read, and complained of, again.
            checked[source.name] = Answer(sections, answer.tag if len(warnings) == told else "")
        return Assembled(assemble(*layers), checked, origins, tuple(warnings), defaults)

    def _fits(
        self, source: str, section: str, value: dict[str, Any], below: list[Mapping[str, Any]], warnings: list[str]
    ) -> bool:
        """Whether the sum of the layers is still valid; each may be, and their sum too large."""
        try:
            assemble(*({section: layer.get(section, {})} for layer in below), {section: value})
        except CortexError as error:
            warnings.append(f"{source}: over the weaker sources {error}; it is left out")
            return False
        return True

    def _check(
        self, source: str, section: str, value: Any, before: Answer | None, warnings: list[str]
    ) -> dict[str, Any] | None:
        try:
            return validate(section, value)
        except CortexError as error:
            warnings.append(f"{source}: {error}; the last good value is used")
            return before.sections.get(section) if before else None
