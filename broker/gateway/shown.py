"""What the gateway process tells of its providers, as metrics of the broker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from broker.metrics import GATEWAY_CALLS, GATEWAY_RESTING_KEYS, GATEWAY_SERVERS

STATES = ("closed", "half_open", "open")


def show_providers(providers: Mapping[str, Any]) -> None:
    """Takes ``providers`` of the gateway's answer to a ping; what is gone is no longer shown."""
    for gauge in (GATEWAY_SERVERS, GATEWAY_CALLS, GATEWAY_RESTING_KEYS):
        gauge.clear()
    for name, view in providers.items():
        found = Counter(str(server["state"]) for server in view["servers"])
        for state in STATES:
            GATEWAY_SERVERS.labels(name, state).set(found[state])
        limits = view["limits"]
        GATEWAY_CALLS.labels(name, "running").set(limits["running"])
        GATEWAY_CALLS.labels(name, "waiting").set(limits["waiting"])
        GATEWAY_RESTING_KEYS.labels(name).set(sum(key["resting_s"] > 0 for key in limits["keys"]))
