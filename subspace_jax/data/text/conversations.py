"""Conversations: messages with roles, as chat models are trained on and prompted with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

ASSISTANT = "assistant"


class Conversation(NamedTuple):
    """Messages of a chat.

    Attributes:
      messages: Objects with ``role`` and ``content``, and others that a chat template may read, such as ``tool_calls``.
      tools: Descriptions of tools for the template, or None.
      where: File and line, for messages of errors; no part of the conversation.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    where: str = "conversation"


def conversation_of(row: Mapping[str, Any], where: str) -> Conversation:
    """Returns the conversation of a row with ``messages`` and perhaps ``tools``.

    Fields that are null are left out, as in transformers: many templates would print them.

    Args:
      row: The row.
      where: File and line, for messages of errors.

    Raises:
      ValueError: ``messages`` is no list of objects with ``role`` and ``content``, both text, or ``tools`` no list of
        objects.  A message with ``tool_calls`` needs no content.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: field 'messages': expected a list of messages, got {_form(messages)}")
    tools = row.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}: field 'tools': expected a list of objects, got {_form(tools)}")
    checked = tuple(_message(message, f"{where}: messages[{i}]") for i, message in enumerate(messages))
    return Conversation(checked, None if tools is None else tuple(tools), where)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected an object with 'role' and 'content', got {_form(message)}")
    given = message
    message = {name: value for name, value in message.items() if value is not None}
    needed = ("role",) if message.get("tool_calls") else ("role", "content")
    for name in needed:
        if name not in message and name in given:
            raise ValueError(f"{where}: field {name!r}: expected text, got null")
        if name not in message:
            raise ValueError(f"{where}: no field {name!r}; there are {sorted(message)}")
    for name in ("role", "content"):
        if not isinstance(message.get(name, ""), str):
            raise ValueError(f"{where}: field {name!r}: expected text, got {_form(message[name])}")
    return message


def _form(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__
