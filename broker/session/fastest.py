"""Which of several models begins to answer soonest, from the gateway's own figures. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from broker.config import AgentConfig, Config
from broker.gateway.records import Record
from broker.store.usage import SpeedRow

FASTEST = "fastest"
"""As an agent's ``model``."""
WEIGHT = 0.2
"""Of the last call, once there are ``1 / WEIGHT`` of them; before that they count alike."""
BETTER = 0.8
"""A model takes the place of another when it needs at most so much of its time."""
STALE_S = 86_400.0
FAILED_S = 600.0
"""After so long a model is tried again."""

Key = tuple[str, str]


class Speeds:
    """Times to first token by provider and model; ``known``: as they were kept."""

    def __init__(self, known: Iterable[SpeedRow] = ()) -> None:
        self._rows: dict[Key, SpeedRow] = {(row.provider, row.model): row for row in known}
        self._chosen: dict[str, str] = {}

    def add(self, config: Config, call: Record) -> SpeedRow | None:
        """Takes what a call says of a candidate; its new row, or None: it says nothing."""
        if call.endpoint != "generate" or call.cached or call.outcome == "gone" or not call.attempts:
            return None
        model = _candidate(config, call)
        if model is None:
            return None
        old = self._rows.get((call.provider, model))
        if call.outcome != "ok" or call.status >= 400:
            # Slow down, says the provider: nothing about the model.
            if call.status == 429:
                return None
            row = SpeedRow(call.provider, model, None, 0, call.at)
        elif call.ttft_s is None:
            return None
        else:
            took = max(0.0, call.ttft_s - call.queue_s)
            count = old.count + 1 if old is not None else 1
            before = old.ttft_s if old is not None else None
            share = max(WEIGHT, 1 / count)
            ttft = took if before is None else before + share * (took - before)
            row = SpeedRow(call.provider, model, ttft, count, call.at)
        self._rows[(call.provider, model)] = row
        return row

    def choose(self, name: str, agent: AgentConfig, now: float) -> str:
        """The model for the agent ``name``: the first of which too little is known, so that each gets its turn; else
        the one chosen last time, unless another is clearly faster. ``now``: seconds since the epoch."""
        rows = {model: self._rows.get((agent.provider, model)) for model in agent.models}
        unknown = next((model for model, row in rows.items() if _unknown(row, now)), None)
        if unknown is not None:
            self._chosen[name] = unknown
            return unknown
        times = {model: row.ttft_s for model, row in rows.items() if row is not None and row.ttft_s is not None}
        if not times:
            return agent.models[0]
        best = min(times, key=lambda model: times[model])
        last = self._chosen.get(name, best)
        if last not in times or times[best] <= BETTER * times[last]:
            last = best
        self._chosen[name] = last
        return last

    def view(self) -> list[SpeedRow]:
        """All that is known."""
        return sorted(self._rows.values(), key=lambda row: (row.provider, row.model))


def resolved(config: Config, speeds: Speeds, now: float) -> Mapping[str, str]:
    """The models of those agents whose model is ``fastest``, by agent."""
    return {
        name: speeds.choose(name, agent, now)
        for name, agent in config.agents.items()
        if agent.model == FASTEST and agent.models
    }


def with_models(config: Config, models: Mapping[str, str]) -> Config:
    """The tree with these agents' models."""
    agents = {
        name: agent.model_copy(update={"model": models[name]}) if name in models else agent
        for name, agent in config.agents.items()
    }
    return config.model_copy(update={"agents": agents})


def _unknown(row: SpeedRow | None, now: float) -> bool:
    return row is None or not 0 <= now - row.at <= (FAILED_S if row.ttft_s is None else STALE_S)


def _candidate(config: Config, call: Record) -> str | None:
    """The candidate that a call was for; a provider may answer with a longer name, a date at its end."""
    names: Sequence[str] = [
        model
        for agent in config.agents.values()
        if agent.model == FASTEST and agent.provider == call.provider
        for model in agent.models
    ]
    if call.model in names:
        return call.model
    return max((name for name in names if call.model.startswith(f"{name}-")), key=len, default=None)
