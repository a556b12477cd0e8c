"""What clients have chosen in a conversation (mode, model, options), so that it is chosen again where the agent
has opened it anew and begun with its own. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

from sandbox_agent import jsonrpc
from sandbox_agent.conversations import MAX_CHOICE_BYTES, MAX_CHOICES, Conversation
from sandbox_agent.jsonrpc import Message

OPTION = "option:"
"""Before the id of an option in ``Conversation.chosen``; mode and model are called so."""
STATES = {
    "mode": ("modes", "currentModeId", "session/set_mode", "modeId"),
    "model": ("models", "currentModelId", "session/set_model", "modelId"),
}
"""Name → where it is in ``Conversation.extras``, the method that sets it, its param."""


class Choice(NamedTuple):
    """A request that chooses, without its ``sessionId``."""

    method: str
    params: Message


def again(chosen: Message, extras: Message) -> list[Choice]:
    """What to ask for so that what was ``chosen`` is so: only where the conversation says that it is not."""
    found = []
    options = _options(extras)
    for name, value in chosen.items():
        if name in STATES:
            group, current, method, param = STATES[name]
            held = extras.get(group)
            if isinstance(held, dict) and held.get(current) != value:
                found.append(Choice(method, {param: value}))
        elif (option := options.get(name.removeprefix(OPTION))) is not None and option.get("currentValue") != value:
            found.append(Choice("session/set_config_option", {"configId": option["id"], "value": value}))
    return found


def follow(conversation: Conversation, choice: Choice, reply: Message) -> bool:
    """Notes a choice that the agent has taken; True when that changed what is known of the conversation."""
    params, result = choice.params, reply.get("result")
    if "error" in reply:
        return False
    if choice.method == "session/set_mode" and conversation.set_mode(params.get("modeId")):
        _choose(conversation, "mode", params["modeId"])
    elif choice.method == "session/set_model" and conversation.set_model(params.get("modelId")):
        _choose(conversation, "model", params["modelId"])
    elif choice.method == "session/set_config_option" and isinstance(result, dict) and "configOptions" in result:
        conversation.set_options(result["configOptions"])
        if isinstance(params.get("configId"), str):
            _choose(conversation, OPTION + params["configId"], params.get("value"))
    else:
        return False
    return True


def said_by_agent(conversation: Conversation) -> None:
    """The agent has told of another mode or of other options: what was chosen before is what is now."""
    options = _options(conversation.extras)
    for name in conversation.chosen:
        if name in STATES:
            group, current, _, _ = STATES[name]
            held = conversation.extras.get(group)
            if isinstance(held, dict) and current in held:
                conversation.chosen[name] = held[current]
        elif "currentValue" in (option := options.get(name.removeprefix(OPTION), {})):
            conversation.chosen[name] = option["currentValue"]


def _choose(conversation: Conversation, name: str, value: Any) -> None:
    """The latest last; mode and model may be options too, and only the latest of the two counts."""
    held = conversation.chosen.items()
    chosen = {known: old for known, old in held if known != name and not _same(conversation, known, name)}
    chosen[name] = value
    if len(chosen) <= MAX_CHOICES and len(jsonrpc.dumps(chosen)) <= MAX_CHOICE_BYTES:
        conversation.chosen = chosen


def _same(conversation: Conversation, one: str, other: str) -> bool:
    return {one, other} & STATES.keys() != set() and _meaning(conversation, one) == _meaning(conversation, other)


def _meaning(conversation: Conversation, name: str) -> Any:
    if name in STATES:
        return name
    option = _options(conversation.extras).get(name.removeprefix(OPTION), {})
    return option.get("category") or option.get("id")


def _options(extras: Message) -> dict[str, Message]:
    options = extras.get("configOptions")
    held = options if isinstance(options, list) else []
    return {o["id"]: o for o in held if isinstance(o, dict) and isinstance(o.get("id"), str)}
