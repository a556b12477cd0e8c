from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from broker.config import Config
from broker.errors import Code, CortexError
from broker.session.assembly import Assembled, Assembler
from broker.session.sources import Answer

CONFIG = Config.model_validate(
    {"session": {"config_timeout_s": 0.05}, "defaults": {"env": {"EDITOR": "vi", "PAGER": "less"}}}
)


class Says:
    """A source that answers what it was told to."""

    def __init__(self, name: str, sections: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.sections = dict(sections or {})
        self.error: CortexError | None = None
        self.hangs = False
        self.seen: list[Answer | None] = []

    async def read(self, user: str, last: Answer | None) -> Answer:
        self.seen.append(last)
        if self.hangs:
            await asyncio.Event().wait()
        if self.error:
            raise self.error
        return Answer(dict(self.sections), tag="t1")


def assembler(*sources: Says) -> Assembler:
    return Assembler(sources, lambda: CONFIG)


async def assemble(*sources: Says, last: Assembled | None = None) -> Assembled:
    return await assembler(*sources).assemble("ann", last)


async def test_defaults_alone() -> None:
    result = await assemble()
    assert result.config.env == {"EDITOR": "vi", "PAGER": "less"}
    assert result.origins["env"] == "defaults"


async def test_the_stronger_source_wins_key_by_key() -> None:
    result = await assemble(Says("files", {"env": {"EDITOR": "nano"}}), Says("store", {"env": {"EDITOR": "emacs"}}))
    assert result.config.env == {"EDITOR": "emacs", "PAGER": "less"}
    assert result.origins["env"] == "store"


async def test_sources_are_read_at_the_same_time() -> None:
    both = asyncio.Barrier(2)

    class Meets(Says):
        async def read(self, user: str, last: Answer | None) -> Answer:
            await both.wait()
            return Answer(self.sections)

    result = await assemble(Meets("files", {"env": {"A": "1"}}), Meets("http", {"env": {"B": "2"}}))
    assert result.config.env == {"EDITOR": "vi", "PAGER": "less", "A": "1", "B": "2"}
    assert result.warnings == ()


@pytest.mark.parametrize("failure", ["error", "hang"])
async def test_a_source_that_fails_keeps_its_last_good_answer_and_says_so(failure: str) -> None:
    http = Says("http", {"env": {"TEAM": "blue"}})
    good = await assemble(http)
    if failure == "error":
        http.error = CortexError(Code.BAD_SECTION, "the web app is down", hint="wait")
    else:
        http.hangs = True
    result = await assemble(http, last=good)
    assert result.config.env["TEAM"] == "blue"
    assert len(result.warnings) == 1
    assert "http" in result.warnings[0] or "web app" in result.warnings[0]


async def test_a_failed_source_without_a_last_answer_counts_as_empty() -> None:
    http = Says("http")
    http.error = CortexError(Code.BAD_SECTION, "down", hint="wait")
    result = await assemble(http, Says("store", {"env": {"A": "1"}}))
    assert result.config.env["A"] == "1"
    assert result.warnings


async def test_a_section_that_does_not_check_keeps_its_last_good_value_and_harms_no_other() -> None:
    files = Says("files", {"env": {"A": "1"}, "workspace": {"path": "here"}})
    good = await assemble(files)
    files.sections = {"env": {"A": 7}, "workspace": {"path": "there"}}
    result = await assemble(files, last=good)
    assert result.config.env["A"] == "1"
    assert result.config.workspace.path == "there"
    assert "env" in result.warnings[0]


async def test_an_unknown_section_is_a_warning_not_a_failure() -> None:
    result = await assemble(Says("http", {"colour": {"a": 1}}))
    assert "colour" in result.warnings[0]


async def test_the_tag_of_the_last_answer_is_offered_again() -> None:
    http = Says("http", {"env": {"A": "1"}})
    good = await assemble(http)
    await assemble(http, last=good)
    assert http.seen[1] is not None
    assert http.seen[1].tag == "t1"


async def test_what_has_not_changed_is_not_made_again_until_source_or_defaults_do() -> None:
    config, store = CONFIG, Says("store", {"env": {"A": "1"}})
    maker = Assembler([store], lambda: config)
    first = await maker.assemble("ann", None)
    assert await maker.assemble("ann", first) is first
    config = Config.model_validate({"defaults": {"env": {"EDITOR": "nano"}}})
    second = await maker.assemble("ann", first)
    assert second.config.env == {"EDITOR": "nano", "A": "1"}
    store.sections = {"env": {"A": "2"}}
    assert (await maker.assemble("ann", second)).config.env["A"] == "2"


async def test_what_is_dumped_is_restored_with_its_last_good_answers() -> None:
    maker = assembler(Says("http", {"env": {"A": "1"}}))
    restored = maker.restore((await maker.assemble("ann", None)).dump())
    assert restored is not None
    assert restored.config.env["A"] == "1"
    assert restored.answers["http"].tag == "t1"


@pytest.mark.parametrize("dumped", [b"", b"{}", b'{"answers": {"http": 3}}', b"\xff"])
async def test_a_damaged_dump_is_as_good_as_none(dumped: bytes) -> None:
    assert assembler(Says("http")).restore(dumped) is None
