from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from broker.config import Config
from broker.errors import Code, CortexError
from broker.gateway.link import Egress, GatewayLink, Provider
from broker.session.ecosystems import HOSTS
from broker.session.providers import BuilderNetwork, FileCredentials, egress_for, providers_for
from broker.session.sections import assemble


def config(**gateway: Any) -> Config:
    return Config.model_validate({"gateway": gateway})


def entry(**changes: str) -> dict[str, str]:
    return {"kind": "anthropic", "base_url": "https://api.example", **changes}


async def table(tree: Config, providers: dict[str, Any] | None = None) -> dict[str, Provider]:
    choices = assemble({"providers": providers or {}}).providers
    return await providers_for(tree, FileCredentials(), "ann", choices)


async def test_every_configured_provider_is_told_with_its_credential(tmp_path: Path) -> None:
    key, ca = tmp_path / "key", tmp_path / "ca.pem"
    key.write_text("  sk-1\n")
    ca.write_text("PEM")
    tree = config(providers={"a": entry(credential_file=str(key), ca_file=str(ca)), "b": entry(kind="ollama")})
    assert await table(tree) == {
        "a": Provider("anthropic", "https://api.example", "sk-1", "PEM", policy="a"),
        "b": Provider("ollama", "https://api.example", policy="b"),
    }


async def test_one_provider_stands_in_for_another(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("eu")
    tree = config(providers={"a": entry(), "eu": entry(base_url="https://eu.example", credential_file=str(key))})
    assert (await table(tree, {"a": {"use": "eu"}}))["a"] == Provider(
        "anthropic", "https://eu.example", "eu", policy="eu"
    )


async def test_a_stand_in_that_is_not_configured_changes_nothing() -> None:
    assert (await table(config(providers={"a": entry()}), {"a": {"use": "gone"}, "z": {}})) == {
        "a": Provider("anthropic", "https://api.example", policy="a")
    }


async def test_a_credential_is_read_again_when_its_file_was_replaced_or_rewritten(tmp_path: Path) -> None:
    key = tmp_path / "key"
    tree = config(providers={"a": entry(credential_file=str(key))}).gateway.providers["a"]
    credentials = FileCredentials()
    key.write_text("one")
    assert (await credentials.get("ann", "a", tree)).value == "one"
    new = tmp_path / "new"
    new.write_text("two")
    os.utime(new, ns=(key.stat().st_mtime_ns, key.stat().st_mtime_ns))
    new.rename(key)
    assert (await credentials.get("ann", "a", tree)).value == "two"
    key.write_text("three")
    os.utime(key, ns=(1, 1))
    assert (await credentials.get("ann", "a", tree)).value == "three"


@pytest.mark.parametrize("key", ["credential_file", "ca_file"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
async def test_a_file_that_cannot_be_read_is_named_with_its_key(
    tmp_path: Path, key: str, content: bytes | None
) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CortexError) as caught:
        await table(config(providers={"a": entry(**{key: str(path)})}))
    assert caught.value.code is Code.BAD_CONFIG
    assert f"gateway.providers.a.{key}" in caught.value.hint
    assert "\ufffd" not in str(caught.value)


def test_nothing_but_the_users_hosts_may_be_reached() -> None:
    tree = config(allowed_hosts=["registry.example"], private_hosts=["inner.example"])
    assert egress_for(tree, "demo", assemble({})) == Egress((), ("inner.example",))
    assert egress_for(tree, "demo", assemble({"egress": {"hosts": ["a.example"]}})).hosts == ("a.example",)


def test_the_agents_hosts_and_ecosystems_come_first_and_none_twice() -> None:
    agent = {"command": ["x"], "egress_hosts": ["b.example", "*.c.example"], "egress_ecosystems": ["rust"]}
    tree = Config.model_validate({"agents": {"a": agent}})
    user = assemble({"egress": {"hosts": ["d.example:8443", "b.example"], "ecosystems": ["rust", "ruby"]}})
    ready = (*HOSTS["rust"], *HOSTS["ruby"])
    assert egress_for(tree, "a", user).hosts == ("b.example", "*.c.example", "d.example:8443", *ready)
    assert egress_for(tree, "demo", assemble({})).hosts == egress_for(tree, "gone", assemble({})).hosts == ()


class Told(GatewayLink):
    def __init__(self) -> None:
        self.told: list[Any] = []

    async def put_slot(
        self,
        slot: str,
        incarnation: int,
        identity: Mapping[str, str] | None,
        providers: Mapping[str, Provider],
        egress: Egress,
        fds: tuple[int, int] | None = None,
    ) -> None:
        self.told.append((slot, incarnation, identity, dict(providers), egress, fds))

    async def drop_slot(self, slot: str) -> None:
        self.told.append(slot)


async def test_builders_reach_the_allowed_hosts_and_no_provider() -> None:
    gateway = Told()
    tree = config(allowed_hosts=["registry.example"], providers={"a": entry()})
    network = BuilderNetwork(gateway, lambda: tree)
    await network.put_builder("s1", 3, (4, 5))
    await network.drop_slot("s1")
    egress = Egress(("registry.example",), ())
    assert gateway.told == [("s1", 3, {"user": "", "role": "builder"}, {}, egress, (4, 5)), "s1"]
