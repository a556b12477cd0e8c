"""The providers' own SDKs and curl, through the forwarder of a sandbox and the gateway process."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest
import pytest_asyncio

from broker.gateway.link import Provider
from broker.gateway.policy import CacheStore, Policy
from sandbox_agent.forward import Forwarder
from tests.e2e.providers import StandIn, stand_in
from tests.host import missing
from tests.integration.gateway.support import rig

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="module")]
KINDS = {"anthropic": "anthropic", "openai": "openai", "gemini": "gemini", "ollama": "ollama"}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
CALL = '[[tool=weather {"city": "Bonn"}]]'


@dataclass
class Place:
    """``url`` is what a sandbox has as {gateway}."""

    url: str
    providers: StandIn

    async def keys(self, provider: str) -> set[str]:
        """The credentials with which ``provider`` was asked since the last look."""
        names = ("authorization", "x-api-key", "x-goog-api-key")
        asked = await self.providers.requests(provider)
        await self.providers.forget()
        assert asked
        return {request["headers"][name] for request in asked for name in names if name in request["headers"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    async with stand_in() as providers, rig() as gateway:
        policy = Policy(kind="openai", upstreams=(f"{providers.url}/openai",), websocket=True)
        gateway.link.set_policies({"openai": policy}, CacheStore())
        table = {
            name: Provider(kind, f"{providers.url}/{name}", f"real-{name}", policy=name)  # type: ignore[arg-type]
            for name, kind in KINDS.items()
        }
        account = {"chatgpt-account-id": "acc-1"}
        url = f"{providers.url}/chatgpt"
        table["chatgpt"] = Provider("openai", url, "real-chatgpt", scheme="bearer", headers=account)
        slot = await gateway.put(table)
        listener = socket.create_server(("127.0.0.1", 0))
        forwarder = Forwarder(listener, str(slot.gateway_path))
        await forwarder.start()
        yield Place(f"http://127.0.0.1:{forwarder.port}", providers)
        await forwarder.close()


@pytest_asyncio.fixture(loop_scope="module")
async def claude(place: Place) -> AsyncIterator[anthropic.AsyncAnthropic]:
    url = f"{place.url}/anthropic"
    async with anthropic.AsyncAnthropic(base_url=url, api_key="placeholder", max_retries=2) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def gpt(place: Place) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{place.url}/openai/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="placeholder", max_retries=2) as client:
        yield client


def asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def test_anthropic_messages_whole_and_as_a_stream(place: Place, claude: anthropic.AsyncAnthropic) -> None:
    whole = await claude.messages.create(model="m", max_tokens=99, messages=asked("hello [[usage=120,40,80]]"))
    assert whole.content[0].type == "text"
    assert whole.content[0].text.startswith("heard: hello")
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.cache_read_input_tokens) == (40, 40, 80)
    async with claude.messages.stream(model="m", max_tokens=99, messages=asked("[[chunks=20 delay=1]]")) as stream:
        words = [text async for text in stream.text_stream]
        assert (await stream.get_final_message()).stop_reason == "end_turn"
    assert words == [f"w{number} " for number in range(20)]
    assert await place.keys("anthropic") == {"real-anthropic"}


async def test_anthropic_tools_counts_models_and_errors(place: Place, claude: anthropic.AsyncAnthropic) -> None:
    tools: list[Any] = [{"name": "weather", "input_schema": WEATHER}]
    called = await claude.messages.create(model="m", max_tokens=99, messages=asked(CALL), tools=tools)
    (use,) = called.content
    assert use.type == "tool_use"
    assert (called.stop_reason, use.name, use.input) == ("tool_use", "weather", {"city": "Bonn"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    messages: list[Any] = [
        *asked(CALL),
        {"role": "assistant", "content": [use.model_dump()]},
        {"role": "user", "content": [result]},
    ]
    said = await claude.messages.create(model="m", max_tokens=99, messages=messages, tools=tools)
    assert said.content[0].type == "text"
    assert said.content[0].text == "tool said: sunny"
    assert (await claude.messages.count_tokens(model="m", messages=asked("hello"))).input_tokens > 0
    assert [model.id async for model in claude.models.list()] == ["claude-opus-5-5", "claude-haiku-4-5"]
    with pytest.raises(anthropic.RateLimitError) as limited:
        await claude.with_options(max_retries=0).messages.create(
            model="m", max_tokens=9, messages=asked("[[status=429 retry-after=1]]")
        )
    assert limited.value.response.headers["retry-after"] == "1"
    retried = await claude.messages.create(model="m", max_tokens=9, messages=asked("[[status=529 times=1]] again"))
    assert retried.stop_reason == "end_turn"
    assert await place.keys("anthropic") == {"real-anthropic"}


async def test_a_stream_that_the_provider_cuts_is_an_error_for_the_sdk(claude: anthropic.AsyncAnthropic) -> None:
    words = []

    async def listen() -> None:
        async with claude.messages.stream(
            model="m", max_tokens=9, messages=asked("[[cut=6]] [[chunks=20 delay=5]]")
        ) as stream:
            async for text in stream.text_stream:
                words.append(text)

    with pytest.raises(Exception, match="incomplete chunked read"):
        await listen()
    assert 0 < len(words) < 20


async def test_openai_responses_whole_and_as_a_stream(place: Place, gpt: openai.AsyncOpenAI) -> None:
    whole = await gpt.responses.create(model="m", input="hello [[usage=120,40,80]]")
    assert whole.output_text.startswith("heard: hello")
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (120, 40)
    deltas, kinds = [], []
    async for event in await gpt.responses.create(model="m", input="[[chunks=20 delay=1]]", stream=True):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            deltas.append(event.delta)
    assert deltas == [f"w{number} " for number in range(20)]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    tools: list[Any] = [{"type": "function", "name": "weather", "parameters": WEATHER}]
    called = await gpt.responses.create(model="m", input=asked(CALL), tools=tools)
    assert called.output[0].type == "function_call"
    assert json.loads(called.output[0].arguments) == {"city": "Bonn"}
    assert await place.keys("openai") == {"Bearer real-openai"}


async def test_openai_responses_over_a_websocket(place: Place, gpt: openai.AsyncOpenAI) -> None:
    async with gpt.responses.connect() as connection:
        for prompt in ("[[chunks=20 delay=1]]", "and again"):
            await connection.response.create(model="m", input=asked(prompt))
            deltas = []
            async for event in connection:
                if event.type == "response.output_text.delta":
                    deltas.append(event.delta)
                if event.type == "response.completed":
                    break
            assert deltas[0] == ("w0 " if prompt.startswith("[") else "heard: ")
    assert {one["method"] for one in await place.providers.requests("openai")} == {"GET", "WEBSOCKET"}
    assert await place.keys("openai") == {"Bearer real-openai"}


async def test_openai_chat_embeddings_and_models(place: Place, gpt: openai.AsyncOpenAI) -> None:
    whole = await gpt.chat.completions.create(model="m", messages=asked("hello"))
    assert whole.choices[0].message.content == "heard: hello"
    words, usage = [], None
    async for chunk in await gpt.chat.completions.create(
        model="m", messages=asked("[[chunks=20 delay=1]]"), stream=True, stream_options={"include_usage": True}
    ):
        words += [choice.delta.content for choice in chunk.choices if choice.delta.content]
        usage = chunk.usage or usage
    assert words == [f"w{number} " for number in range(20)]
    assert usage is not None
    assert usage.total_tokens == 15
    made = await gpt.embeddings.create(model="e", input=["one", "two", "one"])
    assert made.data[0].embedding == made.data[2].embedding != made.data[1].embedding
    assert [each.index for each in made.data] == [0, 1, 2]
    assert [model.id async for model in gpt.models.list()] == ["gpt-5.5", "gpt-5.4-mini"]
    with pytest.raises(openai.InternalServerError):
        await gpt.with_options(max_retries=0).responses.create(model="m", input="[[status=500]]")
    assert await place.keys("openai") == {"Bearer real-openai"}


async def test_the_openai_sdk_against_ollama(place: Place) -> None:
    async with openai.AsyncOpenAI(base_url=f"{place.url}/ollama/v1", api_key="placeholder") as client:
        said = await client.chat.completions.create(model="qwen3:8b", messages=asked("hello"))
        assert said.choices[0].message.content == "heard: hello"
        made = await client.embeddings.create(model="nomic-embed-text", input="one")
        assert len(made.data[0].embedding) == 8
    assert await place.keys("ollama") == {"Bearer real-ollama"}


async def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        missing("curl is not installed")
    process = await asyncio.create_subprocess_exec(
        "curl", "--silent", "--show-error", "--max-time", "20", "--noproxy", "*", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0, out
    return out.decode()


async def test_curl(place: Place) -> None:
    hello = await curl("--head", f"{place.url}/anthropic/api/hello")
    assert hello.startswith("HTTP/1.1 200")
    body = {"model": "m", "max_tokens": 9, "stream": True, "messages": asked("one two three")}
    streamed = await curl("--no-buffer", "--json", json.dumps(body), f"{place.url}/anthropic/v1/messages")
    events = [line.removeprefix("event: ") for line in streamed.splitlines() if line.startswith("event: ")]
    assert (events[0], events[-1]) == ("message_start", "message_stop")
    contents = {"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}
    path = f"{place.url}/gemini/v1beta/models/gemini-3-pro:generateContent?key=placeholder"
    found = json.loads(await curl("--json", json.dumps(contents), path))
    assert found["candidates"][0]["content"]["parts"] == [{"text": "heard: hello"}]
    assert await place.keys("gemini") == {"real-gemini"}
    lines = await curl("--json", json.dumps({"model": "qwen3:8b", "prompt": "a b"}), f"{place.url}/ollama/api/generate")
    parts = [json.loads(line) for line in lines.splitlines()]
    assert "".join(part["response"] for part in parts) == "heard: a b"
    assert parts[-1]["done"] is True
    tags = json.loads(await curl(f"{place.url}/ollama/api/tags"))
    assert [model["name"] for model in tags["models"]] == ["qwen3:8b", "nomic-embed-text:latest"]
    wrong = await curl("--include", f"{place.url}/nobody/v1/models")
    assert wrong.startswith("HTTP/1.1 404")
    assert "anthropic, chatgpt, gemini, ollama, openai" in wrong


async def test_what_codex_asks_of_chatgpt_beside_its_model(place: Place) -> None:
    """The account is the token's, whatever the sandbox says."""
    path = f"{place.url}/chatgpt/backend-api/wham/accounts/check"
    said = json.loads(await curl("--header", "chatgpt-account-id: placeholder", path))
    assert [account["id"] for account in said["accounts"]] == ["acc-1"]
    assert await place.keys("chatgpt") == {"Bearer real-chatgpt"}
