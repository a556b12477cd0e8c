"""What handlers take from a request and how they answer."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from broker.access import check_user_id
from broker.control.routes import control
from broker.errors import Code, CortexError
from broker.problems import from_validation

M = TypeVar("M", bound=BaseModel)

BODY_TIMEOUT_S = 30.0
"""How long a request's body may take to arrive."""


def answer(model: BaseModel, status: int = 200) -> web.Response:
    """A model as a JSON response."""
    text = model.model_dump_json(exclude_none=False)
    return web.Response(
        text=text, status=status, content_type="application/json", headers={"Cache-Control": "no-store"}
    )


async def raw_body(request: web.Request) -> bytes:
    """The body, bounded in size and time. Raises ``BODY_TOO_LARGE`` or ``BAD_REQUEST``."""
    limit = control(request).config().control.max_body_bytes
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError as error:
        raise CortexError(
            Code.BAD_REQUEST, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s", hint="send it at once"
        ) from error
    except (web.RequestPayloadError, ConnectionError, ValueError) as error:
        raise CortexError(Code.BAD_REQUEST, "the body could not be read", hint="send it whole", cause=error) from error
    return bytes(body)


async def body(request: web.Request, model: type[M]) -> M:
    """The JSON body as ``model``; an absent one counts as ``{}``. Raises ``BAD_REQUEST``."""
    return parse(await raw_body(request) or b"{}", model)


def parse(text: bytes, model: type[M]) -> M:
    """JSON text as ``model``. Raises ``BAD_REQUEST`` that names what is wrong and never quotes a value."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise _bad_request(error, model) from error


def query(request: web.Request, model: type[M]) -> M:
    """The query string as ``model``. Raises ``BAD_REQUEST``."""
    values: dict[str, Any] = dict(request.query)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _bad_request(error, model) from error


def user_of(request: web.Request) -> str:
    """The user in the path. Raises ``BAD_USER_ID``."""
    return check_user_id(request.match_info["user"])


def workspace_of(request: web.Request) -> str:
    """The workspace in the path. Raises ``BAD_USER_ID``."""
    return check_user_id(request.match_info["workspace"], "workspace name")


def _bad_request(error: ValidationError, model: type[BaseModel]) -> CortexError:
    found = from_validation(error, model)
    bad_id = next((item for item in found if item.path in (("user",), ("workspace",)) and "match" in item.what), None)
    if bad_id is not None:
        return CortexError(
            Code.BAD_USER_ID,
            f"{bad_id.path[0]} is not valid",
            hint="use 1 to 128 letters, digits and . _ @ + : | -, beginning with a letter or digit",
        )
    # A misspelt key is also a missing one; the problem that names the right spelling helps more.
    told = next((item for item in found if item.hint), found[0])
    return CortexError(
        Code.BAD_REQUEST,
        f"the request is not valid: {told}",
        hint=told.hint or "see /v1/openapi.json",
        details={"problems": [item.as_dict() for item in found]},
    )


def _too_large(limit: int) -> CortexError:
    return CortexError(
        Code.BODY_TOO_LARGE,
        f"the body is over {limit} bytes",
        hint="send less, or raise control.max_body_bytes",
        details={"limit": limit},
    )
