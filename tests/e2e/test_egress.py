"""The way out of a container without a network: what tools fetch is refused, told of, allowed, and then fetched."""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from broker.config_types import Ecosystem
from broker.session.ecosystems import HOSTS
from tests.e2e.conftest import need_docker, short_directory
from tests.e2e.harness import BrokerProcess, Client, connected, running, turn
from tests.e2e.registries import HOST, POM, Registries, registries
from tests.host import missing

pytestmark = [pytest.mark.docker, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

GET = "python3 -c 'import urllib.request; print(urllib.request.urlopen(\"%s\", timeout=20).read().decode())'"
REFUSED = f"Access to {HOST}:%s is not allowed from this sandbox (egress.denied)"


@dataclass
class World:
    """A broker, and what its sandboxes may or may not reach."""

    broker: BrokerProcess
    registries: Registries

    async def allow(self, user: str, **section: Any) -> dict[str, Any]:
        """Puts the user's section; it holds when this returns."""
        told: dict[str, Any] = await self.broker.api("PUT", f"/v1/users/{user}/config/egress", section)
        return told

    async def hosts(self, user: str) -> list[dict[str, Any]]:
        """What the user is shown. The gateway tells of it within about a second."""
        async with asyncio.timeout(20):
            while not (found := (await self.broker.api("GET", f"/v1/users/{user}/egress"))["hosts"]):
                await asyncio.sleep(0.05)
        rows: list[dict[str, Any]] = found
        return rows

    @asynccontextmanager
    async def shell(self, user: str, agent: str = "demo") -> AsyncIterator[Shell]:
        """A sandbox of the user's."""
        made = await self.broker.session(user, agent)
        client = Client()
        async with connected(made["acp_url"], made["token"], client) as connection:
            session = await connection.new_session(cwd="/", mcp_servers=[])
            yield Shell(connection, session.session_id, client)


class Shell:
    """A shell inside."""

    def __init__(self, agent: Any, session: str, client: Client) -> None:
        self._agent, self._session, self._client = agent, session, client

    async def run(self, command: str) -> str:
        """What it prints, errors included."""
        self._client.updates.clear()
        await turn(self._agent, self._session, f"!{command} 2>&1")
        return self._client.text.strip()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    need_docker()
    with short_directory() as directory:
        async with registries(directory / "registries") as served:
            config = f"""
ca_file = "{served.ca}"
[gateway]
private_hosts = {json.dumps([HOST, *HOSTS["python"], *HOSTS["node"]])}
[agents.stocked]
command = ["{{python}}", "-I", "-S", "{{sandbox_agent}}/demo.py"]
egress_hosts = ["{HOST}:{served.tls}"]
egress_ecosystems = ["python", "git"]
"""
            async with running(directory, "docker", config) as broker:
                yield World(broker, served)


TOOLS = {
    "git": ("git clone -q {url}/git/tiny.git /tmp/t && cat /tmp/t/README", "a tiny repository", "response 403"),
    "pip": (
        "python3 -m pip install --no-cache-dir --retries 1 --disable-pip-version-check --index-url {url}/simple/ "
        "--target /tmp/t tiny && PYTHONPATH=/tmp/t python3 -c 'import tiny; print(tiny.said)'",
        "a tiny wheel",
        REFUSED,
    ),
    "npm": (
        "npm install --no-audit --no-fund --fetch-retries 0 --cache /tmp/c --prefix /tmp/t --registry {url}/npm/ tiny "
        "&& cat /tmp/t/node_modules/tiny/said",
        "a tiny package",
        REFUSED,
    ),
    "cargo": (GET % "{url}/cargo/ti/ny/tiny", '"vers": "1.0.0"', REFUSED),
    "maven": (GET % "{url}/maven/org/tiny/tiny/1.0/tiny-1.0.pom", POM, REFUSED),
}


@pytest.mark.parametrize("tool", TOOLS)
async def test_a_tool_is_refused_and_after_the_line_that_is_shown_it_works(world: World, tool: str) -> None:
    command, works, refused = TOOLS[tool]
    command = command.replace("{url}", world.registries.url)
    user, port = f"ann-{tool}", world.registries.tls
    async with world.shell(user) as shell:
        said = await shell.run(command)
        assert refused.replace("%s", str(port)) in said
        assert works not in said
        (shown,) = await world.hosts(user)
        assert (shown["host"], shown["port"], shown["last"], shown["allowed"]) == (HOST, port, "denied", 0)
        assert shown["tool"] == {"git": "git", "npm": "npm"}.get(tool, "")
        (warning,) = (await world.broker.api("GET", f"/v1/sessions/{user}/main"))["warnings"]
        assert f"wanted {HOST}:{port}: denied; allow it with: {shown['allow']}" in warning
        section = json.loads(shlex.split(shown["allow"])[1])
        told = await world.allow(user, **section)
        assert told["effect"] == "now", "the sandbox that runs has it"
        assert works in await shell.run(command)
        assert (await world.broker.api("GET", f"/v1/sessions/{user}/main"))["warnings"] == []
        async with asyncio.timeout(20):
            while not (shown := (await world.hosts(user))[0])["allowed"]:
                await asyncio.sleep(0.05)
        assert shown["received"] > len(works)
        assert shown["allow"] == ""
        await world.allow(user)
        assert refused.replace("%s", str(port)) in await shell.run(command.replace("/tmp/t", "/tmp/u"))


@pytest.mark.parametrize(
    ("ecosystem", "command", "works"),
    [
        ("python", "python3 -m pip install --no-cache-dir --target /tmp/t idna", "Successfully installed idna"),
        ("node", "npm install --no-audit --no-fund --cache /tmp/c --prefix /tmp/t is-odd", "added "),
    ],
)
async def test_a_ready_made_list_is_enough_for_a_real_registry(
    world: World, ecosystem: Ecosystem, command: str, works: str
) -> None:
    try:
        socket.create_connection((HOSTS[ecosystem][0], 443), 10).close()
    except OSError as error:
        missing(f"the registry cannot be reached from here: {error}")
    user = f"gil-{ecosystem}"
    async with world.shell(user) as shell:
        assert works not in await shell.run(command)
        await world.allow(user, ecosystems=[ecosystem])
        # The stand-ins' certificate is all that the sandbox trusts otherwise.
        trust = "PIP_CERT NODE_EXTRA_CA_CERTS SSL_CERT_FILE REQUESTS_CA_BUNDLE"
        system = " ".join(f"{name}=/etc/ssl/certs/ca-certificates.crt" for name in trust.split())
        assert works in await shell.run(f"env {system} {command}")


async def test_what_an_agents_settings_allow_needs_nothing_of_the_user(world: World) -> None:
    async with world.shell("bea", "stocked") as shell:
        assert POM in await shell.run(GET % f"{world.registries.url}/maven/org/tiny/tiny/1.0/tiny-1.0.pom")


async def test_plain_http_needs_its_port_listed(world: World) -> None:
    command = GET % f"http://{HOST}:{world.registries.plain}/maven/org/tiny/tiny/1.0/tiny-1.0.pom"
    async with world.shell("cid") as shell:
        await world.allow("cid", hosts=[HOST, f"{HOST}:{world.registries.tls}"])
        assert "HTTP Error 403" in await shell.run(command)
        await world.allow("cid", hosts=[f"{HOST}:{world.registries.plain}"])
        assert POM in await shell.run(command)


async def test_a_private_address_is_refused_though_its_host_is_listed(world: World) -> None:
    async with world.shell("dan") as shell:
        await world.allow("dan", hosts=["127.0.0.3:8443", "localhost:8443"])
        said = await shell.run(GET % "https://127.0.0.3:8443/")
        assert "127.0.0.3 leads to an address that sandboxes may not reach (egress.address_refused)" in said
        (shown,) = await world.hosts("dan")
        assert (shown["last"], shown["refused_address"], shown["allow"]) == ("refused_address", 1, "")


async def test_it_is_counted(world: World) -> None:
    async with world.shell("eve") as shell:
        await shell.run(GET % "https://elsewhere.example/")
        await world.hosts("eve")
    assert await world.broker.metric('cortex_egress_decisions_total{result="denied"}') >= 1


async def test_tools_with_settings_of_their_own_are_led_there_too(world: World) -> None:
    async with world.shell("fay") as shell:
        said = await shell.run("env")
    env = dict(line.partition("=")[::2] for line in said.splitlines() if "=" in line)
    proxy = env["HTTPS_PROXY"]
    assert f"-Dhttps.proxyPort={proxy.rpartition(':')[2]}" in env["JAVA_TOOL_OPTIONS"]
    assert {env[name] for name in ("CARGO_HTTP_PROXY", "YARN_HTTPS_PROXY", "npm_config_https_proxy")} == {proxy}
