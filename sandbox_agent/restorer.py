"""Brings a conversation back into an agent process that does not have it, without clients noticing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sandbox_agent import choices, records
from sandbox_agent.agent_side import AgentSide, failed, is_session_id
from sandbox_agent.conversations import Conversation, Conversations, WhenLive
from sandbox_agent.jsonrpc import Message
from sandbox_agent.outbox import Outbox
from sandbox_agent.servers import McpServers
from sandbox_agent.settings import AgentSettings
from sandbox_agent.tasks import log

FENCE = "_cortex/fence"
"""Asked after ``session/load``; any answer will do. Some agents (Gemini CLI 0.61) send the replay only
after they have answered the load; what comes before this is answered is still replay."""
FENCE_S = 2.0


class Restorer:
    """``session/resume`` where the agent can, else ``session/load`` (its replay goes to nobody), else a new
    agent session under the old id. ``on_lost`` hears of the last case: the agent remembers nothing then."""

    def __init__(
        self,
        *,
        agent: AgentSide,
        outbox: Outbox,
        conversations: Conversations,
        settings: AgentSettings,
        servers: McpServers,
        on_lost: Callable[[Conversation], None],
        on_made: Callable[[], None],
    ) -> None:
        self.making = 0
        """Calls under way that will name a session."""
        self._on_made = on_made
        self._agent = agent
        self._outbox = outbox
        self._conversations = conversations
        self._settings = settings
        self._servers = servers
        self._on_lost = on_lost

    def ensure(self, conversation: Conversation, then: WhenLive) -> None:
        """Calls ``then`` when the agent has the conversation (at once if it does), or with the error."""
        if conversation.live:
            then(None)
            return
        conversation.when_live.append(then)
        if conversation.restoring:
            return
        conversation.restoring = True
        if conversation.refreshing and self._agent.can("close"):
            params = {"sessionId": conversation.agent_id}
            self._agent.call("session/close", params, lambda reply: self._closed(conversation, reply))
        else:
            self._reopen(conversation)

    def _closed(self, conversation: Conversation, reply: Message) -> None:
        """Agents that have it open may go on with the MCP servers it has (codex-acp 2.6 does)."""
        if not conversation.restoring or not self._agent.ready:
            return
        conversation.refreshing = "error" in reply
        if conversation.blank and not conversation.refreshing:
            self._anew(conversation, lost=False)
        else:
            self._reopen(conversation)

    def _reopen(self, conversation: Conversation) -> None:
        if not conversation.agent_id:
            self._anew(conversation)
        elif self._agent.can("resume"):
            self._ask(conversation, "session/resume")
        elif self._agent.can("loadSession"):
            conversation.quiet = True
            self._ask(conversation, "session/load")
        else:
            self._anew(conversation)

    def refresh(self, conversation: Conversation, *, for_turn: bool = False) -> None:
        """Lets ``ensure`` open it again where the configured MCP servers have changed since it was opened;
        before a turn only for those that are to come with it."""
        stale = self._servers.stale(conversation.opened)
        idle = conversation.live and not conversation.restoring and not (conversation.turn and conversation.turn.call)
        if idle and self._agent.reopens and (stale == "next_turn" if for_turn else stale):
            conversation.live, conversation.refreshing = False, True

    def _ask(self, conversation: Conversation, method: str) -> None:
        params = {"sessionId": conversation.agent_id, **self._place(conversation)}
        self._agent.call(method, params, lambda reply: self._asked(conversation, reply))

    def _asked(self, conversation: Conversation, reply: Message) -> None:
        if not conversation.restoring:
            return
        if "error" in reply and conversation.refreshing and self._agent.ready:
            self._done(conversation, {"result": None})
        elif "error" in reply and self._agent.ready:
            log.warning("the agent could not restore a conversation: %s", str(reply["error"])[:300])
            self._anew(conversation)
        elif conversation.quiet and "error" not in reply:
            self._agent.call(FENCE, {}, lambda fence: self._fenced(conversation, reply, fence), within_s=FENCE_S)
        else:
            self._chosen(conversation, reply)

    def _fenced(self, conversation: Conversation, reply: Message, fence: Message) -> None:
        if conversation.restoring:
            self._chosen(conversation, reply if self._agent.ready else fence)  # not ready: it died meanwhile

    def _anew(self, conversation: Conversation, *, lost: bool = True) -> None:
        conversation.quiet = False
        self.making += 1
        self._agent.call("session/new", self._place(conversation), lambda reply: self._made(conversation, reply, lost))

    def _made(self, conversation: Conversation, reply: Message, lost: bool) -> None:
        self.making -= 1
        self._take(conversation, reply, lost)
        self._on_made()

    def _take(self, conversation: Conversation, reply: Message, lost: bool) -> None:
        if not conversation.restoring:
            return
        result = reply.get("result")
        if isinstance(result, dict) and is_session_id(result.get("sessionId")):
            self._conversations.rename(conversation, result["sessionId"])
            self._chosen(conversation, reply)
            if lost:
                self._on_lost(conversation)
        elif "error" in reply:
            self._done(conversation, reply)
        else:
            self._done(conversation, failed("the agent made no session"))

    def _chosen(self, conversation: Conversation, reply: Message) -> None:
        """Chooses mode, model and options again, where the agent has begun with its own; then it is done."""
        asked: list[choices.Choice] = []
        if "error" not in reply:
            conversation.take_extras(reply.get("result"))
            asked = choices.again(conversation.chosen, conversation.extras)
        left = len(asked)

        def answered(choice: choices.Choice, answer: Message) -> None:
            nonlocal left
            left -= 1
            choices.follow(conversation, choice, answer)
            if not left and conversation.restoring:
                self._done(conversation, {"result": None} if self._agent.ready else answer)

        for choice in asked:
            params = {"sessionId": conversation.agent_id, **choice.params}
            self._agent.call(choice.method, params, partial(answered, choice))
        if not asked:
            self._done(conversation, reply)

    def _done(self, conversation: Conversation, reply: Message) -> None:
        conversation.restoring = conversation.refreshing = conversation.quiet = False
        error = reply if "error" in reply else None
        if error is None:
            conversation.went_live(conversation.opened)
            conversation.take_extras(reply.get("result"))
            self._outbox.note(records.CONVERSATION, conversation.saved(), conversation)
        self._tell(conversation, error)

    def adopted(self, conversation: Conversation, error: Message | None) -> None:
        """A load that somebody else asked for (with ``restoring`` set) has ended; others may wait for it."""
        conversation.restoring = False
        self._tell(conversation, error)

    def _tell(self, conversation: Conversation, error: Message | None) -> None:
        waiting, conversation.when_live = conversation.when_live, []
        for then in waiting:
            then(error)
        self._outbox.flush()

    def _place(self, conversation: Conversation) -> Message:
        conversation.cwd = self._settings.workspace.restored(conversation.cwd)
        try:
            self._settings.workspace.make(conversation.cwd)
        except OSError as error:
            log.warning("the workspace cannot be made: %s", error)
        conversation.opened = self._servers.opened
        return {"cwd": conversation.cwd, "mcpServers": self._servers.entries(conversation.servers)}

    def agent_down(self, conversation: Conversation) -> None:
        """The process is gone, and what was under way with it."""
        conversation.live = conversation.restoring = conversation.quiet = conversation.refreshing = False
        if conversation.when_live:
            self._tell(conversation, failed("the agent ended before it had the conversation"))
