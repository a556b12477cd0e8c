"""The OpenAPI 3.1 document, built from the route table and the models that handlers use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from broker import __version__
from broker.config import NAME, USER_ID
from broker.control.routes import ROUTE_TABLE, Route
from broker.control.schema import Problem
from broker.errors import Code
from broker.session.sections import SECTIONS

REF = "#/components/schemas/{model}"
_PATH_NAMES: dict[str, dict[str, Any]] = {
    "user": {"type": "string", "pattern": f"^{USER_ID.pattern}$"},
    "workspace": {"type": "string", "pattern": f"^{USER_ID.pattern}$"},
    "section": {"type": "string", "enum": list(SECTIONS)},
    "provider": {"type": "string", "pattern": f"^{NAME.pattern}$"},
}
_SECURITY: dict[str, list[dict[str, list[str]]]] = {"admin": [{"admin": []}], "hook": [{"hook": []}], "none": []}


async def serve(request: web.Request) -> web.Response:
    """The document of the application that is asked."""
    return web.json_response(document(request.app[ROUTE_TABLE]))


@cache
def document(routes: tuple[Route, ...]) -> dict[str, Any]:
    """OpenAPI 3.1 for ``routes``."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cortex control API",
            "version": __version__,
            "description": "Sessions, tokens and users of a Cortex broker. Errors are RFC 9457 problem details "
            "with a stable code and a hint.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {"schemas": _schemas(routes), "securitySchemes": _schemes()},
    }


def _schemas(routes: Sequence[Route]) -> dict[str, Any]:
    bodies = {(route.body, "validation") for route in routes if route.body}
    told = {model for route in routes for model in (route.answer, route.accepted) if model} | {Problem}
    answers = {(model, "serialization") for model in told}
    models = sorted(bodies | answers, key=lambda pair: pair[0].__name__)
    _, found = models_json_schema(models, ref_template=REF)  # type: ignore[arg-type]
    schemas: dict[str, Any] = found["$defs"]
    return schemas


def _schemes() -> dict[str, Any]:
    return {
        "admin": {
            "type": "http",
            "scheme": "bearer",
            "description": "The contents of control.admin_token_file; not needed on the Unix socket.",
        },
        "hook": {
            "type": "apiKey",
            "in": "header",
            "name": "webhook-signature",
            "description": "Standard Webhooks 1.0, with webhook-id and webhook-timestamp; 5 minutes of tolerance.",
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z0-9]+', '_', route.path.lower()).strip('_')}",
        "summary": route.summary,
        "security": _SECURITY[route.auth],
        "parameters": [*_path_parameters(route), *_query_parameters(route)],
        "responses": {**_good(route), **_bad(route)},
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(route.body)}}}
    return operation


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    names = re.findall(r"{(\w+)}", route.path)
    return [{"name": name, "in": "path", "required": True, "schema": _PATH_NAMES[name]} for name in names]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    properties = route.query.model_json_schema()["properties"]
    return [{"name": name, "in": "query", "required": False, "schema": kind} for name, kind in properties.items()]


def _good(route: Route) -> dict[str, Any]:
    schema = _ref(route.answer) if route.answer else {"type": "string"} if route.media.startswith("text/") else {}
    told = {str(status): schema for status in (route.status, *route.also)}
    if route.accepted:
        told["202"] = _ref(route.accepted)
    return {
        status: {"description": route.summary, "content": {route.media: {"schema": answer}}}
        for status, answer in told.items()
    }


def _bad(route: Route) -> dict[str, Any]:
    """Problem details by status; each names its codes."""
    codes = {Code.HOST_FORBIDDEN, *route.errors}
    codes |= {Code.ADMIN_REQUIRED} if route.auth == "admin" else set()
    codes |= {Code.BAD_REQUEST, Code.BODY_TOO_LARGE} if route.body else set()
    codes |= {Code.BAD_USER_ID} if "{user}" in route.path else set()
    codes |= {Code.UNKNOWN_SECTION} if "{section}" in route.path else set()
    codes |= {Code.BAD_REQUEST} if route.query else set()
    by_status: dict[str, list[str]] = {}
    for code in sorted(codes, key=lambda code: code.slug):
        by_status.setdefault(str(code.http_status), []).append(code.slug)
    content = {"application/problem+json": {"schema": _ref(Problem)}}
    return {
        status: {"description": ", ".join(slugs), "content": content} for status, slugs in sorted(by_status.items())
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}
