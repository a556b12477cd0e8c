from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import Config, SandboxSettings
from broker.errors import Code, CortexError
from broker.sandbox.driver import SandboxSpec
from broker.sandbox.package_calls import parse
from broker.sandbox.packages import PackageShelf, Resolved
from broker.sandbox.shelf_files import checked_bins
from broker.sandbox.slots import Slots
from sandbox_agent.wire.messages import Build, Built
from tests.unit.broker.sandbox.box_driver import BoxDriver
from tests.unit.broker.sandbox.scripted_agent import ScriptedAgent


@dataclass(frozen=True)
class Row:
    key: str
    bins: Mapping[str, str]
    version: str


class Index:
    """The store's table of packages."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    async def get(self, spec: str) -> Row | None:
        return self.rows.get(spec)

    async def put(self, spec: str, key: str, bins: Mapping[str, str], version: str) -> None:
        self.rows[spec] = Row(key, bins, version)


class Network:
    def __init__(self) -> None:
        self.open: set[str] = set()
        self.served = 0

    async def put_builder(self, slot: str, incarnation: int, fds: tuple[int, int]) -> None:
        for fd in fds:
            os.fstat(fd)
        self.open.add(slot)
        self.served += 1

    async def drop_slot(self, slot: str) -> None:
        self.open.discard(slot)


class Rig:
    """A shelf on a real disk; ``results`` by package: what the builder says."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.slots = Slots(state, uid=os.geteuid())
        self.slots.check()
        self.driver = BoxDriver(self._script)
        self.index, self.network = Index(), Network()
        self.asked: list[Build] = []
        self.results: dict[str, Callable[[Build], Built | None]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.now = 1000.0
        self.done: asyncio.Queue[tuple[str, CortexError | None]] = asyncio.Queue()
        self.config = Config(sandbox=SandboxSettings(package_scripts=("scripted",), npm_registry="https://npm.example"))
        self.shelf = PackageShelf(
            driver=self.driver,
            slots=self.slots,
            index=self.index,
            network=self.network,
            config=lambda: self.config,
            installation_key=b"k" * 32,
            clock=lambda: self.now,
        )

    async def _script(self, agent: ScriptedAgent, spec: SandboxSpec) -> None:
        assert spec.role == "builder"
        await agent.hello()
        build = await agent.receive()
        assert isinstance(build, Build)
        self.asked.append(build)
        await self.gate.wait()
        place = spec.vol_dir / "home" / "build"
        (place / "node_modules" / ".bin").mkdir(parents=True)
        (place / "node_modules" / ".bin" / "server").write_text("#!/bin/sh\n")
        built = self.results.get(build.package, _good)(build)
        if built is not None:
            await agent.send(built)
            await agent.receive()

    async def resolve(self, *servers: dict[str, Any]) -> Resolved:
        return await self.shelf.resolve(servers, on_done=self._on_done)

    def _on_done(self, spec: str, error: CortexError | None) -> None:
        self.done.put_nowait((spec, error))

    async def wait(self) -> tuple[str, CortexError | None]:
        async with asyncio.timeout(10):
            return await self.done.get()

    def tidy(self) -> bool:
        return not (self.slots.ids() or self.network.open or self.driver.found or os.listdir(self.state / "trash"))


def _good(build: Build) -> Built:
    return Built(build.id, True, integrity="sha256-x", bins={"server": "node_modules/.bin/server"}, version="1.2.3")


def npx(*args: str, name: str = "s", **env: str) -> dict[str, Any]:
    return {
        "name": name,
        "command": "npx",
        "args": list(args),
        "env": [{"name": key, "value": value} for key, value in env.items()],
    }


@pytest.fixture
async def rig(tmp_path: Path) -> Any:
    made = Rig(tmp_path / "state")
    yield made
    await made.shelf.close()


async def test_a_package_is_installed_once_and_then_an_absolute_path(rig: Rig) -> None:
    server = npx("-y", "@scope/server@1", "--flag", TOKEN="t")
    first = await rig.resolve(server)
    assert (first.servers, first.pending, first.failed) == ([], ["npm:@scope/server@1"], {})
    assert await rig.wait() == ("npm:@scope/server@1", None)
    again = await rig.resolve(server)
    key = rig.index.rows["npm:@scope/server@1"].key
    assert again.servers == [
        {**server, "command": f"/opt/cortex/packages/{key}/node_modules/.bin/server", "args": ["--flag"]}
    ]
    assert (again.pending, again.failed) == ([], {})
    assert (rig.state / "packages" / key / "node_modules" / ".bin" / "server").is_file()
    assert len(rig.asked) == 1
    assert rig.tidy()


async def test_the_builder_is_told_registry_scripts_and_deadline(rig: Rig) -> None:
    await rig.resolve(npx("scripted@2"), npx("plain"))
    await rig.wait()
    await rig.wait()
    by_package = {build.package: build for build in rig.asked}
    assert by_package["scripted@2"].scripts is True
    assert by_package["plain"].scripts is False
    assert by_package["plain"].registry == "https://npm.example"
    assert by_package["plain"].timeout_s == rig.config.sandbox.package_timeout_s


async def test_one_install_serves_all_who_wait_and_few_run_at_once(rig: Rig) -> None:
    rig.gate.clear()
    for _ in range(3):
        resolved = await rig.resolve(*[npx(f"p{n}", name=str(n)) for n in range(5)])
        assert len(resolved.pending) == 5
    rig.gate.set()
    assert {(await rig.wait())[0] for _ in range(5)} == {f"npm:p{n}" for n in range(5)}
    assert rig.done.empty()
    assert len(rig.asked) == 5
    assert rig.driver.most_running == 2
    assert rig.tidy()


async def test_a_failed_install_is_said_and_tried_again_later_and_later(rig: Rig) -> None:
    rig.results["bad"] = lambda build: Built(build.id, False, what="404 Not Found")
    for attempt, pause in enumerate((30, 60, 120), start=1):
        assert (await rig.resolve(npx("bad"))).pending == ["npm:bad"]
        spec, error = await rig.wait()
        assert spec == "npm:bad"
        assert error is not None
        assert error.code is Code.PACKAGE_FAILED
        assert "404 Not Found" in str(error)
        rig.now += pause - 1
        held = await rig.resolve(npx("bad", name="mine"), npx("-c", "x", name="other"))
        assert (list(held.failed), [server["name"] for server in held.servers]) == (["mine"], ["other"])
        assert len(rig.asked) == attempt
        rig.now += 1
    assert rig.tidy()


@pytest.mark.parametrize(
    "bins",
    [
        {},
        {"server": "/etc/passwd"},
        {"server": "../../../../etc/passwd"},
        {"server": "node_modules/.bin/absent"},
        {"../server": "node_modules/.bin/server"},
    ],
)
async def test_a_build_without_a_proper_command_is_not_published(rig: Rig, bins: dict[str, str]) -> None:
    rig.results["odd"] = lambda build: replace(_good(build), bins=bins)
    await rig.resolve(npx("odd"))
    _, error = await rig.wait()
    assert error is not None
    assert error.code is Code.PACKAGE_FAILED
    assert os.listdir(rig.state / "packages") == []
    assert rig.tidy()


async def test_a_builder_that_dies_or_never_starts_is_a_failure_not_a_hang(rig: Rig) -> None:
    rig.results["dies"] = lambda build: None
    await rig.resolve(npx("dies"))
    _, error = await rig.wait()
    assert error is not None
    assert error.code is Code.SANDBOX_DIED
    rig.driver.down = True
    await rig.resolve(npx("other"))
    _, error = await rig.wait()
    assert error is not None
    assert error.code is Code.ENGINE_DOWN
    assert rig.network.open == set()


async def test_a_builder_that_cannot_be_removed_publishes_nothing_and_keeps_its_slot(rig: Rig) -> None:
    rig.gate.clear()
    await rig.resolve(npx("x"))
    while not rig.asked:
        await asyncio.sleep(0)
    rig.driver.stubborn.update(rig.driver.found)
    rig.gate.set()
    _, error = await rig.wait()
    assert error is not None
    assert os.listdir(rig.state / "packages") == []
    assert len(rig.slots.ids()) == 1


async def test_a_shelf_that_was_emptied_is_filled_again(rig: Rig) -> None:
    rig.index.rows["npm:x"] = Row("gone", {"x": "x"}, "1")
    assert (await rig.resolve(npx("x"))).pending == ["npm:x"]
    await rig.wait()
    assert len((await rig.resolve(npx("x"))).servers) == 1


async def test_two_packages_never_share_a_directory(rig: Rig) -> None:
    await rig.resolve(npx("a", name="a"), npx("b", name="b"))
    await rig.wait()
    await rig.wait()
    assert rig.index.rows["npm:a"].key != rig.index.rows["npm:b"].key


async def test_close_ends_installs_and_removes_their_sandboxes(rig: Rig) -> None:
    rig.gate.clear()
    await rig.resolve(npx("x"))
    while not rig.asked:
        await asyncio.sleep(0)
    await rig.shelf.close()
    assert rig.tidy()


async def test_remote_and_plain_servers_pass_as_they_are(rig: Rig) -> None:
    servers = [
        {"type": "http", "name": "h", "url": "https://x", "headers": []},
        {"name": "p", "command": "/usr/bin/thing", "args": ["npx"], "env": []},
        npx("git+https://example.com/x.git"),
        npx("./here"),
        npx("x", npm_config_registry="https://inner.example"),
    ]
    assert (await rig.resolve(*servers)).servers == servers
    assert rig.asked == []


async def test_an_unknown_command_of_a_package_says_what_there_is(rig: Rig) -> None:
    await rig.resolve(npx("-p", "x", "nonesuch"))
    await rig.wait()
    resolved = await rig.resolve(npx("-p", "x", "nonesuch"))
    assert "server" in resolved.failed["s"].hint


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ("npx", ["-y", "pkg"], ("npm:pkg", None, ())),
        ("/usr/bin/npx", ["--yes", "@s/p@1.2", "-x", "--", "y"], ("npm:@s/p@1.2", None, ("-x", "--", "y"))),
        ("npx", ["-y", "--", "pkg", "a"], ("npm:pkg", None, ("a",))),
        ("npx", ["--package=@s/p", "tool", "a"], ("npm:@s/p", "tool", ("a",))),
        ("npm", ["exec", "-y", "-p", "p", "--", "tool", "a"], ("npm:p", "tool", ("a",))),
        ("npm", ["x", "pkg", "--", "--flag"], ("npm:pkg", None, ("--flag",))),
        ("uvx", ["mcp-server-git@latest", "--repo", "x"], ("pypi:mcp-server-git", None, ("--repo", "x"))),
        ("uvx", ["--from", "pkg==1.0", "tool"], ("pypi:pkg==1.0", "tool", ())),
        ("uv", ["tool", "run", "pkg"], ("pypi:pkg", None, ())),
        ("pipx", ["run", "--spec", "pkg", "tool"], ("pypi:pkg", "tool", ())),
        ("npx", [], None),
        ("npx", ["-y"], None),
        ("npx", ["-p"], None),
        ("npx", ["-p", "a", "-p", "b", "c"], None),
        ("npx", ["-c", "rm -rf /"], None),
        ("npx", ["https://example.com/x.tgz"], None),
        ("npx", ["file:../x"], None),
        ("npx", ["user/repo"], None),
        ("npx", ["pkg@npm:other"], None),
        ("npx", ["../x"], None),
        ("./npx", ["pkg"], None),
        ("npm", ["run", "x"], None),
        ("uvx", ["--with", "evil", "pkg"], None),
        ("uvx", ["git+https://example.com/x"], None),
        ("pipx", ["run", "pkg; touch x"], None),
        ("node", ["npx"], None),
    ],
)
def test_command_lines(command: str, args: list[str], expected: tuple[str, str | None, tuple[str, ...]] | None) -> None:
    call = parse(command, args, {})
    assert (call and (call.spec, call.command, call.args)) == expected


