"""Requests for embeddings of OpenAI's shape, put together into one and its answer taken apart again. Pure.

An embedding stays as it was spelled, digit for digit; only ``index`` and ``usage`` are made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from broker.gateway.cache import canonical

MAX_BYTES = 2**20
"""Of a request that goes with others; providers bound the tokens of one request besides its inputs."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that may go with others. ``kind``: what must be equal; ``inputs``: the spelling of each input."""

    kind: bytes
    rest: dict[str, msgspec.Raw]
    inputs: tuple[bytes, ...]
    body: bytes


def read(body: bytes, max_inputs: int) -> Asked | None:
    """None: it has to go alone."""
    whole = canonical(body) if len(body) <= MAX_BYTES else None
    if whole is None or not isinstance(whole[0], dict):
        return None
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    given = fields.pop("input", None)
    if given is None or "model" not in fields or "stream" in fields:
        return None
    inputs = _inputs(bytes(given))
    if inputs is None or not 0 < len(inputs[1]) <= max_inputs:
        return None
    rest = canonical(msgspec.json.encode(fields))
    return None if rest is None else Asked(inputs[0] + rest[1], fields, inputs[1], body)


def _inputs(text: bytes) -> tuple[bytes, tuple[bytes, ...]] | None:
    """What the inputs are, and each. A list of numbers is one input: tokens."""
    value = msgspec.json.decode(text)
    if isinstance(value, str):
        return b"text", (text,)
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(each, str) for each in value):
        return b"text", tuple(map(bytes, msgspec.json.decode(text, type=list[msgspec.Raw])))
    if _tokens(value):
        return b"tokens", (text,)
    if all(isinstance(each, list) and each and _tokens(each) for each in value):
        return b"tokens", tuple(map(bytes, msgspec.json.decode(text, type=list[msgspec.Raw])))
    return None


def _tokens(values: list[object]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) for each in values)


def merged(members: Sequence[Asked]) -> bytes:
    """The one request."""
    inputs = b"[" + b",".join(text for each in members for text in each.inputs) + b"]"
    return msgspec.json.encode({**members[0].rest, "input": msgspec.Raw(inputs)})


def split(body: bytes, members: Sequence[Asked]) -> list[bytes] | None:
    """The answer of each; None: it is not an answer to all of them."""
    try:
        whole = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        data = msgspec.json.decode(whole["data"], type=list[dict[str, msgspec.Raw]])
        usage = msgspec.json.decode(whole["usage"]) if "usage" in whole else None
        by_index = {msgspec.json.decode(each["index"], type=int): each for each in data}
    except (ValueError, KeyError, RecursionError):
        return None
    total = sum(len(each.inputs) for each in members)
    if len(data) != total or set(by_index) != set(range(total)) or not isinstance(usage, dict | None):
        return None
    sizes = [sum(map(len, each.inputs)) for each in members]
    usages = _shared_usage(usage, sizes)
    answers, start = [], 0
    for asked, used in zip(members, usages, strict=True):
        mine = []
        for index in range(len(asked.inputs)):
            mine.append({**by_index[start + index], "index": index})
        start += len(asked.inputs)
        answers.append(msgspec.json.encode({**whole, "data": mine} | ({} if used is None else {"usage": used})))
    return answers


def _shared_usage(usage: dict[str, object] | None, sizes: list[int]) -> list[dict[str, object] | None]:
    """Whole numbers in proportion to ``sizes``, their sums exact; what is no number goes to each."""
    if usage is None:
        return [None] * len(sizes)
    shares: list[dict[str, object] | None] = [{} for _ in sizes]
    for key, value in usage.items():
        each: Sequence[object] = [value] * len(sizes)
        if isinstance(value, int) and not isinstance(value, bool):
            each = shared_out(value, sizes)
        elif isinstance(value, dict):
            each = _shared_usage(value, sizes)
        for share, mine in zip(shares, each, strict=True):
            assert share is not None
            share[key] = mine
    return shares


def shared_out(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` in proportion to ``sizes``, each less than 1 off; the sum is ``total``."""
    whole, given, passed, shares = sum(sizes) or 1, 0, 0, []
    for size in sizes:
        passed += size
        upto = total * passed // whole
        shares.append(upto - given)
        given = upto
    return shares
