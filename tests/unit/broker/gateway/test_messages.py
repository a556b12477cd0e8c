"""The link's messages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import GatewayConfig
from broker.gateway.messages import (
    MAX_PACKET,
    Egress,
    MessageError,
    Provider,
    Settings,
    SlotEntry,
    entry_from_wire,
    entry_to_wire,
    pack,
    unpack,
)

ENTRY = SlotEntry(
    "s",
    3,
    {"user": "u"},
    {"p": Provider("openai", "https://h", "k", "ca", False, "bearer", {"a": "b"})},
    Egress(("a", "b:1"), ("b",)),
)


def test_an_entry_survives_the_wire() -> None:
    assert entry_from_wire(unpack(pack({"type": "put", **entry_to_wire(ENTRY)}))) == ENTRY


def test_settings_survive_the_wire_and_take_the_configs_values() -> None:
    settings = Settings.of(GatewayConfig(idle_timeout_s=7, max_head_bytes=9))
    assert (settings.idle_timeout_s, settings.max_head_bytes) == (7, 9)
    wire = {name: getattr(settings, name) for name in Settings.__slots__}
    assert Settings.from_wire(wire) == settings


def test_defaults_are_the_configs() -> None:
    assert Settings.of(GatewayConfig()) == Settings()


@pytest.mark.parametrize("change", [{"idle_timeout_s": "7"}, {"idle_timeout_s": 0}, {"idle_timeout_s": True}])
def test_bad_settings(change: dict[str, Any]) -> None:
    wire = {name: getattr(Settings(), name) for name in Settings.__slots__} | change
    with pytest.raises(MessageError):
        Settings.from_wire(wire)


@pytest.mark.parametrize("missing", ["slot", "incarnation", "identity", "providers", "egress"])
def test_an_entry_with_something_missing(missing: str) -> None:
    wire = entry_to_wire(ENTRY)
    del wire[missing]
    with pytest.raises(MessageError):
        entry_from_wire(wire)


def test_a_packet_has_a_limit() -> None:
    with pytest.raises(MessageError):
        pack({"type": "x", "fill": "x" * MAX_PACKET})


@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_refused(packet: bytes) -> None:
    try:
        message = unpack(packet)
    except MessageError:
        return
    assert isinstance(message["type"], str)
