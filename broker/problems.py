"""Turns validation errors into problems that say where, what, and which name was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. ``path``: keys from the root; ``hint`` may be ""."""

    path: tuple[str, ...]
    what: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        """For an error's ``details``: path dotted."""
        return {"path": ".".join(self.path), "what": self.what, "hint": self.hint}

    def __str__(self) -> str:
        where = ".".join(self.path)
        text = f"{where}: {self.what}" if where else self.what
        return f"{text} ({self.hint})" if self.hint else text


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the closest of ``names``, or lists them when none is close."""
    known = sorted(names)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known here: {', '.join(known)}" if known else ""


def from_validation(error: ValidationError, root: Any) -> list[Problem]:
    """The problems in ``error``; ``root`` is the type that was validated. Never quotes a value."""
    return [_problem(item, root) for item in error.errors(include_url=False, include_input=False)]


def _problem(item: Mapping[str, Any], root: Any) -> Problem:
    loc = tuple(str(part) for part in item["loc"] if part != "[key]")
    if item["type"] == "extra_forbidden":
        return Problem(loc, "unknown key", nearest(loc[-1], keys_at(root, loc[:-1])))
    what = item["msg"].removeprefix("Value error, ")
    if item["loc"] and item["loc"][-1] == "[key]":
        return Problem(loc, f"bad name: {what}")
    if item["type"] == "string_pattern_mismatch" and (meant := description_at(root, loc)):
        return Problem(loc, "has the wrong form", meant)
    return Problem(loc, what[:1].lower() + what[1:])


def keys_at(root: Any, path: Iterable[str]) -> list[str]:
    """The keys that a table at ``path`` below type ``root`` may have; [] when any or none."""
    found = type_at(root, path)
    return list(_fields(found)) if _is_model(found) else []


def description_at(root: Any, path: tuple[str, ...]) -> str:
    """What the schema says about the key at ``path``, or ""."""
    table = type_at(root, path[:-1])
    if not path or not _is_model(table):
        return ""
    for name, field in table.model_fields.items():
        if path[-1] in (name, field.alias):
            return field.description or ""
    return ""


def type_at(root: Any, path: Iterable[str]) -> Any:
    """The type at ``path`` below type ``root`` (models, dicts, sequences, optionals), or None."""
    current = _bare(root)
    for part in path:
        if _is_model(current):
            current = _fields(current).get(part)
        else:
            items = get_args(current)
            origin = get_origin(current)
            if origin is dict:
                current = items[1]
            elif origin in (list, tuple) and items:
                current = items[0]
            else:
                return None
        current = _bare(current)
    return current


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _fields(model: Any) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _bare(kind: Any) -> Any:
    while True:
        origin = get_origin(kind)
        if origin is Annotated:
            kind = get_args(kind)[0]
        elif origin in (Union, UnionType):
            options = [option for option in get_args(kind) if option is not NoneType]
            if len(options) != 1:
                return None
            kind = options[0]
        else:
            return kind
