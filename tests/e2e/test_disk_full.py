"""A state directory without room: refused clearly, nothing stored is lost, and it heals."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import acp
import pytest

from tests import host
from tests.e2e.conftest import process_config
from tests.e2e.harness import Client, connected, running, start_fails, turn

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 64 MiB under the state directory."""
    with host.small_disk(place / "state", "64m", "mode=0700"):
        yield place


def fill(state: Path) -> Path:
    """Takes all the room there is."""
    filler = state / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**20, 4096):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    assert shutil.disk_usage(state).free == 0
    return filler


async def talk_much(agent: Any, session: str) -> None:
    """More than fits into what a journal may have left."""
    for _ in range(50):
        await turn(agent, session, "x" * 20_000)


async def test_a_full_disk_refuses_clearly_loses_nothing_and_heals(small_disk: Path) -> None:
    async with running(small_disk, "process", process_config()) as broker:
        made = await broker.session("ann")
        await broker.api("PUT", "/v1/users/ann/config/env", {"GREETING": "kept"})
        client = Client()
        async with connected(made["acp_url"], made["token"], client) as agent:
            session = (await agent.new_session(cwd="/", mcp_servers=[])).session_id
            await turn(agent, session, "remember the pear")
            filler = fill(broker.state_dir)
            ready = await broker.api("GET", "/readyz", expect=503)
            assert "0 MiB free" in ready["checks"]["disk"]
            big = {f"KEY_{number}": "v" * 1000 for number in range(50)}
            problem = await broker.refused("PUT", "/v1/users/ann/config/env", big)
            assert (problem["status"], problem["code"]) == (507, "store.disk_full")
            assert str(broker.state_dir) in problem["hint"] or "state_dir" in problem["hint"]
            problem = await broker.refused("POST", "/v1/sessions", {"user": "bob", "wait": "ready"})
            assert (problem["status"], problem["code"]) == (507, "store.disk_full")
            with pytest.raises(acp.RequestError) as refused:
                await talk_much(agent, session)
            data: Any = refused.value.data
            assert data["code"] == "store.disk_full"
            assert data["hint"]
            assert (await broker.api("GET", "/v1/users/ann/config/env"))["value"] == {"GREETING": "kept"}
            assert (await broker.api("GET", "/v1/sessions/ann/main"))["state"] == "ready"
            os.unlink(filler)
            await broker.api("PUT", "/v1/users/ann/config/env", {"GREETING": "changed"})
            assert (await turn(agent, session, "and the plum")).stop_reason == "end_turn"
        later = Client()
        async with connected(made["acp_url"], made["token"], later) as agent:
            await agent.load_session(cwd="/", session_id=session, mcp_servers=[])
            assert "pear" in later.text
            assert "plum" in later.text
        assert (await broker.session("bob"))["state"] == "ready"
        await broker.stop()
        filler = fill(broker.state_dir)
        _, said = await start_fails(broker)
        assert "store.disk_full" in said
        os.unlink(filler)
        await broker.start()
        assert (await broker.api("GET", "/v1/users/ann/config/env"))["value"] == {"GREETING": "changed"}
