"""What the model says, told by the prompt itself. Pure.

- ``[[chunks=20 delay=50]]``: that many chunks ``w0 w1 …``, that many milliseconds apart
- ``[[tool=NAME {"json": "arguments"}]]``: a call of the tool of that name (the whole name that the
  CLI gave it, or the end of it), then, once its result came, ``tool said: RESULT``
- ``[[usage=120,40,80]]``: input, output and cached tokens that are reported
- anything else: ``heard: PROMPT``, word by word

Faults, which may stand beside the others:

- ``[[status=429]]``, ``[[status=503 retry-after=2]]``: that error; ``[[status=500 times=1]]``: so often, then no more
- ``[[hang]]``: nothing ever comes
- ``[[cut=3]]``: the connection is cut behind that many events; ``[[stall=3]]``: nothing comes behind them
- ``[[trickle=5]]``: the answer comes in small pieces, so many milliseconds apart
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_CHUNKS = re.compile(r"\[\[chunks=(?P<count>\d+)(?: delay=(?P<delay>\d+))?\]\]")
_TOOL = re.compile(r"\[\[tool=(?P<name>[^\s\]]+)\s*(?P<arguments>\{.*?\})?\s*\]\]", re.DOTALL)
_USAGE = re.compile(r"\[\[usage=(?P<input>\d+),(?P<output>\d+),(?P<cached>\d+)\]\]")
_STATUS = re.compile(r"\[\[status=(?P<status>\d{3})(?: retry-after=(?P<after>[^\s\]]+))?(?: times=(?P<times>\d+))?\]\]")
_FAULT = re.compile(r"\[\[(?P<name>cut|stall|trickle)=(?P<count>\d+)\]\]")
_HEARD = 200
"""Characters of a prompt that are said back."""


@dataclass(frozen=True)
class Tool:
    """A tool that the CLI offers. ``kind`` and ``namespace`` are the provider's."""

    name: str
    namespace: str = ""
    kind: str = "function"

    @property
    def full(self) -> str:
        return self.namespace + self.name


@dataclass(frozen=True)
class Asked:
    """A request, whatever its API: the last user text, or the result of the tool called last.
    ``runner``: a tool that runs others, which the request does not list; ``loader``: a tool by which
    those in ``deferred`` have to be loaded before they are called."""

    text: str = ""
    result: str | None = None
    tools: Sequence[Tool] = ()
    runner: Tool | None = None
    loader: Tool | None = None
    deferred: Sequence[Tool] = ()


@dataclass(frozen=True)
class Fault:
    """What goes wrong. ``times``: how often ``status`` is answered to the same prompt, 0: always."""

    prompt: str = ""
    status: int = 0
    retry_after: str = ""
    times: int = 0
    hang: bool = False
    cut: int | None = None
    stall: int | None = None
    trickle_s: float = 0.0


@dataclass(frozen=True)
class Usage:
    """Tokens; ``cached`` of ``input`` came from the provider's prompt cache."""

    input: int = 10
    output: int = 5
    cached: int = 0


@dataclass(frozen=True)
class Answer:
    """``chunks`` of text ``delay_s`` apart, or one call; ``wanted``: the tool's name as the prompt has it."""

    chunks: list[str] = field(default_factory=list)
    delay_s: float = 0.0
    tool: Tool | None = None
    wanted: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    usage: Usage = Usage()
    fault: Fault = Fault()

    @property
    def text(self) -> str:
        return "".join(self.chunks)


def words(text: str) -> list[str]:
    """``text`` in chunks of one word and the space behind it."""
    return re.findall(r"\S+\s*", text)


def answer(asked: Asked) -> Answer:
    """What is said to a request."""
    said = say(asked)
    if asked.result is not None:
        return said
    if found := _USAGE.search(asked.text):
        said = replace(said, usage=Usage(*map(int, found.groups())))
    return replace(said, fault=read_fault(asked.text))


def read_fault(text: str) -> Fault:
    """The faults that a prompt asks for."""
    fault = Fault(text, hang="[[hang]]" in text)
    if found := _STATUS.search(text):
        times = int(found["times"] or 0)
        fault = replace(fault, status=int(found["status"]), retry_after=found["after"] or "", times=times)
    counts = {found["name"]: int(found["count"]) for found in _FAULT.finditer(text)}
    return replace(fault, cut=counts.get("cut"), stall=counts.get("stall"), trickle_s=counts.get("trickle", 0) / 1000)


def say(asked: Asked) -> Answer:
    """The words, or the call."""
    if asked.result is not None:
        return Answer(words(f"tool said: {asked.result}"))
    if found := _TOOL.search(asked.text):
        tool = find_tool(asked.tools, found["name"]) or asked.runner
        later = find_tool(asked.deferred, found["name"])
        if tool is None and later and asked.loader:
            return Answer(tool=asked.loader, arguments={"query": f"select:{later.name}", "max_results": 1})
        if tool is None:
            return Answer(words(f"no tool {found['name']} among {len(asked.tools)}"))
        return Answer(tool=tool, wanted=found["name"], arguments=json.loads(found["arguments"] or "{}"))
    if found := _CHUNKS.search(asked.text):
        return Answer([f"w{number} " for number in range(int(found["count"]))], int(found["delay"] or 0) / 1000)
    return Answer(words(f"heard: {asked.text[-_HEARD:]}"))


def find_tool(tools: Sequence[Tool], name: str) -> Tool | None:
    """By its whole name, else by the end of it."""
    whole = [tool for tool in tools if name in (tool.name, tool.full)]
    return next(iter(whole), next((tool for tool in tools if tool.full.endswith(name)), None))
