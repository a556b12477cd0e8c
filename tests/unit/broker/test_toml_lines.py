from __future__ import annotations

import json
import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from broker.toml_lines import line_of, locate

DOCUMENT = '''# head
top = 1 # [not.a.table]

[a]
x = "[b]\\" = 1"
"quoted.key" = 'it''s'
y = [
  1, # ] not the end
  "]",
]
long = """
[c]
z = 1""""
last = { inner = 1 }

[a.b . c]
k.l = true

[[list]]
one = 1
'''.replace("'it''s'", "'it'")


def test_keys_stand_on_their_lines() -> None:
    tomllib.loads(DOCUMENT)
    lines = locate(DOCUMENT)
    rows = DOCUMENT.splitlines()
    assert rows[lines[("top",)] - 1].startswith("top")
    assert rows[lines[("a", "x")] - 1].startswith("x =")
    assert rows[lines[("a", "quoted.key")] - 1].startswith('"quoted')
    assert rows[lines[("a", "y")] - 1] == "y = ["
    assert rows[lines[("a", "last")] - 1].startswith("last")
    assert rows[lines[("a", "b", "c", "k", "l")] - 1].startswith("k.l")
    assert rows[lines[("list", "one")] - 1].startswith("one")
    assert ("c",) not in lines
    assert ("a", "z") not in lines


def test_a_key_without_a_line_gets_that_of_what_is_around_it() -> None:
    lines = locate(DOCUMENT)
    assert line_of(lines, ("a", "last", "inner")) == lines[("a", "last")]
    assert line_of(lines, ("elsewhere",)) is None


VALUES = st.one_of(
    st.integers(-9, 9).map(str),
    st.text(max_size=12).map(lambda text: json.dumps(text).replace("\x7f", "\\u007f")),
    st.text(st.sampled_from("ab[]{}#=.\n "), max_size=12).map(lambda text: f"'''\n{text}'''"),
    st.text(st.sampled_from('ab[]{}#=.\n "'), max_size=12)
    .filter(lambda text: '""' not in text)
    .map(lambda text: f'"""\n{text} """'),
    st.lists(st.sampled_from(["1", '"]"', "'#'"]), max_size=3).map(lambda items: "[\n" + ", # ]\n".join(items) + "\n]"),
)
NAMES = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
TABLES = st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=4), max_size=4)


@given(TABLES)
def test_every_key_of_any_document_is_found_where_it_stands(tables: dict[str, dict[str, Any]]) -> None:
    text = ""
    wanted: dict[tuple[str, ...], int] = {}
    for table, keys in tables.items():
        wanted[(table,)] = text.count("\n") + 1
        text += f"[{table}]\n"
        for key, value in keys.items():
            wanted[(table, key)] = text.count("\n") + 1
            text += f"{key} = {value}\n"
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # a surrogate; not ours to judge
    assert locate(text) == wanted
