"""What is asked of a provider, told from method and path."""

from __future__ import annotations

import pytest

from broker.gateway.caller import Caller, Endpoint, endpoint_of, model_in


@pytest.mark.parametrize(
    ("method", "target", "endpoint"),
    [
        (b"POST", b"/v1/messages?beta=true", Endpoint.GENERATE),
        (b"POST", b"/v1/messages/count_tokens", Endpoint.COUNT),
        (b"POST", b"/v1/responses", Endpoint.GENERATE),
        (b"POST", b"/v1/responses/input_tokens", Endpoint.COUNT),
        (b"POST", b"/backend-api/codex/responses", Endpoint.GENERATE),
        (b"POST", b"/v1/chat/completions", Endpoint.GENERATE),
        (b"POST", b"/v1/embeddings", Endpoint.EMBED),
        (b"POST", b"/v1beta/models/gemini-3:streamGenerateContent?alt=sse", Endpoint.GENERATE),
        (b"POST", b"/v1beta/models/gemini-3:countTokens", Endpoint.COUNT),
        (b"POST", b"/v1beta/models/e:batchEmbedContents", Endpoint.EMBED),
        (b"POST", b"/v1internal:generateContent", Endpoint.GENERATE),
        (b"POST", b"/v1internal:streamGenerateContent?alt=sse", Endpoint.GENERATE),
        (b"POST", b"/v1internal:countTokens", Endpoint.COUNT),
        (b"POST", b"/v1internal:loadCodeAssist", Endpoint.OTHER),
        (b"POST", b"/api/chat", Endpoint.GENERATE),
        (b"POST", b"/api/generate", Endpoint.GENERATE),
        (b"POST", b"/api/embed", Endpoint.EMBED),
        (b"POST", b"/v1/responses/compact", Endpoint.GENERATE),
        # However it is spelled: a server may take it for the same.
        (b"POST", b"/v1/messages/", Endpoint.GENERATE),
        (b"POST", b"/v1/messages//?beta=true", Endpoint.GENERATE),
        (b"POST", b"/v1/mess%61ges", Endpoint.GENERATE),
        (b"POST", b"/v1/messages%2F", Endpoint.GENERATE),
        (b"POST", b"/v1%2Fmessages", Endpoint.GENERATE),
        (b"POST", b"/v1/messages;v=1", Endpoint.GENERATE),
        (b"POST", b"/v1;v=1/messages", Endpoint.GENERATE),
        (b"POST", b"/v1/messages/;v=1", Endpoint.GENERATE),
        (b"POST", b"/v1/Chat/Completions", Endpoint.GENERATE),
        (b"POST", b"/v1beta/models/gemini-3%3AgenerateContent", Endpoint.GENERATE),
        (b"GET", b"/v1/models?limit=1000", Endpoint.LIST),
        (b"GET", b"/v1/models/gpt-5.5", Endpoint.LIST),
        (b"GET", b"/backend-api/codex/models?client_version=1", Endpoint.LIST),
        (b"GET", b"/api/tags", Endpoint.LIST),
        (b"GET", b"/backend-api/wham/usage", Endpoint.OTHER),
        (b"HEAD", b"/api/hello", Endpoint.OTHER),
        (b"GET", b"/v1/messages", Endpoint.OTHER),
        (b"DELETE", b"/v1/responses/resp_1", Endpoint.OTHER),
    ],
)
def test_the_endpoint_of_a_request(method: bytes, target: bytes, endpoint: Endpoint) -> None:
    assert endpoint_of(method, target) is endpoint


@pytest.mark.parametrize(
    ("target", "model"),
    [
        (b"/v1beta/models/gemini-3-pro:generateContent?alt=sse", "gemini-3-pro"),
        (b"/v1/models/gpt-5.5", "gpt-5.5"),
        (b"/v1internal:generateContent", ""),
        (b"/v1/messages", ""),
    ],
)
def test_the_model_in_a_path(target: bytes, model: str) -> None:
    assert model_in(target) == model


def test_a_caller_is_what_the_broker_said_of_the_slot() -> None:
    said = {"user": "ann", "team": "red", "workspace": "main", "session": "s", "agent": "codex"}
    assert Caller.of("slot", said) == Caller("slot", "ann", "red", "main", "codex")
    assert Caller.of("slot", {}) == Caller("slot", "")
