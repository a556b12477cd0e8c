from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from broker.config import Config
from broker.errors import Code, CortexError
from broker.session.assembly import Assembler
from broker.session.sources import MAX_FILE, Answer, FilesSource, HttpSource, StoreSource, touched
from broker.store.db import Database
from broker.store.users import UserStore

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def refused(work: Awaitable[Answer]) -> CortexError:
    with pytest.raises(CortexError) as caught:
        await work
    assert caught.value.code is Code.BAD_SECTION
    assert "last good" in caught.value.hint
    return caught.value


# -- the store


async def test_the_store_answers_with_what_was_put(tmp_path: Path) -> None:
    db = await Database.open(tmp_path)
    try:
        users = UserStore(db)
        await users.put_section("ann", "env", {"A": "1"})
        await users.put_section("bob", "env", {"A": "2"})
        assert (await StoreSource(users).read("ann", None)).sections == {"env": {"A": "1"}}
        assert (await StoreSource(users).read("eve", None)).sections == {}
    finally:
        await db.close()


# -- files


def write(directory: Path, name: str, text: str | bytes) -> Path:
    path = directory / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


async def test_files_are_sections(tmp_path: Path) -> None:
    write(tmp_path, "ann/env.toml", 'A = "1"')
    write(tmp_path, "ann/limits.toml", "pids = 64")
    write(tmp_path, "ann/notes.txt", "no section")
    write(tmp_path, "ann/other.toml", "no = 'section'")
    write(tmp_path, "bob/env.toml", 'A = "2"')
    source = FilesSource(tmp_path)
    assert (await source.read("ann", None)).sections == {"env": {"A": "1"}, "limits": {"pids": 64}}
    assert (await source.read("eve", None)).sections == {}
    assert (await FilesSource(tmp_path / "none").read("ann", None)).sections == {}


@pytest.mark.parametrize(
    "text", ["A = ", b"\xff", "A = " + "[" * 20_000, "#" * (MAX_FILE + 1)], ids=["toml", "utf8", "deep", "big"]
)
async def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str | bytes) -> None:
    write(tmp_path, "ann/env.toml", text)
    assert "ann/env.toml" in (await refused(FilesSource(tmp_path).read("ann", None))).what


async def test_what_is_no_plain_file_is_not_read(tmp_path: Path) -> None:
    source = FilesSource(tmp_path)
    secret = write(tmp_path, "secret", 'A = "1"')
    path = tmp_path / "ann" / "env.toml"
    path.parent.mkdir()
    path.symlink_to(secret)
    await refused(source.read("ann", None))
    path.unlink()
    os.mkfifo(path)
    await refused(asyncio.wait_for(source.read("ann", None), 3))
    path.unlink()
    path.mkdir()
    await refused(source.read("ann", None))


def test_changed_paths_belong_to_users(tmp_path: Path) -> None:
    paths = ["bob/env.toml", "ann/mcp.toml", "ann/env.toml", "cy/env.toml~", "dan/deep/x.toml", "new"]
    assert touched(tmp_path, [tmp_path / path for path in paths]) == ["ann", "bob", "new"]


# -- the web app


