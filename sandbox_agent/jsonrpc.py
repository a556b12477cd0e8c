"""JSON-RPC 2.0 as ACP uses it: parse, classify, stamp, errors. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
SERVER_ERROR = -32000
NOT_FOUND = -32002
"""ACP: resource not found."""
CANCELLED = -32800
"""ACP: request cancelled."""

MAX_ID = 1024
"""Longest request id, in characters."""
MAX_DEPTH = 200
"""Deepest nesting. Far from where Python gives up, so that whatever was read can be written."""
STAMP_BYTES = 128
"""More than a stamp can add to a message."""

_PARAMS = (b'"params":{', b'"params": {')


def _refuse(token: str) -> Any:
    raise ValueError(f"{token} is not JSON")


def _finite(token: str) -> float:
    number = float(token)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
_SCAN: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined]
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_ASCII = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def parse(text: bytes | str) -> Any:
    """The value in ``text`` (UTF-8). Raises ``ValueError``, also for NaN, infinity and too deep nesting."""
    if isinstance(text, bytes):
        text = text.decode()
    try:
        value = _decoded(text)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and _too_deep(value):
        raise ValueError("too deeply nested")
    return value


def _decoded(text: str) -> Any:
    try:
        value, end = _SCAN(text, 0)
    except StopIteration:
        return _DECODER.decode(text)  # white space before it, or the proper error
    return value if end == len(text) else _DECODER.decode(text)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8, one line."""
    try:
        return _COMPACT.encode(value).encode()
    except UnicodeEncodeError:  # a lone surrogate came in as an escape; it goes out as one
        return _ASCII.encode(value).encode()


def kind(message: Any) -> str:
    """``request``, ``notification`` or ``response``. Raises ``ValueError`` with the reason for anything else."""
    if isinstance(message, list):
        raise ValueError("batches are not part of ACP version 1; send one message per frame")
    if not isinstance(message, dict):
        raise ValueError("a message is a JSON object")
    if message.get("jsonrpc", "2.0") != "2.0":
        raise ValueError('jsonrpc is not "2.0"')
    if "id" in message and not is_id(message["id"]):
        raise ValueError("id is neither string, number nor null")
    method = message.get("method")
    if isinstance(method, str):
        if not isinstance(message.get("params", {}), (dict, list, type(None))):
            raise ValueError("params is neither object nor array")
        return "request" if "id" in message else "notification"
    if method is not None:
        raise ValueError("method is not a string")
    if "id" in message and (("result" in message) != ("error" in message)):
        return "response"
    raise ValueError("neither request, notification nor response")


def is_id(value: Any) -> bool:
    """May stand for an id: string, number or null, not too long."""
    if isinstance(value, str):
        return len(value) <= MAX_ID
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def error(code: int, message: str, *, slug: str = "", hint: str = "") -> dict[str, Any]:
    """An error object; ``slug`` and ``hint`` become ``data.code`` and ``data.hint``."""
    body: dict[str, Any] = {"code": code, "message": message}
    if slug:
        body["data"] = {"code": slug, "hint": hint}
    return body


def invalid(what: str, code: int = INVALID_PARAMS) -> dict[str, Any]:
    """The error for a request that its sender has to mend."""
    return error(code, what, slug="request.invalid", hint="look at the method's definition in ACP version 1")


def safe_error(value: Any) -> dict[str, Any]:
    """``value`` if it is an error object, else one that says it was not."""
    if isinstance(value, dict) and isinstance(value.get("code"), int) and isinstance(value.get("message"), str):
        return value
    return error(INTERNAL_ERROR, "the other side answered with something that is no error object")


def stamped_error(value: dict[str, Any], epoch: int, seq: int) -> dict[str, Any]:
    """The error object with ``data.cortex``; data that is no object moves to ``data.value``."""
    data = value.get("data")
    base = data if isinstance(data, dict) else {} if data is None else {"value": data}
    return {**value, "data": {**base, "cortex": {"epoch": epoch, "seq": seq}}}


def with_meta(value: dict[str, Any], epoch: int, seq: int) -> dict[str, Any]:
    """The object with ``_meta.cortex``; a ``cortex`` that was there is replaced."""
    meta = value.get("_meta")
    base = meta if isinstance(meta, dict) else {}
    return {**value, "_meta": {**base, "cortex": {"epoch": epoch, "seq": seq}}}


def response(request_id: Any, outcome: Message, epoch: int, seq: int) -> bytes:
    """A stamped response; ``outcome`` holds ``result`` or ``error``. A result that is neither
    object nor null has no place for the stamp and stays as it is."""
    body: Message = {"jsonrpc": "2.0", "id": request_id}
    if "error" in outcome:
        body["error"] = stamped_error(safe_error(outcome["error"]), epoch, seq)
        return dumps(body)
    result = outcome.get("result")
    if result is None:
        result = {}
    body["result"] = with_meta(result, epoch, seq) if isinstance(result, dict) else result
    return dumps(body)


def stamped(message: Message, epoch: int, seq: int) -> bytes:
    """A request or notification with the stamp in its params; params by position stay as they are."""
    params = message.get("params")
    if params is None:
        params = {}
    if isinstance(params, dict):
        message = {**message, "params": with_meta(params, epoch, seq)}
    return dumps(message)


def spliced(raw: bytes, message: Message, epoch: int, seq: int) -> bytes:
    """As ``stamped``, but puts the stamp into ``raw``, the text that ``message`` was parsed from.

    An unescaped ``"params":{`` in valid JSON is a key, never text; it is the outer one if only the
    outermost brace stands before it. Where that is not so the message is written anew.
    """
    params = message.get("params")
    if isinstance(params, dict) and "_meta" not in params:
        for key in _PARAMS:
            at = raw.find(key)
            if at > 0 and raw.count(b"{", 0, at) == 1 and raw.count(b'"params"') == 1:
                cut = at + len(key)
                comma = b"," if params else b""
                return b'%b"_meta":{"cortex":{"epoch":%d,"seq":%d}}%b%b' % (raw[:cut], epoch, seq, comma, raw[cut:])
    return stamped(message, epoch, seq)


def cortex_meta(params: Any) -> dict[str, Any]:
    """``params._meta.cortex`` if it is an object, else an empty one."""
    meta = params.get("_meta") if isinstance(params, dict) else None
    cortex = meta.get("cortex") if isinstance(meta, dict) else None
    return cortex if isinstance(cortex, dict) else {}


def without_cortex(params: dict[str, Any]) -> dict[str, Any]:
    """The params as the agent gets them: without ``_meta.cortex``."""
    meta = params.get("_meta")
    if not isinstance(meta, dict) or "cortex" not in meta:
        return params
    rest = {key: value for key, value in meta.items() if key != "cortex"}
    plain = {key: value for key, value in params.items() if key != "_meta"}
    return {**plain, "_meta": rest} if rest else plain
