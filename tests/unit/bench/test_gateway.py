"""The gateway's benchmark: the stand-in provider and the clients speak HTTP right, and figures are what they say."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import gateway, gateway_rounds, lib
from bench.gateway_faults import popular
from bench.peers import http_load as load
from bench.peers import provider


class Wire:
    """What was written to a connection."""

    def __init__(self) -> None:
        self.sent = b""

    def write(self, data: bytes) -> None:
        self.sent += data


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({cut % len(data) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(at)]


def connected(side: Any) -> Any:
    side.connection_made(Wire())
    return side


def chunked(body: bytes) -> bytes:
    return b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + provider.chunk(body) + b"0\r\n\r\n"


@given(st.lists(st.integers(0, 10_000)), st.booleans())
def test_the_provider_answers_each_request_once_however_it_is_cut(cuts: list[int], in_chunks: bool) -> None:
    body = load.body(700)
    request = chunked(body) if in_chunks else load.post("/", {}, body)
    side, before = connected(provider.Provider()), provider.Provider.served
    for number in (1, 2):
        for piece in pieces(request, cuts):
            side.data_received(piece)
        assert side.transport.sent == provider.ANSWER * number
    assert provider.Provider.served == before + 2


def test_what_is_no_call_is_answered_with_the_count() -> None:
    side = connected(provider.Provider())
    side.data_received(b"GET /count HTTP/1.1\r\n\r\n")
    assert side.transport.sent.endswith(b"\r\n\r\n%d" % provider.Provider.served)


def told(side: Any) -> list[int]:
    """The numbers in the answers to GETs."""
    return [int(part.rpartition(b"\r\n\r\n")[2]) for part in side.transport.sent.split(b"HTTP/1.1 ")[1:]]


def test_the_first_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider.Provider, "first_ns", 0)
    asking, calling = connected(provider.Provider()), connected(provider.Provider())
    asking.data_received(b"GET /first HTTP/1.1\r\n\r\n")
    begin = time.monotonic_ns()
    calling.data_received(load.post("/", {}, load.body(700)))
    end = time.monotonic_ns()
    calling.data_received(load.post("/", {}, load.body(700)))
    asking.data_received(b"GET /first HTTP/1.1\r\n\r\n")
    none_yet, first = told(asking)
    assert none_yet == 0
    assert begin <= first <= end


async def test_a_stream_that_is_broken_off_is_told_once_to_those_who_wait() -> None:
    asking, gone, whole = (connected(provider.Provider()) for _ in range(3))
    early = connected(provider.Provider())
    early.data_received(b"GET /gone HTTP/1.1\r\n\r\n")
    early.connection_lost(None)
    for side in (gone, whole):
        side.data_received(load.post("/", {}, load.body(700, stream=True, model="every-50")))
        assert side._every_s == 0.05
    for number in range(1, provider.EVENTS + 1):
        whole._send(number, 0.0)
    asking.data_received(b"GET /gone HTTP/1.1\r\n\r\n")
    whole.connection_lost(None)
    assert told(asking) == told(early) == []
    begin = time.monotonic_ns()
    gone.connection_lost(None)
    assert [begin <= at <= time.monotonic_ns() for at in told(asking)] == [True]
    assert told(early) == []
    another = connected(provider.Provider())
    another.data_received(load.post("/", {}, load.body(700, stream=True)))
    another.connection_lost(None)
    assert len(told(asking)) == 1


@given(st.lists(st.integers(0, 10_000)))
def test_a_client_sees_an_answer_of_a_known_length(cuts: list[int]) -> None:
    side, ended = connected(load.Client()), []
    side.send(b"", lambda: ended.append(1))
    for piece in pieces(provider.ANSWER, cuts):
        assert not ended
        side.data_received(piece)
    assert (ended, side.seen.statuses, side.seen.errors, len(side.seen.took)) == ([1], {200: 1}, 0, 1)


def test_a_client_counts_tokens_their_age_and_reads() -> None:
    side = connected(load.Client())
    side.send(b"", lambda: None)
    for data in (
        provider.STREAM_HEAD,
        *[provider.stamped(time.monotonic_ns()) for _ in range(20)],
        provider.STREAM_END,
    ):
        side.data_received(data)
    seen = side.seen
    assert (seen.statuses, len(seen.lags), seen.reads, len(seen.first)) == ({200: 1}, 20, [22], 1)
    assert all(0 <= lag < 5 for lag in seen.lags)
    for data in provider.stamped(0), provider.STREAM_END:
        json.loads(data.partition(b"data: ")[2].partition(b"\n")[0])


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", provider.STREAM_HEAD])
def test_half_an_answer_is_an_error(data: bytes) -> None:
    side = connected(load.Client())
    side.send(b"", lambda: None)
    if data:
        side.data_received(data)
    side.connection_lost(None)
    assert (side.seen.statuses, side.seen.errors, side.seen.took) == ({0: 1}, 1, [])


def test_a_stream_without_a_token_and_a_refusal_are_errors() -> None:
    side = connected(load.Client())
    side.send(b"", lambda: None)
    side.data_received(provider.STREAM_HEAD + provider.STREAM_END)
    side.send(b"", lambda: None)
    side.data_received(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")
    assert side.seen.statuses == {0: 1, 429: 1}
    assert side.seen.errors == side.seen.calls == 2


@pytest.mark.parametrize("size", [700, 54_000, 600_000])
def test_bodies_are_json_of_their_size_and_alike_each_time(size: int) -> None:
    body = load.body(size, stream=True)
    assert abs(len(body) - size) < 60
    assert json.loads(body)["stream"] is True
    assert body == load.body(size, stream=True) != load.body(size)
    assert load.body(700, text="one") != load.body(700, text="two")


ROUND = {"700 B": (0.1, 0.2), "54 kB": (0.3, 0.9), "600 kB": (1.0, 2.0)}


def rounds(base: float, cpu: float, per_s: float) -> dict[str, list[float]]:
    """Three rounds, the last on a machine that was ten times as slow."""
    figures = {"per s": per_s, "load cpu": cpu, "stream cpu": cpu, "first p50": base, "lag p99": base, "memory": 1.0}
    for title in gateway_rounds.SIZES:
        figures |= {f"{title} p50": base, f"{title} p99": base, f"{title} cpu": cpu}
    figures |= {"load p50": base, "load p99": base, "load errors": 0.0, "streams errors": 0.0, "reads": 22.0}
    return {name: [value, value, value * 10] for name, value in figures.items()}


def test_what_is_added_is_taken_within_a_round() -> None:
    seen = {"direct": rounds(0.1, 0.0, 40_000), "cortex": rounds(0.3, 0.1, 5000), "nginx": rounds(0.2, 0.08, 20_000)}
    assert gateway_rounds.added(seen, "cortex", "54 kB p50") == pytest.approx(0.2)
    assert gateway_rounds.ratio(seen, "cortex", "stream cpu", "nginx") == pytest.approx(1.25)
    targets = gateway_rounds.targets(seen)
    assert all(target.ok for target in targets)
    assert {target.name for target in targets} >= {"54 kB: added p99", "CPU a stream over nginx's"}
    assert len(gateway_rounds.tables(seen, 3)) == 3


def test_too_few_calls_a_second_and_no_nginx_to_compare_with_are_missed_targets() -> None:
    seen = {"direct": rounds(0.1, 0.0, 40_000), "cortex": rounds(0.3, 0.1, 3999)}
    missed = [target.name for target in gateway_rounds.targets(seen) if not target.ok]
    assert missed == ["calls a second, 64 at once", "nginx is not installed"]


def test_questions_repeat_as_said() -> None:
    drawn = list(itertools.islice(popular(200), 1000))
    assert drawn == list(itertools.islice(popular(200), 1000))
    assert set(drawn) <= set(range(200))
    assert drawn.count(0) > drawn.count(1) > drawn.count(9)
    assert 1 - len(set(drawn)) / len(drawn) > 0.8, "with every answer kept, so many are hits"


def test_only_the_named_parts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def parts(report: lib.Report, **options: bool) -> dict[str, Any]:
        return {name: lambda name=name: ran.append(name) for name in ("compare", "crowd", "flood")}

    monkeypatch.setattr(gateway, "parts", parts)
    assert gateway.main(["--only", "flood", "--only", "compare"]) == 0
    assert ran == ["compare", "flood"]
