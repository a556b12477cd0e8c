"""What the gateway is told of providers: the whole section, keys read from files, told again when one changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from broker.config import Config, ProviderConfig
from broker.gateway.link import GatewayLink
from broker.gateway.policy import CacheRule, CacheStore, Limit, Policy, policies_from_wire
from broker.host.tasks import TaskOwner
from broker.session import policies
from broker.session.policies import Policies, policy_of


class Gateway:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[dict[str, Policy], CacheStore]] = []
        self.heard = asyncio.Event()

    def set_policies(self, told: dict[str, Policy], cache: CacheStore) -> None:
        self.told.append((told, cache))
        self.heard.set()


@pytest.mark.parametrize("struct", [Policy, Limit, CacheRule, CacheStore])
def test_the_gateway_knows_no_default_of_its_own(struct: Any) -> None:
    """What an operator reads in config.toml is what holds."""
    config = Config.model_validate({"gateway": {"providers": {"p": {"kind": "openai", "base_url": "http://h"}}}})
    provider = config.gateway.providers["p"]
    of: dict[Any, Any] = {
        Policy: provider, Limit: provider.limits.provider, CacheRule: provider.cache, CacheStore: config.gateway.cache,
    }  # fmt: skip
    made = {"kind", "upstreams", "keys", "ca", "limits", "cache", "redis_password", "prewarm"}
    names, defaults = struct.__struct_fields__, struct.__struct_defaults__
    for name, default in zip(names[-len(defaults) :], defaults, strict=True):
        if name not in made:
            assert getattr(of[struct], name) == default, name


def test_a_section_arrives_whole() -> None:
    section = ProviderConfig.model_validate({
        "kind": "ollama", "upstreams": ["http://a:1", "http://b:2"], "max_fails": 3, "preload": ["m"],
        "limits": {"profile": "document-001", "sandbox": {"rpm": 60}, "waiting": 7}, "cache": {"enabled": True},
    })  # fmt: skip
    policy = policy_of(section, ("k1", "k2"), "PEM")
    assert (policy.upstreams, policy.keys, policy.ca) == (("http://a:1", "http://b:2"), ("k1", "k2"), "PEM")
    assert policy.limits.provider == Limit(concurrency=6, interval_s=0.025)
    assert policy.limits.sandbox == Limit(rpm=60)
    assert (policy.limits.waiting, policy.max_fails, policy.preload, policy.cache.enabled) == (7, 3, ("m",), True)
    assert "k1" not in repr(policy)


def test_what_is_told_is_what_is_heard() -> None:
    import msgspec

    policy = policy_of(ProviderConfig(kind="gemini", base_url="https://h/x"), ("k",), "")
    assert policies_from_wire({"p": msgspec.to_builtins(policy)}) == {"p": policy}


@pytest.mark.parametrize("wrong", [{}, {"kind": "x", "upstreams": []}, {"kind": "openai", "upstreams": 5}])
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        policies_from_wire({"p": wrong})


async def test_a_key_that_cannot_be_sent_costs_only_itself(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("sk-1\n")
    bad.write_text("sk-2\nsk-3\n")
    section = {"kind": "openai", "base_url": "http://h", "credential_files": [str(bad), str(good)]}
    config = Config.model_validate({"gateway": {"providers": {"p": section}}})
    gateway, tasks = Gateway(), TaskOwner("test")
    await Policies(cast(GatewayLink, gateway), lambda: config, tasks).start()
    assert gateway.told[0][0]["p"].keys == ("sk-1",)
    await tasks.close()


async def test_keys_are_read_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "LOOK_S", 0.01)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("sk-1\n")
    section = {"kind": "openai", "base_url": "http://h", "credential_files": [str(one), str(two)]}
    config = Config.model_validate({"gateway": {"providers": {"p": section}}})
    gateway, tasks = Gateway(), TaskOwner("test")
    current: Callable[[], Config] = lambda: config  # noqa: E731
    told = Policies(cast(GatewayLink, gateway), current, tasks)
    await told.start()
    assert gateway.told[0][0]["p"].keys == ("sk-1",), "one that cannot be read is left out, the others serve"
    gateway.heard.clear()
    two.write_text("sk-2")
    async with asyncio.timeout(5):
        await gateway.heard.wait()
    assert gateway.told[1][0]["p"].keys == ("sk-1", "sk-2")
    assert len(gateway.told) == 2, "told once, not at every look"
    await tasks.close()