class App:
    """A web app on loopback. ``handler`` answers; ``seen``: the requests."""

    def __init__(self) -> None:
        self.seen: list[web.Request] = []
        self.handler: Handler = self.nothing
        self.session: dict[str, object] = {}

    async def nothing(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=404)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request)
        return await self.handler(request)

    def config(self) -> Config:
        return Config.model_validate({"session": self.session})


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[App, HttpSource]]:
    app = App()
    web_app = web.Application()
    web_app.router.add_get("/users/{user}", app.handle)
    runner = web.AppRunner(web_app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    app.session = {"config_url": f"http://127.0.0.1:{port}/users/", "config_timeout_s": 2}
    source = HttpSource(app.config)
    try:
        yield app, source
    finally:
        await source.close()
        await runner.cleanup()


def says(body: str, status: int = 200, **headers: str) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(text=body, status=status, headers=named, content_type="application/json")

    return answer


async def test_without_a_url_nothing_is_asked() -> None:
    assert await HttpSource(Config).read("ann", None) == Answer()


async def test_the_answer_is_read_and_asked_for_again_by_its_tag(tmp_path: Path) -> None:
    async with serving() as (app, source):
        token = write(tmp_path, "token", "t0ken\n")
        app.session["config_url_token_file"] = str(token)
        app.handler = says('{"env": {"A": "1"}}', ETag='"v1"')
        first = await source.read("ann", None)
        assert first == Answer({"env": {"A": "1"}}, '"v1"')
        assert "If-None-Match" not in app.seen[0].headers
        assert app.seen[0].headers["Authorization"] == "Bearer t0ken"
        app.handler = says("", status=304)
        assert await source.read("ann", first) is first
        assert app.seen[1].headers["If-None-Match"] == '"v1"'
        app.handler = says('{"env": {}}')
        assert await source.read("ann", first) == Answer({"env": {}}, "")


@pytest.mark.parametrize("user", ["ann", "a@b.example", "x|y:z+w", "a-b_c.d"])
async def test_every_user_id_arrives_as_it_is(user: str) -> None:
    async with serving() as (app, source):
        await source.read(user, None)
        assert app.seen[0].match_info["user"] == user


async def test_a_user_that_the_web_app_does_not_know_has_nothing() -> None:
    async with serving() as (_, source):
        assert await source.read("ann", Answer({"env": {"A": "1"}}, '"v1"')) == Answer()


BAD: dict[str, Handler] = {
    "304 without a tag": says("", 304),
    "500": says("{}", 500),
    "redirect": says("", 302, Location="/users/bob"),
    "no JSON": says("{"),
    "deep": says("[" * 100_000),
    "a list": says("[1]"),
    "too big": says('{"env": {"A": "%s"}}' % ("x" * MAX_FILE)),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_answer_is_an_error_with_a_hint(name: str) -> None:
    async with serving() as (app, source):
        app.handler = BAD[name]
        await refused(source.read("ann", None))
        assert len(app.seen) == 1


async def test_an_answer_without_an_end_is_cut_off_by_size() -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while sent < 100 * MAX_FILE:
            sent += 65536
            await response.write(b" " * 65536)
        return response

    async with serving() as (app, source):
        app.handler = endless
        assert "larger than" in str(await refused(source.read("ann", None)))
        assert sent < 100 * MAX_FILE


async def test_an_answer_that_does_not_come_has_a_deadline() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async with serving() as (app, source):
        app.session["config_timeout_s"] = 0.1
        app.handler = hang
        await refused(asyncio.wait_for(source.read("ann", None), 5))


async def test_a_web_app_that_is_not_there_and_a_token_that_cannot_be_read() -> None:
    async with serving() as (app, source):
        url, app.session["config_url"] = app.session["config_url"], "http://127.0.0.1:9/users"
        await refused(source.read("ann", None))
        app.session |= {"config_url": url, "config_url_token_file": "/nonexistent/token"}
        await refused(source.read("ann", None))
        assert app.seen == []


async def test_what_was_good_stays_while_the_web_app_is_down() -> None:
    async with serving() as (app, source):
        assembler = Assembler((source,), app.config)
        app.handler = says('{"env": {"A": "1"}}', ETag='"v1"')
        good = await assembler.assemble("ann", None)
        app.handler = says("", 503)
        kept = await assembler.assemble("ann", good)
        assert kept.config.env == {"A": "1"}
        assert kept.origins["env"] == "http"
        assert "503" in kept.warnings[0]


async def test_an_answer_that_is_partly_wrong_is_complained_of_until_it_is_mended() -> None:
    async with serving() as (app, source):
        assembler = Assembler((source,), app.config)
        app.handler = says('{"env": {"A": "1"}, "limits": {"pids": 64}}', ETag='"v1"')
        last = await assembler.assemble("ann", None)

        async def conditional(request: web.Request) -> web.StreamResponse:
            if request.headers.get("If-None-Match") == '"v2"':
                return web.Response(status=304)
            return await says('{"env": {"A": 2}, "limits": {"pids": 65}}', ETag='"v2"')(request)

        app.handler = conditional
        for _ in range(3):
            last = await assembler.assemble("ann", last)
            assert last.config.env == {"A": "1"}
            assert last.config.limits.pids == 65
            assert len(last.warnings) == 1


async def test_sections_that_are_only_too_large_together_do_not_stop_the_rest() -> None:
    class Says:
        def __init__(self, name: str, sections: dict[str, object]) -> None:
            self.name = name
            self.sections = sections

        async def read(self, user: str, last: Answer | None) -> Answer:
            return Answer(self.sections)

    many = {f"A{number}": "x" for number in range(200)}
    more = {f"B{number}": "x" for number in range(200)}
    assembler = Assembler((Says("files", {"env": many}), Says("store", {"env": more, "limits": {"pids": 64}})), Config)
    result = await assembler.assemble("ann", None)
    assert result.config.env == many
    assert result.config.limits.pids == 64
    assert result.origins["env"] == "files"
    assert "store" in result.warnings[0]
