"""Under which names models are accounted: any sandbox can name as many as it likes. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from broker.gateway.records import Record

OTHER = "other"
MAX_KNOWN = 1000
"""Names that have answered, of all providers; the one that did so longest ago goes first."""
MAX_OF_USER = 32
"""Names in an hour: some servers answer to any."""
MAX_HOURS = 3
"""That are told apart at once; a gateway that was alone for long tells of earlier ones."""
HOUR_S = 3600

Name = tuple[str, str]
"""Provider and model."""


class ModelNames:
    """``known``: those that have answered before, the latest last."""

    def __init__(self, known: Iterable[Name] = ()) -> None:
        self._known: dict[Name, None] = dict.fromkeys(known)
        self._used: dict[int, dict[str, set[Name]]] = {}

    def of(self, call: Record) -> str:
        """The call's model; ``other`` where its provider has never answered by that name, or its user has used too
        many of them within the hour."""
        name = (call.provider, call.model)
        if 0 < call.status < 400:
            self._known.pop(name, None)
            self._known[name] = None
            if len(self._known) > MAX_KNOWN:
                del self._known[next(iter(self._known))]
        elif call.model and name not in self._known:
            return OTHER
        used = self._of_hour(int(call.at) // HOUR_S).setdefault(call.user, set())
        if name not in used and len(used) >= MAX_OF_USER:
            return OTHER
        used.add(name)
        return call.model

    def _of_hour(self, hour: int) -> dict[str, set[Name]]:
        found = self._used.setdefault(hour, {})
        if len(self._used) > MAX_HOURS:
            del self._used[min(each for each in self._used if each != hour)]
        return found
