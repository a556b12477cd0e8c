"""How a change of configuration reaches a running sandbox: once, in parts, and never lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.metrics import STATE_WRITES
from broker.session.ecosystems import HOSTS
from broker.session.session import Session
from broker.session.sources import Answer
from tests.integration.session.rig import Client, Rig, engine_down, rig, until
from tests.unit.broker.session.test_egress_view import report, row

MCP = {"mcpServers": {"fs": {"command": "/bin/fs"}}}


def written(kind: str, result: str = "written") -> float:
    return float(STATE_WRITES.labels(kind, result)._value.get())


async def test_only_the_part_that_differs_is_sent_in_one_bind() -> None:
    async with rig() as world:
        await world.ready()
        assert len(world.box.binds) == 1
        before = written("mcp"), written("settings")
        (applied,) = await world.put("mcp", MCP)
        assert (applied.state, applied.effect) == ("applied", {"mcp": "now"})
        assert len(world.box.binds) == 2
        assert set(world.box.binds[-1].parts) == {"mcp"}
        assert world.box.binds[-1].parts["mcp"][0]["name"] == "fs"
        assert (written("mcp"), written("settings")) == (before[0] + 1, before[1])
        (applied,) = await world.put("env", {"A": "1"})
        assert set(world.box.binds[-1].parts) == {"process"}
        assert world.box.binds[-1].parts["process"]["env"]["A"] == "1"


async def test_nothing_is_sent_when_nothing_differs() -> None:
    async with rig() as world:
        await world.ready()
        await world.put("mcp", MCP)
        writes, puts = written("mcp"), world.gateway.puts
        (applied,) = await world.put("mcp", {"mcpServers": {"fs": {"args": [], "command": "/bin/fs"}}})
        assert (applied.state, applied.effect) == ("applied", {})
        assert len(world.box.binds) == 2
        assert written("mcp") == writes
        assert world.gateway.puts == puts


async def test_effects_are_told() -> None:
    async with rig() as world:
        await world.ready()
        world.box.script.effect = {"process": "next_turn"}
        (applied,) = await world.put("env", {"A": "1"})
        assert applied.effect == {"process": "next_turn"}
        (applied,) = await world.put("limits", {"pids": 64})
        assert applied.effect == {"boot": "next_start"}
        (applied,) = await world.put("egress", {"hosts": ["example.com"]})
        assert applied.effect == {"gateway": "now", "boot": "next_start"}
        assert world.gateway.slots[world.box.spec.slot][2].hosts == ("example.com",)
        session = world.registry.held("ann", "main")
        assert session is not None
        await session.stop()
        await session.wait_ready()
        assert world.box.spec.pids == 64


async def test_a_change_without_a_sandbox_is_stored() -> None:
    async with rig() as world:
        session = await world.ready()
        await session.stop()
        (applied,) = await world.put("env", {"A": "1"})
        assert applied.state == "stored"
        await session.wait_ready()
        # Welcomed with what was cached, it is bound to what was read meanwhile.
        assert world.box.binds[-1].parts["process"]["env"]["A"] == "1"
        assert session.view()["origins"]["env"] == "store"


class Slow:
    """A source that answers when it is told to."""

    name = "slow"

    def __init__(self) -> None:
        self.sections: dict[str, object] = {}
        self.go = asyncio.Event()
        self.go.set()
        self.asked = 0

    async def read(self, user: str, last: Answer | None) -> Answer:
        answer = Answer(dict(self.sections))
        self.asked += 1
        await self.go.wait()
        return answer


async def test_a_change_during_a_bringup_is_applied_right_after() -> None:
    async with rig() as world:
        slow = Slow()
        world.sources.append(slow)
        slow.go.clear()
        session = await world.session()
        await until(lambda: slow.asked == 1)
        # The bring-up has read the source already; what it read is the past.
        slow.sections = {"env": {"A": "2"}}
        changing = asyncio.ensure_future(session.config_changed("env"))
        slow.go.set()
        applied = await changing
        assert applied.state == "applied"
        assert world.box.binds[-1].parts["process"]["env"]["A"] == "2"


async def test_a_change_while_one_is_applied_is_not_lost() -> None:
    async with rig() as world:
        slow = Slow()
        world.sources.append(slow)
        session = await world.ready()
        slow.go.clear()
        slow.sections = {"env": {"A": "1"}}
        first = asyncio.ensure_future(session.config_changed("env"))
        await until(lambda: slow.asked == 2)
        slow.sections = {"env": {"A": "2"}}
        second = asyncio.ensure_future(session.config_changed("env"))
        await asyncio.sleep(0)
        assert session._configuration.dirty
        slow.go.set()
        await asyncio.gather(first, second)
        assert world.box.binds[-1].parts["process"]["env"]["A"] == "2"
        assert not session._configuration.dirty


async def test_settings_reloads_are_coalesced_and_applied() -> None:
    async with rig() as world:
        slow = Slow()
        world.sources.append(slow)
        session = await world.ready()
        world.configure({"defaults": {"env": {"B": "1"}}})
        for _ in range(500):
            session.settings_changed()
        await until(lambda: not session._configuration.dirty)
        assert slow.asked == 2
        assert world.box.binds[-1].parts["process"]["env"]["B"] == "1"


async def test_a_provider_that_the_operator_changes_is_told_to_the_gateway(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("one")
    provider = {"kind": "anthropic", "base_url": "http://127.0.0.1:1", "credential_file": str(key)}
    async with rig(gateway={"providers": {"anthropic": provider}}) as world:
        session = await world.ready()

        def told() -> tuple[str, str]:
            entry = world.gateway.slots[world.box.spec.slot][1]["anthropic"]
            return entry.base_url, entry.credential

        assert told() == ("http://127.0.0.1:1", "one")
        world.configure({"gateway": {"providers": {"anthropic": {"base_url": "http://127.0.0.1:2"}}}})
        world.registry.settings_reloaded()
        await until(lambda: told() == ("http://127.0.0.1:2", "one"))
        key.unlink()
        key.write_text("two")
        assert (await session.config_changed("providers")).effect == {"gateway": "now"}
        assert told() == ("http://127.0.0.1:2", "two")
        key.unlink()
        applied = await session.config_changed("providers")
        assert applied.state == "failed"
        assert applied.error is not None
        assert "credential_file" in applied.error["hint"]
        assert session.state == "ready"


async def test_hosts_of_the_agents_settings_and_of_ecosystems_are_told_to_the_gateway_at_once() -> None:
    async with rig() as world:
        session = await world.ready()

        def told() -> tuple[str, ...]:
            return world.gateway.slots[world.box.spec.slot][2].hosts

        assert told() == ()
        own = {**world.config.agents[session.agent].model_dump(), "egress_hosts": ["a.example"]}
        world.configure({"agents": {session.agent: own}})
        world.registry.settings_reloaded()
        await until(lambda: told() == ("a.example",))
        (applied,) = await world.put("egress", {"hosts": ["*.b.example"], "ecosystems": ["rust"]})
        assert applied.effect == {"gateway": "now"}
        assert told() == ("a.example", "*.b.example", *HOSTS["rust"])


async def test_a_host_that_was_denied_is_among_the_warnings_until_it_is_allowed() -> None:
    async with rig() as world:
        session = await world.ready()
        await world.put("egress", {"hosts": ["a.example"]})
        world.runtime.egress.heard(report(row("b.example", tool="git", denied=1), user=session.user))
        (warning,) = session.view()["warnings"]
        assert warning.startswith("git wanted b.example: denied; allow it with: ")
        assert '{"hosts": ["a.example", "b.example"]}' in warning
        await world.put("egress", {"hosts": ["b.example"]})
        assert session.view()["warnings"] == []


async def test_a_credential_that_the_gateway_did_not_acknowledge_is_taken_back_all_the_same(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("one")
    provider = {"kind": "anthropic", "base_url": "http://127.0.0.1:1", "credential_file": str(key)}
    async with rig(gateway={"providers": {"anthropic": provider}}) as world:
        session = await world.ready()
        put = world.gateway.put_slot

        async def unanswered(*args: Any) -> None:
            await put(*args)
            raise CortexError(Code.GATEWAY_DOWN, "no answer", hint="it is told to the next gateway")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world.gateway, "put_slot", unanswered)
            key.unlink()
            key.write_text("two")
            assert (await session.config_changed("credentials")).state == "failed"
        key.unlink()
        key.write_text("one")
        assert (await session.config_changed("credentials")).effect == {"gateway": "now"}
        assert world.gateway.slots[world.box.spec.slot][1]["anthropic"].credential == "one"


async def test_client_frames_wait_while_a_bind_is_on_its_way_for_a_bounded_time() -> None:
    async with rig(session={"bind_hold_s": 0.1, "bind_timeout_s": 0.6}) as world:
        session = await world.ready()
        client = Client()
        session.attach(client)
        world.box.script.bind_hangs = True
        changing = asyncio.ensure_future(world.put("env", {"A": "1"}))
        await until(lambda: client.holding)
        late = Client()
        session.attach(late)
        assert late.holding
        await until(lambda: not client.holding and not late.holding)
        assert not changing.done()
        (applied,) = await changing
        assert applied.state == "failed"
        assert session.state == "ready"
        world.box.script.bind_hangs = False
        (applied,) = await world.put("env", {"A": "1"})
        assert applied.state == "applied"
        assert not client.holding
        assert client.holds == 2


async def test_no_client_waits_when_nothing_is_sent() -> None:
    async with rig() as world:
        session = await world.ready()
        client = Client()
        session.attach(client)
        await world.put("env", {})
        assert client.holds == 0


async def test_a_refused_change_says_so_keeps_the_session_and_is_tried_again() -> None:
    async with rig() as world:
        session = await world.ready()
        world.box.script.bind_error = "config.invalid_section"
        (applied,) = await world.put("env", {"A": "1"})
        assert applied.state == "failed"
        assert applied.error is not None
        assert applied.error["code"] == "config.invalid_section"
        assert session.state == "ready"
        assert session.view()["warnings"]
        world.box.script.bind_error = ""
        session.tick()
        await until(lambda: not session._configuration.dirty)
        assert world.box.binds[-1].parts["process"]["env"]["A"] == "1"
        assert session.view()["warnings"] == []


async def test_a_gateway_that_is_down_fails_the_change_and_gets_it_later() -> None:
    async with rig() as world:
        session = await world.ready()
        world.gateway.error = CortexError(Code.GATEWAY_DOWN, "down", hint="wait")
        (applied,) = await world.put("egress", {"hosts": ["example.com"]})
        assert applied.state == "failed"
        world.gateway.error = None
        session.tick()
        await until(lambda: world.gateway.slots[world.box.spec.slot][2].hosts == ("example.com",))


async def aged(world: Rig, session: Session) -> None:
    await world.users.put_section("ann", "env", {"A": "old"})
    world.clock.now += world.config.session.config_max_age_s


async def test_an_old_configuration_is_refreshed_in_front_of_nobody() -> None:
    async with rig() as world:
        session = await world.ready()
        await aged(world, session)
        client = Client()
        session.attach(client)
        (await session.open_stream(client.attach)).close()
        await until(lambda: len(world.box.binds) == 2)
        assert world.box.binds[-1].parts["process"]["env"]["A"] == "old"


async def test_the_registrys_look_refreshes_sessions_in_use_only() -> None:
    async with rig() as world:
        session = await world.ready()
        await aged(world, session)
        await world.registry._look()
        assert session._mailbox.idle
        session._clients.add(Client())
        await world.registry._look()
        await until(lambda: len(world.box.binds) == 2)


async def test_the_sessions_of_a_user_are_told_at_the_same_time() -> None:
    async with rig() as world:
        await asyncio.gather(*(world.ready("ann", name) for name in ("a", "b", "c")), world.ready("bob"))
        everybody = asyncio.Barrier(3)

        class Meets(Slow):
            async def read(self, user: str, last: Answer | None) -> Answer:
                async with asyncio.timeout(1):
                    await everybody.wait()
                return Answer({"env": {"A": "1"}})

        world.sources.append(Meets())
        applied = await world.put("settings", {"model": "m"})
        assert [(each.workspace, each.state) for each in applied] == [(name, "applied") for name in ("a", "b", "c")]
        assert all("slow" in session.view()["origins"].values() for session in _of(world, "ann"))


def _of(world: Rig, user: str) -> list[Session]:
    return [session for (owner, _), session in world.registry._sessions.items() if owner == user]


async def test_one_session_that_cannot_take_a_change_does_not_keep_it_from_the_others() -> None:
    async with rig() as world:
        await asyncio.gather(world.ready("ann", "a"), world.ready("ann", "b"))
        bad = next(iter(world.engine.sandboxes.values()))
        bad.script = type(bad.script)(bind_error="config.invalid")
        applied = await world.put("env", {"A": "1"})
        assert sorted(each.state for each in applied) == ["applied", "failed"]


async def test_a_restarted_session_begins_with_what_it_had_cached() -> None:
    async with rig() as world:
        session = await world.ready()
        await world.put("env", {"A": "1"})
        await session.stop()
        await world.restart()
        slow = Slow()
        slow.go.clear()
        world.sources.append(slow)
        again = await world.session()
        await until(lambda: world.calls("start") == 2)
        assert slow.asked == 1
        slow.go.set()
        await again.wait_ready()
        assert world.box.binds[-1].parts.keys() == {"mcp", "settings", "files"}


async def test_a_store_that_is_down_does_not_stop_what_works() -> None:
    async with rig() as world:
        session = await world.ready()
        world.store.inner.save = _refuses
        (applied,) = await world.put("env", {"A": "1"})
        assert applied.state == "applied"
        assert session.state == "ready"


async def _refuses(row: object) -> None:
    raise engine_down()


async def test_a_change_that_nobody_waits_for_during_a_bringup_is_applied_all_the_same() -> None:
    async with rig() as world:
        slow = Slow()
        world.sources.append(slow)
        slow.go.clear()
        session = await world.session()
        await until(lambda: slow.asked == 1)
        slow.sections = {"env": {"A": "2"}}
        session.settings_changed()
        await until(lambda: session._mailbox.idle)
        slow.go.set()
        await session.wait_ready()
        await until(lambda: not session._configuration.dirty)
        assert world.box.binds[-1].parts["process"]["env"]["A"] == "2"


async def test_a_change_that_comes_while_sources_are_read_leaves_it_dirty() -> None:
    async with rig() as world:
        slow = Slow()
        world.sources.append(slow)
        session = await world.ready()
        slow.go.clear()
        applying = asyncio.ensure_future(session.config_changed("env"))
        await until(lambda: slow.asked == 2)
        session._configuration.changed()
        slow.go.set()
        assert (await applying).state == "applied"
        assert session._configuration.dirty
