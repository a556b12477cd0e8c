"""A JVM and Maven, which know nothing of the usual proxy variables, go through a real gateway."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.gateway.link import Egress
from sandbox_agent.boot import listen
from sandbox_agent.forward import Forwarder
from sandbox_agent.spawn import Surroundings
from tests.e2e.registries import POM, Registries, registries
from tests.host import missing
from tests.integration.gateway.support import Rig, rig

pytestmark = pytest.mark.skipif(
    None in (shutil.which("java"), shutil.which("keytool")), reason="no JDK is installed; the image has none either"
)
PROGRAM = """
import java.net.*;
class Get {
    public static void main(String[] args) throws Exception {
        System.out.write(new URL(args[0]).openStream().readAllBytes());
        System.out.flush();
    }
}
"""
PROJECT = """
<project>
  <modelVersion>4.0.0</modelVersion>
  <parent><groupId>org.tiny</groupId><artifactId>parent</artifactId><version>1.0</version><relativePath/></parent>
  <artifactId>child</artifactId><packaging>pom</packaging>
  <repositories><repository><id>central</id><url>{url}/maven</url></repository></repositories>
</project>
"""


class World:
    """What is outside, the gateway, and the environment of a sandbox's processes."""

    def __init__(self, served: Registries, gateway: Rig, env: dict[str, str], home: Path) -> None:
        self.served = served
        self.gateway = gateway
        self.env = env
        self.home = home

    async def allow(self, *hosts: str) -> None:
        await self.gateway.put(egress=Egress(hosts, (self.served.host,)))

    async def run(self, *command: str) -> tuple[int, str]:
        """Exit status and output."""
        process = await asyncio.create_subprocess_exec(
            *command, env=self.env, cwd=self.home, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        async with asyncio.timeout(90):
            out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode()


def own_address() -> str:
    """One that is not loopback's: a JVM asks no proxy for 127.0.0.0/8, whatever it is told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            missing("this host has no address but loopback's")
        address: str = probe.getsockname()[0]
        return address


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with registries(tmp_path / "registries", own_address()) as served, rig() as gateway:
        slot = await gateway.put(egress=Egress())
        listener = listen(0)
        forwarder = Forwarder(listener, str(slot.egress_path))
        await forwarder.start()
        home = tmp_path / "home"
        home.mkdir()
        around = Surroundings(
            home=str(home), gateway_port=1, egress_port=forwarder.port, python=sys.executable, package=""
        )
        trust = home / "trust.p12"
        store = f"-Djavax.net.ssl.trustStore={trust} -Djavax.net.ssl.trustStorePassword=changeit"
        given = {"JAVA_TOOL_OPTIONS": f"{store} -Duser.home={home}"}
        made = World(served, gateway, around.environment_with(given), home)
        secret = ("-storepass", "changeit", "-noprompt", "-keystore", str(trust), "-storetype", "PKCS12")
        status, said = await made.run("keytool", "-importcert", "-file", str(served.ca), "-alias", "tiny", *secret)
        assert status == 0, said
        yield made
        await forwarder.close()


async def test_a_jvm(world: World) -> None:
    (world.home / "Get.java").write_text(PROGRAM)
    asked = f"{world.served.url}/maven/org/tiny/tiny/1.0/tiny-1.0.pom"
    status, said = await world.run("java", "Get.java", asked)
    assert status != 0
    assert (
        f"403 Access to {world.served.host}:{world.served.tls} is not allowed from this sandbox (egress.denied)" in said
    )
    await world.allow(f"{world.served.host}:{world.served.tls}")
    status, said = await world.run("java", "Get.java", asked)
    assert (status, POM in said) == (0, True), said


@pytest.mark.skipif(shutil.which("mvn") is None, reason="Maven is not installed")
async def test_maven(world: World) -> None:
    (world.home / "pom.xml").write_text(PROJECT.format(url=world.served.url))
    command = (
        "mvn",
        "-B",
        "-U",
        "-Dstyle.color=never",
        f"-Dmaven.repo.local={os.fspath(world.home / 'repo')}",
        "validate",
    )
    status, said = await world.run(*command)
    assert status != 0
    assert "Non-resolvable parent POM" in said
    await world.allow(f"{world.served.host}:{world.served.tls}")
    status, said = await world.run(*command)
    assert (status, "BUILD SUCCESS" in said) == (0, True), said