WORDS = ["exec", "tool", "run", "-y", "-p", "--from", "--", "-", "--package=", "a", "@a/b@1", ""]


@given(
    st.sampled_from(["npx", "npm", "uvx", "uv", "pipx"]),
    st.lists(
        st.sampled_from(["exec", "tool", "run", "-y", "-p", "--from", "--", "-", "--package=", "a", "@a/b@1", ""])
    ),
)
def test_whatever_the_command_line_a_package_is_never_an_option_or_a_path(command: str, args: list[str]) -> None:
    call = parse(command, args, {})
    if call is not None:
        assert call.package
        assert call.package[0] not in "-./"
        assert list(call.args) == args[len(args) - len(call.args) :]


def test_bins_are_not_looked_up_through_links(tmp_path: Path) -> None:
    (tmp_path / "root" / "d").mkdir(parents=True)
    (tmp_path / "root" / "d" / "real").touch()
    (tmp_path / "root" / "d" / "link").symlink_to("real")
    (tmp_path / "root" / "out").symlink_to("/etc")
    bins = {"a": "d/real", "b": "d/link", "c": "out/passwd", "d": "d", "e": "d//real", "f": "d/\0"}
    assert checked_bins(tmp_path / "root", bins) == {"a": "d/real", "b": "d/link"}
    with pytest.raises(OSError):
        checked_bins(tmp_path / "root" / "out", bins)
