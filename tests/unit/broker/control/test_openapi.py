"""The OpenAPI document: complete, and sound as OpenAPI 3.1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from broker.control.openapi import document
from broker.control.table import ROUTES
from tests.unit.broker.control.conftest import Api

SCHEMA_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}


def walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for item in node.values():
            yield from walk(item)
    elif isinstance(node, list):
        for item in node:
            yield from walk(item)


async def test_the_served_document_has_every_route_of_the_application(api: Api) -> None:
    status, served = await api.call("GET", "/v1/openapi.json", headers={})
    assert status == 200
    from broker.control.api import build_app
    from broker.control.routes import CONTROL

    app = build_app(api.control)
    assert app[CONTROL] is api.control
    routes = {(r.method, r.resource.canonical) for r in app.router.routes() if r.resource and r.method != "HEAD"}
    told = {(method.upper(), path) for path, item in served["paths"].items() for method in item}
    assert routes == told
    assert len(told) == len(ROUTES)


def test_references_resolve_and_operations_are_sound() -> None:
    text = document(ROUTES)
    assert json.loads(json.dumps(text)) == text
    assert text["openapi"].startswith("3.1.")
    assert set(text["info"]) >= {"title", "version"}
    schemas = text["components"]["schemas"]
    for node in walk(text):
        if isinstance(node.get("$ref"), str):
            assert node["$ref"].removeprefix("#/components/schemas/") in schemas, node
    names = []
    for path, item in text["paths"].items():
        assert path.startswith("/")
        for method, operation in item.items():
            assert method in {"get", "put", "post", "delete"}
            names.append(operation["operationId"])
            check_operation(path, operation, text["components"]["securitySchemes"])
    assert len(names) == len(set(names))


def check_operation(path: str, operation: dict[str, Any], schemes: dict[str, Any]) -> None:
    assert operation["summary"]
    assert all(name in schemes for entry in operation["security"] for name in entry)
    named = {one["name"] for one in operation["parameters"] if one["in"] == "path"}
    assert named == set(re.findall(r"{(\w+)}", path))
    assert all(one["required"] for one in operation["parameters"] if one["in"] == "path")
    assert all("schema" in one for one in operation["parameters"])
    assert any(status.startswith("2") for status in operation["responses"])
    for status, response in operation["responses"].items():
        assert re.fullmatch(r"[2-5]\d\d", status)
        assert response["description"]
        assert all("schema" in media for media in response["content"].values())


def test_schemas_use_types_that_exist() -> None:
    for schema in document(ROUTES)["components"]["schemas"].values():
        for node in walk(schema):
            kind = node.get("type")
            if isinstance(kind, str) and "properties" not in node.get("type", ""):
                assert kind in SCHEMA_TYPES or "default" in node or kind == "about:blank"
            if isinstance(node.get("pattern"), str):
                re.compile(node["pattern"])
            if isinstance(node.get("required"), list):
                assert set(node["required"]) <= set(node.get("properties", {}))


def test_errors_are_problem_details_with_their_codes() -> None:
    create = document(ROUTES)["paths"]["/v1/sessions"]["post"]
    assert "agent.unknown" in create["responses"]["422"]["description"]
    assert "application/problem+json" in create["responses"]["422"]["content"]
    assert {"200", "201"} <= set(create["responses"])


def test_what_a_route_may_answer_follows_from_its_parts() -> None:
    paths = document(ROUTES)["paths"]
    read = paths["/v1/users/{user}/config/{section}"]["get"]["responses"]
    assert "config.unknown_section" in read["404"]["description"]
    assert "request.invalid" in paths["/v1/sessions"]["get"]["responses"]["400"]["description"]
    hook = paths["/v1/hooks/session"]["post"]["responses"]
    told = {status: hook[status]["content"]["application/json"]["schema"]["$ref"] for status in ("200", "201", "202")}
    assert [ref.rpartition("/")[2] for ref in told.values()] == ["Attachable", "Attachable", "Accepted"]


async def test_answers_hold_to_their_schemas(api: Api) -> None:
    """What is answered has every property that the document says is always there."""
    schemas = document(ROUTES)["components"]["schemas"]
    _, created = await api.call("POST", "/v1/sessions", {"user": "a"})
    _, problem = await api.call("GET", "/v1/sessions/b/main")
    for told, name in ((created, "Attachable"), (problem, "Problem")):
        assert set(told) >= set(schemas[name]["required"]) - {"detail", "details"}
