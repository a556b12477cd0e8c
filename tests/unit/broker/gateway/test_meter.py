"""Usage read out of answers of every shape, however they are cut."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from broker.gateway import meter as meter_module
from broker.gateway.caller import Endpoint, endpoint_of
from broker.gateway.frames import TextListener
from broker.gateway.meter import MAX_KEPT, TAIL, Meter, Usage, frame_usage
from broker.gateway.policy import Kind

SSE = b"text/event-stream; charset=utf-8"
JSON = b"application/json"
LINES = b"application/x-ndjson"


COMPRESS: dict[bytes, Callable[[bytes], bytes]] = {b"gzip": gzip.compress, b"deflate": zlib.compress}


@dataclass(frozen=True)
class Case:
    kind: Kind
    target: bytes
    type: bytes
    body: bytes
    usage: Usage
    request: bytes = b""
    status: int = 200


def sse(*events: Any, named: bool = False, end: bytes = b"\n") -> bytes:
    parts = []
    for event in events:
        name = b"event: " + event["type"].encode() + end if named else b""
        parts.append(name + b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + end * 2)
    return b"".join(parts)


def dense(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


ANTHROPIC = {"input_tokens": 7, "cache_creation_input_tokens": 100, "cache_read_input_tokens": 2000, "output_tokens": 1}
ANTHROPIC_SSE = sse(
    {"type": "message_start", "message": {"id": "m", "model": "claude-s-1", "content": [], "usage": ANTHROPIC}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": 'say "usage": {"a": 1}'}},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 12}},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn"},
        "usage": {"output_tokens": 45, "input_tokens": None},
    },
    {"type": "message_stop"},
    named=True,
)
ANTHROPIC_JSON = {
    "id": "m",
    "model": "claude-s-1",
    "content": [{"type": "tool_use", "input": {"usage": {"input_tokens": 9, "output_tokens": 9}}}],
    "usage": {**ANTHROPIC, "output_tokens": 45},
}
CLAUDE = Usage(model="claude-s-1", input=2107, output=45, cache_read=2000, cache_write=100)
RESPONSE = {
    "id": "r",
    "model": "gpt-x",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "hü"}]}],
    "tools": [{"parameters": {"properties": {"usage": {"type": "string"}}}}],
    "usage": {
        "input_tokens": 500,
        "input_tokens_details": {"cached_tokens": 384},
        "output_tokens": 60,
        "output_tokens_details": {"reasoning_tokens": 40},
        "total_tokens": 560,
    },
    "metadata": {"usage": "none"},
}
GPT = Usage(model="gpt-x", input=500, output=60, cache_read=384, reasoning=40)
CREATED = {"type": "response.created", "response": {**RESPONSE, "output": [], "usage": None}}
CHAT = {
    "prompt_tokens": 30,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 10},
    "completion_tokens_details": None,
}
GEMINI = [
    {
        "candidates": [{"content": {"parts": [{"text": "a"}]}}],
        "usageMetadata": {"promptTokenCount": 11, "totalTokenCount": 11},
    },
    {
        "candidates": [{"content": {"parts": [{"functionCall": {"name": "f", "args": {"usageMetadata": {"a": 1}}}}]}}],
        "usageMetadata": {
            "promptTokenCount": 11,
            "toolUsePromptTokenCount": 4,
            "candidatesTokenCount": 6,
            "thoughtsTokenCount": 20,
            "cachedContentTokenCount": 8,
        },
        "modelVersion": "gem-2-001",
    },
]
GEM = Usage(model="gem-2", input=15, output=26, cache_read=8, reasoning=20)
OLLAMA = [
    {"model": "qwen", "message": {"role": "assistant", "content": '"eval_count": 9'}, "done": False},
    {
        "model": "qwen",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "prompt_eval_count": 26,
        "eval_count": 298,
    },
]

NOTHING = Usage(input=0, estimated=True)

CASES = {
    "anthropic sse": Case("anthropic", b"/v1/messages?beta=true", SSE, ANTHROPIC_SSE, CLAUDE),
    "anthropic sse, crlf": Case("anthropic", b"/v1/messages", SSE, ANTHROPIC_SSE.replace(b"\n", b"\r\n"), CLAUDE),
    "anthropic json": Case("anthropic", b"/v1/messages", JSON, dense(ANTHROPIC_JSON), CLAUDE),
    "anthropic sse, broken off": Case(
        "anthropic",
        b"/v1/messages",
        SSE,
        ANTHROPIC_SSE[: ANTHROPIC_SSE.index(b"event: message_delta")],
        Usage(model="claude-s-1", input=2107, output=6, cache_read=2000, cache_write=100, estimated=True),
    ),
    "anthropic error": Case(
        "anthropic", b"/v1/messages", JSON, dense({"error": 1, "usage": ANTHROPIC}), Usage(), status=529
    ),
    "anthropic sse, broken off within an event": Case(
        "anthropic",
        b"/v1/messages",
        SSE,
        ANTHROPIC_SSE[: ANTHROPIC_SSE.index(b', "input_tokens": null')],
        Usage(model="claude-s-1", input=2107, output=12, cache_read=2000, cache_write=100),
    ),
    "count": Case("anthropic", b"/v1/messages/count_tokens", JSON, b'{"input_tokens":99}', Usage()),
    "responses sse": Case(
        "openai",
        b"/v1/responses",
        SSE,
        sse(CREATED, {"type": "response.completed", "response": RESPONSE}, named=True),
        GPT,
    ),
    "responses sse, incomplete": Case(
        "openai", b"/v1/responses", SSE, sse(CREATED, {"type": "response.incomplete", "response": RESPONSE}), GPT
    ),
    "responses json, spread out": Case("openai", b"/v1/responses", JSON, json.dumps(RESPONSE, indent=2).encode(), GPT),
    "chat sse": Case(
        "openai",
        b"/v1/chat/completions",
        SSE,
        sse(
            {"model": "gpt-y", "choices": [], "usage": None},
            {"model": "gpt-y", "choices": [], "usage": CHAT},
            b"[DONE]",
        ),
        Usage(model="gpt-y", input=30, output=5, cache_read=10),
    ),
    "chat sse, no usage asked for": Case(
        "openai",
        b"/v1/chat/completions",
        SSE,
        sse(*({"model": "gpt-y", "choices": [{"delta": {"content": word}}]} for word in ("hell", "o, you")), b"[DONE]"),
        Usage(model="gpt-y", input=7, output=2, estimated=True),
        request=b'{"stream": true, "messages":[]}',
    ),
    "responses sse, broken off": Case(
        "openai",
        b"/v1/responses",
        SSE,
        sse(CREATED, {"type": "response.output_text.delta", "delta": "x" * 40}, {"text": "x" * 40}),
        Usage(model="gpt-x", input=0, output=10, estimated=True),
    ),
    "gemini sse, filtered": Case(
        "gemini",
        b"/v1beta/models/gem-2:streamGenerateContent?alt=sse&fields=candidates",
        SSE,
        sse({"candidates": [{"content": {"parts": [{"functionCall": {"args": {"file": "x" * 40}}}]}}]}),
        Usage(model="gem-2", input=0, output=10, estimated=True),
    ),
    "gemini in another format": Case(
        "gemini",
        b"/v1beta/models/gem-2:generateContent?$alt=proto",
        b"application/x-protobuf",
        b"\n" + b"x" * 40,
        Usage(model="gem-2", input=0, output=10, estimated=True),
    ),
    "embeddings that say nothing": Case(
        "gemini",
        b"/v1beta/models/gem-e:embedContent",
        JSON,
        dense({"embedding": {"values": [0.5] * 9}}),
        Usage(model="gem-e", input=12, estimated=True),
        request=b"x" * 48,
    ),
    "chat json": Case(
        "openai",
        b"/v1/chat/completions",
        JSON,
        dense({"model": "gpt-y", "choices": [], "usage": CHAT}),
        Usage(model="gpt-y", input=30, output=5, cache_read=10),
    ),
    "embeddings": Case(
        "openai",
        b"/v1/embeddings",
        JSON,
        dense({"data": [{"embedding": [0.5] * 9}], "model": "e-3", "usage": {"prompt_tokens": 8, "total_tokens": 8}}),
        Usage(model="e-3", input=8),
    ),
    "gemini json": Case("gemini", b"/v1beta/models/gem-2:generateContent", JSON, dense(GEMINI[1]), GEM),
    "gemini sse": Case(
        "gemini", b"/v1beta/models/gem-2:streamGenerateContent?alt=sse", SSE, sse(*GEMINI, end=b"\r\n"), GEM
    ),
    "gemini array": Case(
        "gemini", b"/v1beta/models/gem-2:streamGenerateContent", JSON, json.dumps(GEMINI, indent=1).encode(), GEM
    ),
    "gemini array, broken off": Case(
        "gemini", b"/v1beta/models/gem-2:streamGenerateContent", JSON, dense(GEMINI)[:-2], GEM
    ),
    "code assist": Case(
        "gemini",
        b"/v1internal:streamGenerateContent?alt=sse",
        SSE,
        sse({"response": GEMINI[0]}, {"response": GEMINI[1], "traceId": "t"}),
        GEM,
        request=b'{"model":"gem-2","request":{}}',
    ),
    "ollama chat": Case(
        "ollama",
        b"/api/chat",
        LINES,
        b"".join(dense(line) + b"\n" for line in OLLAMA),
        Usage(model="qwen", input=26, output=298),
    ),
    "ollama generate": Case(
        "ollama",
        b"/api/generate",
        JSON,
        dense({"model": "qwen", "response": "x", "done": True, "eval_count": 3}),
        Usage(model="qwen", output=3),
    ),
    "ollama's other face": Case(
        "ollama",
        b"/v1/chat/completions",
        JSON,
        dense({"model": "qwen", "usage": CHAT}),
        Usage(model="qwen", input=30, output=5, cache_read=10),
    ),
    "nonsense": Case("openai", b"/v1/responses", SSE, b'data: {"usage": [1\n\ndata: "usage"\n\n\xff"usage"{', NOTHING),
    "wrong types": Case(
        "openai",
        b"/v1/responses",
        JSON,
        b'{"model":3,"usage":{"input_tokens":"7","output_tokens":true},"response":[1]}',
        NOTHING,
    ),
}


def read(case: Case, body: list[bytes], request: list[bytes] | None = None, *headers: tuple[bytes, bytes]) -> Usage:
    meter = Meter(case.kind, endpoint_of(b"POST", case.target), case.target)
    meter.request([case.request] if request is None else request)
    meter.head(case.status, [(b"Content-Type", case.type), *headers])
    for piece in body:
        meter.body([piece])
    return meter.finish()


def cut(text: bytes, at: list[int]) -> list[bytes]:
    places = sorted({place % (len(text) + 1) for place in at} | {0, len(text)})
    return [text[begin:end] for begin, end in pairwise(places)]


@pytest.mark.parametrize("name", CASES)
def test_usage_is_what_the_provider_says(name: str) -> None:
    case = CASES[name]
    assert read(case, [case.body]) == case.usage
    assert read(case, [bytes([byte]) for byte in case.body]) == case.usage


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 10_000), max_size=12))
def test_how_an_answer_is_cut_makes_no_difference(name: str, at: list[int]) -> None:
    case = CASES[name]
    assert read(case, cut(case.body, at)) == case.usage


@given(
    st.sampled_from(["anthropic json", "gemini sse", "ollama chat"]),
    st.lists(st.integers(0, 10_000), max_size=9),
    st.sampled_from(sorted(COMPRESS)),
)
def test_a_compressed_answer_is_read_too(name: str, at: list[int], coding: bytes) -> None:
    case = CASES[name]
    assert read(case, cut(COMPRESS[coding](case.body), at), None, (b"Content-Encoding", coding)) == case.usage


@pytest.mark.parametrize("coding", [b"br", b"zstd", b"gzip", b"deflate", b"gzip, br", b"identity"])
def test_what_cannot_be_unpacked_is_left_alone_and_known(coding: bytes) -> None:
    meter = Meter("anthropic", Endpoint.GENERATE, b"/v1/messages")
    meter.head(200, [(b"content-type", JSON), (b"content-encoding", coding)])
    meter.body([CASES["anthropic json"].body])
    assert meter.unread is (coding != b"identity")
    usage = meter.finish()
    assert usage.estimated is meter.unread
    if meter.unread:
        assert usage.output == len(CASES["anthropic json"].body) // 4


def test_an_answer_that_grows_without_end_when_unpacked_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter_module, "MAX_INFLATED", 3 * MAX_KEPT)
    case = CASES["anthropic json"]
    bomb = gzip.compress(b" " * 8 * MAX_KEPT + case.body)
    assert read(case, [bomb], None, (b"content-encoding", b"gzip")).estimated


@given(
    st.binary(max_size=300),
    st.sampled_from([SSE, JSON, LINES]),
    st.sampled_from(["anthropic", "openai", "gemini", "ollama"]),
)
def test_nothing_is_raised_whatever_comes(noise: bytes, content: bytes, kind: Kind) -> None:
    for body in (noise, b'data: {"usage":' + noise, b'{"usageMetadata":{' + noise, b'"eval_count":' + noise + b"\n"):
        meter = Meter(kind, Endpoint.GENERATE, b"/x")
        meter.request([noise])
        meter.head(200, [(b"content-type", content)])
        meter.body(cut(body, [3, 50]))
        meter.finish()


@pytest.mark.parametrize("cut_at", [10_000, MAX_KEPT + 7])
@pytest.mark.parametrize("shape", ["json", "sse"])
def test_the_end_of_a_long_answer_is_enough(shape: str, cut_at: int) -> None:
    long = {"model": "gpt-x", "output": ["x" * 3 * MAX_KEPT], "usage": RESPONSE["usage"]}
    body = dense(long) if shape == "json" else sse({"type": "response.completed", "response": long})
    case = Case("openai", b"/v1/responses", JSON if shape == "json" else SSE, body, GPT, request=b'{"model":"gpt-x"}')
    meter = Meter("openai", Endpoint.GENERATE, case.target)
    meter.request([case.request])
    meter.head(200, [(b"content-type", case.type)])
    for begin in range(0, len(body), cut_at):
        meter.body([body[begin : begin + cut_at]])
        assert meter._size <= MAX_KEPT
    assert meter.finish() == GPT


def test_the_end_of_a_long_answer_of_ollama_is_enough() -> None:
    body = dense({"model": "e", "embeddings": [[0.125] * 300_000], "prompt_eval_count": 12})
    assert len(body) > MAX_KEPT + TAIL
    case = Case("ollama", b"/api/embed", JSON, body, Usage(model="e", input=12), request=b'{"model": "e"}')
    assert read(case, cut(body, list(range(0, len(body), 5000)))) == case.usage


@pytest.mark.parametrize(
    ("request_body", "model"),
    [
        (b'{"model":"a\\u00e9b","messages":[]}', "aéb"),
        (b'{"messages":[{"x":{"model":"inner"}},"\\"model\\":\\"quoted\\""],"model" : "m"}', "m"),
        (b'{"messages":[{"x":{"model":"inner"}}]}', ""),
        (b'{"messages":"' + b"x" * 5000 + b'","model":"late"}', ""),
        (b'{"model":{"a":1}}', ""),
        (b'{"model":"' + b"m" * 300 + b'"}', "m" * 100),
        (b"\x28\xb5\x2f\xfd", ""),
    ],
)
def test_the_model_of_a_request(request_body: bytes, model: str) -> None:
    case = Case("openai", b"/v1/responses", JSON, b"{}", Usage())
    assert read(case, [], [request_body]).model == model
    assert read(case, [], [bytes([byte]) for byte in request_body]).model == model


def test_a_name_has_nothing_in_it_that_a_terminal_obeys() -> None:
    meter = Meter("openai", Endpoint.GENERATE, b"/v1/responses")
    meter.request([json.dumps({"model": "a\x1b[2Jb\x9b\u202e\n\x00 c"}).encode()])
    assert meter.finish().model == "a\ufffd[2Jb\ufffd\ufffd\ufffd\ufffd c"


@pytest.mark.parametrize("target", [b"/v1/chat/completions/", b"/v1/chat/completi%6fns", b"/v1/Chat/Completions;a"])
def test_an_odd_spelling_of_a_path_is_metered_by_its_shape(target: bytes) -> None:
    meter = Meter("ollama", endpoint_of(b"POST", target), target)
    meter.head(200, [(b"content-type", b"application/json")])
    meter.body([b'{"usage":{"prompt_tokens":7,"completion_tokens":5}}'])
    assert meter.finish().tokens == 12


def test_a_number_without_end_is_no_count() -> None:
    meter = Meter("ollama", Endpoint.GENERATE, b"/api/chat")
    meter.head(200, [(b"content-type", b"application/json")])
    meter.body([b'{"eval_count":' + b"9" * 5000 + b","])
    assert meter.finish().output is None


def test_the_word_of_the_request_goes_before_that_of_the_answer() -> None:
    assert read(CASES["anthropic sse"], [ANTHROPIC_SSE], [b'{"model":"claude-s"}']).model == "claude-s"


@pytest.mark.parametrize(
    "asked",
    [
        b'{"model":"cheap","messages":[],"model":"dear"}',
        b'{"model":"cheap","x":"' + b"y" * 9000 + b'","model":"dear"}',
        b'{"model":"cheap","mod\\u0065l":"dear"}',
        b'{"model":"dea","model":"dear"}',
    ],
)
@given(st.lists(st.integers(0, 10**4), max_size=5))
def test_a_request_that_names_two_models_is_charged_for_the_one_that_answered(asked: bytes, at: list[int]) -> None:
    case = Case("openai", b"/v1/responses", JSON, b'{"model":"dear","usage":{"input_tokens":1}}', Usage())
    assert read(case, [case.body], cut(asked, at)).model == "dear"


def test_a_request_with_the_word_in_its_tools_keeps_the_name_that_prices_know() -> None:
    asked = b'{"model":"claude-s","tools":[{"input_schema":{"properties":{"model":{"type":"string"}}}}]}'
    for answered in ("claude-s", "claude-s-20260101", "claude-s-2026-01-01"):
        body = json.dumps({"model": answered, "usage": {"input_tokens": 1}}).encode()
        case = Case("anthropic", b"/v1/messages", JSON, body, Usage())
        assert read(case, [body], [asked]).model == "claude-s"


def test_an_event_that_ends_a_turn_on_a_websocket_says_what_was_used() -> None:
    assert frame_usage(dense({"type": "response.completed", "response": RESPONSE})) == GPT
    assert frame_usage(json.dumps({"type": "response.failed", "response": {"usage": None}})) == Usage()
    assert frame_usage(dense(CREATED)) is None
    assert frame_usage(b'{"type":"response.output_text.delta","delta":"\\"type\\":\\"response.completed\\""}') is None
    assert frame_usage(b'{"type":"response.completed"') == Usage()
    assert frame_usage(b'{"type":"response.done","response":{"usage":{"input_tokens":1,"output_tokens":2}}}') == Usage(
        input=1, output=2
    )


def test_a_turn_on_a_websocket_whose_last_event_is_long_is_counted_too() -> None:
    response = {
        "instructions": "x" * MAX_KEPT,
        "usage": {"input_tokens": 9, "output_tokens": 4},
        "metadata": {"usage": "0"},
    }
    event = json.dumps({"type": "response.completed", "response": response}).encode()
    sent = Frame(Opcode.TEXT, event).serialize(mask=False)
    listener = TextListener()
    (text,) = [text for at in range(0, len(sent), 60_000) for text in listener.feed(sent[at : at + 60_000])]
    usage = frame_usage(text)
    assert usage is not None
    assert (usage.input, usage.output) == (9, 4)


def test_a_mixed_sample_adds_up_to_what_the_providers_say() -> None:
    chance = random.Random(7)
    said = metered = 0
    for _ in range(300):
        name = chance.choice(sorted(CASES))
        case = CASES[name]
        places = [chance.randrange(len(case.body)) for _ in range(chance.randrange(20))]
        metered += read(case, cut(case.body, places)).tokens or 0
        said += case.usage.tokens or 0
    assert metered == said > 0
