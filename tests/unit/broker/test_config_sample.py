"""Holds config.toml at the repository's root against the schema."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from broker.config import DEMO_AGENT, Config, PoolAgentConfig, PoolConfig, ProviderConfig
from broker.config_gateway import LimitConfig
from broker.session.sections import default_problems
from broker.settings import load

SAMPLE = Path(__file__).parents[3] / "config.toml"
LINES = SAMPLE.read_text().splitlines()


def commented(table: str, key: str) -> tuple[str, bool]:
    """The comment above ``key`` in [table], and whether the key itself is commented out."""
    start = LINES.index(f"[{table}]")
    for at in range(start + 1, len(LINES)):
        if LINES[at].startswith("["):
            break
        if re.match(rf"#?{key} = ", LINES[at]):
            first = at
            while LINES[first - 1].startswith("# "):
                first -= 1
            return " ".join(line.removeprefix("# ") for line in LINES[first:at]), LINES[at].startswith("#")
    raise AssertionError(f"{key} is missing in [{table}] of config.toml")


def tables() -> Iterator[tuple[str, BaseModel]]:
    def below(path: str, model: BaseModel) -> Iterator[tuple[str, BaseModel]]:
        yield path, model
        for name in type(model).model_fields:
            if isinstance(value := getattr(model, name), BaseModel):
                yield from below(f"{path}.{name}", value)

    config = Config()
    for name in Config.model_fields:
        if name != "agents":
            yield from below(name, getattr(config, name))
    yield "agents.demo", DEMO_AGENT
    provider = ProviderConfig(kind="anthropic", base_url="https://api.anthropic.com")
    for path, model in below("gateway.providers.anthropic", provider):
        # One of the four tables of limits stands for all.
        if not isinstance(model, LimitConfig) or path.endswith(".provider"):
            yield path, model


DICTS = (("gateway", "providers"), ("gateway", "prices"), ("pool", "agents"))
"""Tables of tables, of which there is none by default."""


@pytest.mark.parametrize(("table", "model"), [pytest.param(*item, id=item[0]) for item in tables()])
def test_every_key_stands_there_with_its_default_and_its_description(table: str, model: BaseModel) -> None:
    document = tomllib.loads(SAMPLE.read_text())
    for part in table.split("."):
        document = document[part]
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        if isinstance(value, BaseModel) or (table, key) in DICTS:
            continue
        comment, off = commented(table, key)
        assert comment, f"{table}.{key} has no comment"
        if field.description:
            assert comment == field.description, f"{table}.{key}"
        assert off == (value is None), f"{table}.{key}"
        if not off:
            assert document[key] == (list(value) if isinstance(value, tuple) else value), f"{table}.{key}"


def test_the_pool_of_an_agent_is_shown_whole_though_it_is_commented_out() -> None:
    start = LINES.index("#[pool.agents.demo]")
    end = next(at for at in range(start, len(LINES)) if not LINES[at].startswith("#"))
    comments: dict[str, str] = {}
    said: list[str] = []
    for line in LINES[start + 1 : end]:
        if line.startswith("# "):
            said.append(line.removeprefix("# "))
        else:
            comments[line.removeprefix("#").partition(" = ")[0]] = " ".join(said)
            said.clear()
    assert not said
    assert comments == {name: field.description for name, field in PoolAgentConfig.model_fields.items()}
    assert LINES[start - 1] == f"# {PoolConfig.model_fields['agents'].description}"
    text = "\n".join(line[1:] for line in LINES[start:end] if not line.startswith("# "))
    written = Config.model_validate(tomllib.loads(text)).pool.agents["demo"]
    assert written == PoolAgentConfig()
    assert written.model_fields_set == set(PoolAgentConfig.model_fields)


def test_the_servers_of_ollama_are_valid_once_they_are_no_longer_commented_out() -> None:
    start = LINES.index("#[gateway.providers.ollama]")
    end = next(at for at in range(start, len(LINES)) if not LINES[at].startswith("#"))
    text = "\n".join(line[1:] for line in LINES[start:end] if not line.startswith("# "))
    found = Config.model_validate(tomllib.loads(text)).gateway.providers["ollama"]
    assert (found.kind, len(found.servers), found.max_fails, found.fail_timeout_s) == ("ollama", 3, 3, 30)
    assert found.preload
    assert found.preload_keep_alive == "24h"
    assert found.cache.enabled
    assert "ollama" not in tomllib.loads(SAMPLE.read_text())["gateway"]["providers"]
    drop_in = (SAMPLE.parent / "systemd" / "ollama.conf").read_text()
    told = re.findall(r"^Environment=(.*)$", drop_in, re.MULTILINE)[0].split()
    assert dict(pair.split("=") for pair in told) == {
        "OLLAMA_KEEP_ALIVE": found.preload_keep_alive,
        "OLLAMA_MAX_LOADED_MODELS": "2",
        "OLLAMA_NUM_PARALLEL": str(found.limits.provider.concurrency // len(found.servers)),
    }
    comment = " ".join(LINES[start - 2 : start])
    assert all(pair in comment for pair in told)


def test_it_loads_and_changes_no_default() -> None:
    loaded = load(SAMPLE, {"HOME": "/home/ann"}, root=False, checks=[default_problems]).config
    embedded = load(None, {"HOME": "/home/ann", "XDG_CONFIG_HOME": "/nowhere"}, root=False).config
    shipped = {"agents", "gateway"}
    assert loaded.model_dump(exclude=shipped) == embedded.model_dump(exclude=shipped)
    assert loaded.gateway.model_dump(exclude={"providers"}) == embedded.gateway.model_dump(exclude={"providers"})
    assert loaded.agents["demo"] == DEMO_AGENT


def test_the_shipped_agents_are_there() -> None:
    agents = load(SAMPLE, {"HOME": "/home/ann"}, root=False).config.agents
    assert set(agents) >= {"demo", "claude", "codex", "codex-raw", "gemini", "opencode"}
    assert agents["codex-raw"].protocol == "websocket"
    assert all(agent.provider for name, agent in agents.items() if name != "demo")
