"""URIs in what servers answer, as agents see them: a resource that is named can be read."""

from __future__ import annotations

from typing import Any

from sandbox_agent.mux_board import Board


class Content:
    """Each method takes the server and its result, and returns the result for the agent."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def called(self, server: str, result: Any) -> Any:
        """Of ``tools/call``."""
        if isinstance(result, dict) and isinstance(result.get("content"), list):
            for block in result["content"]:
                self._block(server, block)
        return result

    def prompted(self, server: str, result: Any) -> Any:
        """Of ``prompts/get``."""
        messages = result.get("messages") if isinstance(result, dict) else None
        for message in messages if isinstance(messages, list) else []:
            content = message.get("content") if isinstance(message, dict) else None
            for block in content if isinstance(content, list) else [content]:
                self._block(server, block)
        return result

    def read(self, server: str, result: Any) -> Any:
        """Of ``resources/read``."""
        contents = result.get("contents") if isinstance(result, dict) else None
        for content in contents if isinstance(contents, list) else []:
            self._public(server, content)
        return result

    def _block(self, server: str, block: Any) -> None:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "resource_link":
            self._public(server, block)
        elif kind == "resource":
            self._public(server, block.get("resource"))

    def _public(self, server: str, place: Any) -> None:
        uri = place.get("uri") if isinstance(place, dict) else None
        if isinstance(uri, str):
            place["uri"] = public = self._board.catalog.public_uri(server, uri)
            if public == uri and uri not in self._board.hints:
                self._board.hint(server, uri)
