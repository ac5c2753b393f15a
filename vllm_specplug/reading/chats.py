"""Chats as files hold them: messages, and the turns of ShareGPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""Roles by their names in ShareGPT; other names stay."""


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages or turns, with at least one in it."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def messages_of(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``; turns of ShareGPT (``from``, ``value``) become such messages."""
    return [
        {"role": ROLES.get(each["from"], each["from"]), "content": each["value"]}
        if "from" in each and "value" in each and "role" not in each
        else dict(each)
        for each in turns
    ]


def first_question(turns: Sequence[Mapping[str, Any]]) -> str | None:
    """Text of the user's first message; None if the chat is empty or begins with an answer.

    Raises:
        ValueError: a message has no role, or its content is no text.
    """
    for message in messages_of(turns):
        role = message.get("role")
        if role is None:
            raise ValueError("a message without a role")
        if role == "user":
            return text_of(message.get("content"))
        if role not in ("system", "developer"):
            return None
    return None


def text_of(content: Any) -> str:
    """A content's text, whose parts stand in lines of their own, as vLLM puts them together.

    Raises:
        ValueError: it is something else, such as a picture.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        given = [each.get("text") if isinstance(each, Mapping) else each for each in content]
        parts = [part for part in given if isinstance(part, str)]
        if len(parts) == len(given):
            return "\n".join(parts)
    raise ValueError(f"content that is no text: {content!r:.60}")


def without_nulls(value: Any) -> Any:
    """A value of Arrow without the nulls that its struct types put in for keys of other rows."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
