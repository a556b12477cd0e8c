"""Structured logs on stderr: JSON lines, or text for a terminal. Secrets never get into them.

Everything goes through one redaction, records of libraries too: values of keys that name a secret,
tokens and credentials inside of texts, the query of every URL.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.types import Processor

STARS = "[redacted]"
_SECRET_KEY = re.compile(
    r"(token|secret|passw|authorization|cookie|credential|api_?key|ticket|private_?key|signature)(?!_?(file|count|s$))",
    re.IGNORECASE,
)
_IN_TEXT = (
    (re.compile(r"(?i)\b(bearer|basic)[ .]+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {STARS}"),
    (re.compile(r"\bcx1\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+"), STARS),
    (
        re.compile(
            r"\b(whsec_|sk-|AIza|AKIA|gh[oprsu]_|github_pat_|glpat-|xox[a-z]-|ya29\.|1//0|GOCSPX-)[A-Za-z0-9_+/=-]{8,}"
        ),
        STARS,
    ),
    # JSON Web Tokens: two or three parts, the first of which begins with {".
    (re.compile(r"\beyJ[A-Za-z0-9_-]{6,}(\.[A-Za-z0-9_-]+){1,2}"), STARS),
    (re.compile(r"(?i)\b((?:https?|wss?)://)[^\s/@\"']+@"), rf"\1{STARS}@"),
    (re.compile(r"(?i)\b((?:https?|wss?)://[^\s?\"'<>]*|/[^\s?\"'<>]*)\?[^\s\"'<>]+"), rf"\1?{STARS}"),
)
_MAX_DEPTH = 6

Level = Literal["debug", "info", "warning", "error"]
_LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def setup(
    level: Level = "info",
    style: Literal["auto", "json", "text"] = "auto",
    *,
    node: str = "",
    stream: TextIO | None = None,
    env: Mapping[str, str] = os.environ,
) -> None:
    """Sends structlog's and logging's records to ``stream`` (stderr)."""
    out = stream or sys.stderr
    on_terminal = out.isatty()
    as_text = style == "text" or (style == "auto" and on_terminal)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(node),
        structlog.processors.format_exc_info,
        redact,
    ]
    renderer: Processor = structlog.processors.JSONRenderer(default=str)
    if as_text:
        renderer = structlog.dev.ConsoleRenderer(
            colors=on_terminal and not env.get("NO_COLOR"), exception_formatter=structlog.dev.plain_traceback
        )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.getLogger().handlers[:] = [handler]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    set_level(level)


def set_level(level: Level) -> None:
    """The least level that is logged from now on."""
    # Libraries at info are noise; their warnings are not.
    logging.getLogger().setLevel(max(_LEVELS[level], logging.WARNING) if level != "debug" else logging.INFO)
    logging.getLogger("broker").setLevel(_LEVELS[level])
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]))


def redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor that takes secrets out of an event."""
    for key, value in event.items():
        event[key] = _clean(key, value, 0)
    return event


def redacted(text: str) -> str:
    """``text`` without tokens, credentials and the queries of URLs."""
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _clean(key: str, value: Any, depth: int) -> Any:
    if _SECRET_KEY.search(key) and not isinstance(value, (bool, int, float, type(None))):
        return STARS
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, BaseException):
        return redacted(f"{type(value).__name__}: {value}")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if depth >= _MAX_DEPTH:
        return "…" if isinstance(value, (Mapping, list, tuple)) else value
    if isinstance(value, Mapping):
        return {str(name): _clean(str(name), item, depth + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean("", item, depth + 1) for item in value]
    return value if isinstance(value, (bool, int, float, type(None))) else redacted(str(value))


def _named(node: str) -> Processor:
    def add(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if node:
            event.setdefault("node", node)
        return event

    return add
