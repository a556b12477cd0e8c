"""Says on which line of a TOML document each key stands; ``tomllib`` does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SPACE = " \t\r\n"
_QUOTES = ("'", '"')


class _Scanner:
    """Walks over a document that ``tomllib`` has accepted; so it checks nothing."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[tuple[str, ...], int] = {}

    def run(self) -> dict[tuple[str, ...], int]:
        table: tuple[str, ...] = ()
        while self._skip_to_statement():
            line = self.text.count("\n", 0, self.at) + 1
            if self.text[self.at] == "[":
                self.at += 2 if self.text.startswith("[[", self.at) else 1
                table = self._keys("]")
                self._note(table, line)
                self._skip_value()
            else:
                self._note(table + self._keys("="), line)
                self._skip_value()
        return self.lines

    def _note(self, path: tuple[str, ...], line: int) -> None:
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def _skip_to_statement(self) -> bool:
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                self._skip_comment()
            elif self.text[self.at] in _SPACE:
                self.at += 1
            else:
                return True
        return False

    def _skip_comment(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _keys(self, end: str) -> tuple[str, ...]:
        """Reads a dotted key up to and with ``end``."""
        found, part = [], ""
        while self.at < len(self.text) and self.text[self.at] != end:
            char = self.text[self.at]
            if char in _QUOTES:
                start = self.at
                self._skip_string()
                part = self.text[start + 1 : self.at - 1]
            elif char == ".":
                found.append(part)
                part = ""
                self.at += 1
            else:
                part += char.strip()
                self.at += 1
        self.at += 1
        return (*found, part)

    def _skip_value(self) -> None:
        """To the end of the line on which the value ends."""
        depth = 0
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in _QUOTES:
                self._skip_string()
                continue
            if char == "#":
                self._skip_comment()
                continue
            if char == "\n" and depth <= 0:
                return
            depth += (char in "[{") - (char in "]}")
            self.at += 1

    def _skip_string(self) -> None:
        quote = self.text[self.at]
        mark = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(mark)
        while self.at < len(self.text) and not self.text.startswith(mark, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        self.at += len(mark)
        while len(mark) == 3 and self.text.startswith(quote, self.at):
            self.at += 1  # up to two quotes may stand before the closing three


def locate(text: str) -> dict[tuple[str, ...], int]:
    """Path of each table and key → its line, from 1. ``text`` is valid TOML."""
    return _Scanner(text).run()


def line_of(lines: Mapping[tuple[str, ...], int], path: Sequence[str]) -> int | None:
    """The line of ``path``, or of the nearest table or key around it."""
    for length in range(len(path), 0, -1):
        line = lines.get(tuple(path[:length]))
        if line is not None:
            return line
    return None
