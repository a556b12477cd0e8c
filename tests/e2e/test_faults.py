"""What goes wrong around the broker: each fault is told clearly, in bounded time, and hurts only its own."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import acp
import pytest
import pytest_asyncio
from aiohttp import web
from websockets.exceptions import ConnectionClosed

from tests.e2e.conftest import need_docker, process_config, short_directory
from tests.e2e.harness import ROOT, BrokerProcess, Client, connected, free_port, running, start_fails, turn

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

SERVER = base64.b64encode((ROOT / "tests" / "e2e" / "swap_mcp.py").read_bytes()).decode()
needs_bubblewrap = pytest.mark.skipif(bool(process_config()), reason="bubblewrap cannot run here")


class WebApp:
    """The web app's source of configuration. ``answers``: by user, the sections or what to answer instead."""

    def __init__(self) -> None:
        self.port = free_port()
        self.answers: dict[str, Any] = {}
        self._runner: web.AppRunner | None = None

    async def up(self) -> None:
        app = web.Application()
        app.router.add_get("/config/{user}", self._get)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def down(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _get(self, request: web.Request) -> web.StreamResponse:
        found = self.answers.get(request.match_info["user"])
        if found is None:
            return web.Response(status=404)
        if found == "hang":
            await asyncio.sleep(60)
        if isinstance(found, int):
            return web.Response(status=found, headers={"Location": "http://127.0.0.1:1/"})
        return web.Response(body=found if isinstance(found, bytes) else json.dumps(found).encode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def web_app() -> AsyncIterator[WebApp]:
    app = WebApp()
    await app.up()
    yield app
    await app.down()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(web_app: WebApp) -> AsyncIterator[BrokerProcess]:
    """One broker for the tests that do not break it."""
    config = f"""
npm_registry = "https://registry.invalid/"
package_timeout_s = 20
{process_config()}
[session]
config_url = "http://127.0.0.1:{web_app.port}/config"
config_timeout_s = 0.5
[agents.hostile]
command = ["{{python}}", "-I", "-S", "{ROOT / "tests" / "e2e" / "hostile.py"}"]
"""
    with short_directory() as directory:
        async with running(directory, "process", config) as broker:
            yield broker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bystander(house: BrokerProcess) -> AsyncIterator[Any]:
    """Somebody else, who is in the middle of a conversation."""
    made = await house.session("bystander")
    async with connected(made["acp_url"], made["token"], Client()) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        yield agent, session.session_id


@asynccontextmanager
async def unnoticed(bystander: Any) -> AsyncIterator[None]:
    """The bystander talks on all the while, and is answered."""
    agent, session_id = bystander
    turns = 0

    async def talk() -> None:
        nonlocal turns
        while True:
            assert (await turn(agent, session_id, "/slow 1 1", 5)).stop_reason == "end_turn"
            turns += 1

    talking = asyncio.ensure_future(talk())
    try:
        yield
        before = turns
        async with asyncio.timeout(10):
            while turns < before + 2 and not talking.done():
                await asyncio.sleep(0.01)
    finally:
        if not talking.done():
            talking.cancel()
        with_error = (await asyncio.gather(talking, return_exceptions=True))[0]
    assert isinstance(with_error, asyncio.CancelledError), with_error


# At start


async def test_an_engine_that_is_down_is_told_at_start(place: Path) -> None:
    broker = BrokerProcess(place, "docker", f'[sandbox.docker]\nhost = "unix://{place}/none.sock"\n')
    _, said = await start_fails(broker)
    assert "sandbox.engine_down" in said
    assert "systemctl start docker" in said


async def test_an_engine_that_hangs_is_told_at_start(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(place / "hung.sock"))
        hung.listen(8)
        broker = BrokerProcess(
            place, "docker", f'[sandbox.docker]\nhost = "unix://{place}/hung.sock"\ncall_timeout_s = 1\n'
        )
        _, said = await start_fails(broker)
    assert "sandbox.engine_timeout" in said
    assert "docker version" in said


@pytest.mark.docker
async def test_an_image_that_is_missing_is_told_at_start(place: Path) -> None:
    need_docker()
    broker = BrokerProcess(place, "docker", env={"CORTEX_SANDBOX__DOCKER__IMAGE": "cortex-none:none"})
    _, said = await start_fails(broker)
    assert "sandbox.image_missing" in said
    assert "make image" in said


async def test_a_second_broker_on_a_state_directory_is_refused(
    house: BrokerProcess, bystander: Any, place: Path
) -> None:
    second = BrokerProcess(place, "process", process_config(), env={"CORTEX_BROKER__STATE_DIR": str(house.state_dir)})
    async with unnoticed(bystander):
        _, said = await start_fails(second)
    assert "store.locked" in said
    assert str(house.state_dir) in said


async def test_a_port_that_is_taken_is_told(house: BrokerProcess, bystander: Any, place: Path) -> None:
    second = BrokerProcess(
        place, "process", process_config(), env={"CORTEX_FRONT__LISTEN": f"127.0.0.1:{house.front_port}"}
    )
    async with unnoticed(bystander):
        _, said = await start_fails(second)
    assert "front.listen" in said


# An engine that goes away


class Way:
    """Passes bytes to the real engine, until it is cut; ``hang`` takes connections and says nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.hang = False

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._pass, self.path)

    def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)
        self.drop()

    def drop(self) -> None:
        """Those that are open end."""
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        if self.hang:
            await reader.read(1)
            return
        there, back = await asyncio.open_unix_connection("/var/run/docker.sock")
        self._open.add(back)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    target.write(data)
            except OSError:
                pass
            target.transport.abort()

        await asyncio.gather(pump(reader, back), pump(there, writer))


@pytest.mark.docker
async def test_an_engine_that_goes_away_stops_new_sandboxes_only(place: Path) -> None:
    need_docker()
    way = Way(place / "way.sock")
    await way.open()
    config = f'[sandbox.docker]\nhost = "unix://{way.path}"\ncall_timeout_s = 2\n'
    async with running(place, "docker", config) as broker:
        made = await broker.session("ann")
        async with connected(made["acp_url"], made["token"], Client()) as agent:
            session = (await agent.new_session(cwd="/", mcp_servers=[])).session_id
            async with unnoticed((agent, session)):
                way.cut()
                problem = await broker.refused("POST", "/v1/sessions", {"user": "bob", "wait": "ready"})
                assert (problem["code"], problem["status"]) == ("sandbox.engine_down", 503)
                assert "systemctl start docker" in problem["hint"]
                assert "engine_down" in (await broker.api("GET", "/v1/sessions/bob/main"))["reason"]
                checks = (await broker.api("GET", "/readyz?verbose", expect=503))["checks"]
                assert "sandbox.engine_down" in checks["engine"]
                way.hang = True
                await way.open()
                problem = await broker.refused("POST", "/v1/sessions", {"user": "cid", "wait": "ready"})
                assert (problem["code"], problem["status"]) == ("sandbox.engine_timeout", 503)
                way.hang = False
                way.drop()
                assert (await broker.session("bob"))["state"] == "ready"
    way.cut()


# Sources of configuration


async def view(broker: BrokerProcess, user: str) -> dict[str, Any]:
    shown: dict[str, Any] = await broker.api("GET", f"/v1/sessions/{user}/main")
    return shown


async def shell(broker: BrokerProcess, made: dict[str, Any], command: str) -> str:
    """What a shell command prints in the sandbox of a session with the demo agent."""
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, f"!{command}")
    return client.text + "".join(str(update) for update in client.updates)


async def test_a_web_app_that_is_down_leaves_the_last_good_values_and_is_told(
    house: BrokerProcess, web_app: WebApp, bystander: Any
) -> None:
    web_app.answers["wendy"] = {"env": {"GREETING": "from-the-web-app"}}
    made = await house.session("wendy")
    assert "from-the-web-app" in await shell(house, made, "echo $GREETING")
    async with unnoticed(bystander):
        await web_app.down()
        try:
            applied = await house.api("PUT", "/v1/users/wendy/config/settings", {"allow_client_mcp": True})
            assert applied["applied"][0]["state"] == "applied"
            warnings = str((await view(house, "wendy"))["warnings"])
            assert "web app" in warnings
            await house.api("POST", "/v1/sessions/wendy/main/stop")
            made = await house.session("wendy")
            assert "from-the-web-app" in await shell(house, made, "echo $GREETING")
            stranger = await house.session("never-seen")
            assert stranger["state"] == "ready"
            assert "web app" in str((await view(house, "never-seen"))["warnings"])
        finally:
            await web_app.up()
    await house.api("PUT", "/v1/users/wendy/config/settings", {})
    assert (await view(house, "wendy"))["warnings"] == []


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("hang", "hang"),
        ("error", 500),
        ("redirect", 302),
        ("no-json", b"<html>"),
        ("deep", b"[" * 100_000),
        ("list", b"[]"),
        ("huge", b'{"env": {"A": "' + b"a" * 300_000 + b'"}}'),
        ("unknown-section", {"env": {"GREETING": "good"}, "enviroment": {}}),
        ("bad-section", {"env": {"GREETING": 7}}),
    ],
)
async def test_a_web_app_that_talks_nonsense_changes_nothing(
    house: BrokerProcess, web_app: WebApp, name: str, answer: Any
) -> None:
    user = f"web-{name}"
    web_app.answers[user] = {"env": {"GREETING": "good"}}
    await house.session(user)
    web_app.answers[user] = answer
    applied = await house.api("PUT", f"/v1/users/{user}/config/settings", {"allow_client_mcp": True})
    assert applied["applied"][0]["state"] == "applied", applied
    shown = await view(house, user)
    assert shown["warnings"], shown
    assert shown["origins"]["env"] == "http"
    assert "good" in await shell(house, await house.session(user), "echo $GREETING")


async def test_a_package_that_cannot_be_installed_is_left_out_and_told(house: BrokerProcess, bystander: Any) -> None:
    servers = {
        "mcpServers": {
            "broken": {"command": "npx", "args": ["-y", "@cortex-test/does-not-exist@1.0.0"]},
            "fine": {"command": "python3", "args": ["/vol/home/server.py", "/vol/home"]},
        }
    }
    made = await house.session("pam")
    await shell(house, made, f"echo {SERVER} | base64 -d > ~/server.py")
    async with unnoticed(bystander):
        await house.api("PUT", "/v1/users/pam/config/mcp", servers)
        async with asyncio.timeout(30):
            while "broken" not in str((shown := await view(house, "pam"))["warnings"]):
                await asyncio.sleep(0.1)
    assert "package.install_failed" in str(shown["warnings"])
    assert shown["state"] == "ready"
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "/tool fine__alpha {}")
        await turn(agent, session.session_id, "/tool broken__alpha {}")
    assert client.text.startswith("called alpha")
    assert "broken__alpha" in client.text.removeprefix("called alpha"), "there is no such tool"


# A sandbox that means ill


@asynccontextmanager
async def villain(broker: BrokerProcess, user: str) -> AsyncIterator[Any]:
    """``await do("what argument")`` has a hostile agent do it, and returns its report."""
    made = await broker.session(user, "hostile")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])

        async def do(what: str) -> Any:
            await turn(agent, session.session_id, what, 60)
            return json.loads(client.text.rpartition("REPORT")[2])

        yield do


def memory(broker: BrokerProcess) -> int:
    """Resident bytes of the broker."""
    assert broker.process is not None
    text = Path(f"/proc/{broker.process.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


@needs_bubblewrap
async def test_who_does_not_know_the_secret_is_told_nothing(house: BrokerProcess, bystander: Any) -> None:
    async with unnoticed(bystander), villain(house, "mal-1") as do:
        report = await do("strangers")
        assert set(report.values()) == {"closed"}, report
        assert (await do("break 5")) == {"done": 5}
    shown = await view(house, "mal-1")
    assert shown["state"] == "ready"
    told = [event for event in house.log_events() if event["event"] == "sandbox_violation"]
    assert told
    assert told[-1]["slot"] == shown["sandbox"]["slot"]


@needs_bubblewrap
async def test_a_sandbox_that_goes_on_breaking_rules_is_replaced(house: BrokerProcess, bystander: Any) -> None:
    async with unnoticed(bystander):
        with pytest.raises((acp.RequestError, ConnectionError, ConnectionClosed)):
            await misbehave(house, "mal-2")
        async with asyncio.timeout(10):
            while (shown := await view(house, "mal-2"))["state"] in ("ready", "stopping"):
                await asyncio.sleep(0.05)
        assert shown["state"] == "stopped"
        assert "broke the protocol" in shown["reason"]
        async with villain(house, "mal-2") as do:
            assert (await do("break 1")) == {"done": 1}


async def misbehave(broker: BrokerProcess, user: str) -> None:
    """Breaks the protocol until it is stopped."""
    async with asyncio.timeout(20), villain(broker, user) as do:
        while True:
            await do("break 20")


@needs_bubblewrap
@pytest.mark.parametrize("name", ["agent", "gateway", "egress"])
async def test_a_flood_on_a_socket_is_noticed_by_nobody_else(house: BrokerProcess, bystander: Any, name: str) -> None:
    before = memory(house)
    async with unnoticed(bystander):
        try:
            async with asyncio.timeout(20), villain(house, f"flood-{name}") as do:
                report = await do(f"flood {name} 2")
                assert report["dials"] > 50, report
        except (acp.RequestError, ConnectionError):
            assert "broke the protocol" in (await view(house, f"flood-{name}"))["reason"]
    assert memory(house) < before + 64 * 2**20
    assert (await house.session(f"flood-{name}", "hostile"))["state"] == "ready"


@needs_bubblewrap
async def test_bad_requests_to_the_gateway_have_clear_answers(house: BrokerProcess, bystander: Any) -> None:
    async with unnoticed(bystander), villain(house, "mal-http") as do:
        report = await do("http")
    statuses = {name: said.split(" ")[1] for name, said in report.items()}
    assert statuses == {
        "garbage": "400",
        "unknown provider": "404",
        "way up": "404",
        "whole url": "400",
        "giant head": "431",
        "two lengths": "400",
        "other host": "403",
        "loopback": "403",
        "metadata": "403",
        "other port": "403",
    }


@needs_bubblewrap
@pytest.mark.parametrize("deed", ["garbage", "much {session} 20000"])
async def test_an_agent_that_babbles_hurts_nobody(house: BrokerProcess, bystander: Any, deed: str) -> None:
    before = memory(house)
    async with unnoticed(bystander), villain(house, "babble") as do:
        assert await do(deed)
        assert (await do("break 1")) == {"done": 1}
    assert memory(house) < before + 96 * 2**20
    assert (await view(house, "babble"))["state"] == "ready"


def agent_server(slot: str) -> int:
    """The process that has the slot mounted and runs the agent server."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            mounts = (entry / "mountinfo").read_text()
        except OSError:
            continue
        if b"python" in command.split(b"\0")[0] and b"sandbox_agent/__main__.py" in command and slot in mounts:
            return int(entry.name)
    raise AssertionError(f"no agent server in slot {slot}")


@needs_bubblewrap
async def test_an_agent_server_that_no_longer_answers_is_replaced(place: Path) -> None:
    async with running(place, "process", "probe_interval_s = 1\n") as broker:
        made = await broker.session("ann")
        slot = (await view(broker, "ann"))["sandbox"]["slot"]
        os.kill(agent_server(slot), signal.SIGSTOP)
        async with asyncio.timeout(15):
            while (await view(broker, "ann"))["state"] == "ready":
                await asyncio.sleep(0.2)
        client = Client()
        async with connected(made["acp_url"], made["token"], client) as agent:
            session = await agent.new_session(cwd="/", mcp_servers=[])
            await turn(agent, session.session_id, "well again")
        assert "well again" in client.text
        assert (await view(broker, "ann"))["sandbox"]["slot"] != slot
