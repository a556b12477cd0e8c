from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.problems import from_validation, keys_at, nearest, type_at


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int | None = None
    other: str = Field("", alias="otherName", pattern="^x+$", description="some x")


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner = Inner()
    named: dict[str, Inner] = Field({})
    many: tuple[Inner, ...] = ()


def told(value: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(value, strict=True)
    return [str(problem) for problem in from_validation(caught.value, Outer)]


def test_unknown_keys_get_the_nearest_name_at_their_place() -> None:
    assert told({"iner": {}}) == ['iner: unknown key (did you mean "inner"?)']
    assert told({"named": {"a": {"othername": "x"}}}) == ['named.a.othername: unknown key (did you mean "otherName"?)']
    assert told({"inner": {"zzz": 1}}) == ["inner.zzz: unknown key (known here: otherName, size)"]


def test_a_wrong_form_is_explained_by_the_description() -> None:
    assert told({"inner": {"otherName": "y"}}) == ["inner.otherName: has the wrong form (some x)"]


def test_values_are_never_quoted() -> None:
    assert "hunter2" not in " ".join(told({"inner": {"size": "hunter2", "otherName": "hunter2"}}))


def test_types_are_found_through_tables_lists_and_optionals() -> None:
    assert type_at(Outer, ("inner", "size")) is int
    assert type_at(Outer, ("many", "0", "size")) is int
    assert type_at(Outer, ("nope", "size")) is None
    assert keys_at(Outer, ("named", "anything")) == ["size", "otherName"]
    assert nearest("x", []) == ""
