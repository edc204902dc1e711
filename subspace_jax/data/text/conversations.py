"""Conversations: messages with roles, as chat models are trained on and prompted with."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ASSISTANT = "assistant"
CONVERTED = "; docs/language.md converts such rows under 'ShareGPT and Alpaca'"


class Conversation(NamedTuple):
    """Messages of a chat.

    Attributes:
      messages: Objects with ``role`` and ``content``, and others that a chat template may read, such as ``tool_calls``.
      tools: Descriptions of tools for the template, or None.
      where: File and line, for messages of errors; no part of the conversation.
      prompt_length: Number of leading messages that are a prompt, in which the loss covers no reply.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    where: str = "conversation"
    prompt_length: int = 0


def conversation_of(row: Mapping[str, Any], where: str, fields: Sequence[str] = ("messages",)) -> Conversation:
    """Returns the conversation of a row with ``messages`` and perhaps ``tools``.

    Fields that are null are left out, as in transformers: many templates would print them.  Contents in parts,
    ``[{"type": "text", "text": ...}]``, are joined.

    Args:
      row: The row.
      where: File and line, for messages of errors.
      fields: Names of the fields with messages, in order; the last is learnt, those before it are the prompt.

    Raises:
      ValueError: A field is no list of objects with ``role`` and ``content``, both text, or ``tools`` no list of
        objects.  A message with ``tool_calls`` needs no content.
    """
    parts = [_messages(row, name, where) for name in fields]
    tools = row.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}: field 'tools': expected a list of objects, got {_form(tools)}")
    messages = tuple(message for part in parts for message in part)
    return Conversation(messages, None if tools is None else tuple(tools), where, len(messages) - len(parts[-1]))


def _messages(row: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    messages = row.get(name)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: field {name!r}: expected a list of messages, got {_form(messages)}")
    return [_message(message, f"{where}: {name}[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected an object with 'role' and 'content', got {_form(message)}")
    given = message
    message = {name: value for name, value in message.items() if value is not None}
    needed = ("role",) if message.get("tool_calls") else ("role", "content")
    if message.get("tool_calls") and "content" in given:
        message["content"] = given["content"]  # templates tell null from a text
    for name in needed:
        if name not in message and name in given:
            raise ValueError(f"{where}: field {name!r}: expected text, got null")
        if name not in message:
            hint = CONVERTED if "from" in message else ""
            raise ValueError(f"{where}: no field {name!r}; there are {sorted(message)}{hint}")
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], f"{where}: content")
    for name in ("role", "content"):
        if message.get(name) is not None and not isinstance(message[name], str):
            raise ValueError(f"{where}: field {name!r}: expected text, got {_form(message[name])}")
    return message


def _joined(parts: list[Any], where: str) -> str:
    """Returns the text of a content in parts; templates that print parts put nothing between them."""
    if not parts:
        raise ValueError(f"{where}: expected a text, or parts of the type 'text', got an empty list")
    for i, part in enumerate(parts):
        if not isinstance(part, dict):
            raise ValueError(f"{where}[{i}]: expected a part of the type 'text', got {_form(part)}")
        if part.get("type") != "text":
            raise ValueError(f"{where}[{i}]: expected a part of the type 'text', got the type {part.get('type')!r}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{i}]: field 'text': expected text, got {_form(part.get('text'))}")
    return "".join(part["text"] for part in parts)


def _form(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__
