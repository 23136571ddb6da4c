"""Chats to text, by the template that came with a tokenizer, as chats come: with tool calls, null and content in parts.

A template is a program of somebody else's, and each expects messages of its own form. What a template was not written
for it does not refuse: it prints `None` for null, Python's form of a list for content in parts, or nothing at all of a
string where it expects parts. So each form that means the same is tried, and one that was misread is not taken.

What is given up. Pictures and sound in a chat are refused: what is read here is read as text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spicerack.errors import TextError

Messages = Sequence[Mapping[str, Any]]
"""Each with a "role", and "content" (text, parts of it, or null) or "tool_calls"."""
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, TemplateError, TypeError, ValueError)
"""What a stranger's template raises: its own, and those of Python's operations on values that it did not expect."""
_PART = "{'type': 'text'"
"""How Python prints a part of a message."""
_SURROGATE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"
"""Unicode's character for one that could not be read."""


def is_chat(messages: object) -> TypeGuard[list[dict[str, Any]]]:
    """Whether this is a list of messages, one at least, each a dict with a role and with something said or called."""
    return isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))


def _is_message(message: object) -> bool:
    """Whether this is {"role": text} with content (text, null or parts) or calls of tools."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    parts = isinstance(content, list) and all(isinstance(part, (dict, str)) for part in content)
    return (content is None and "content" in message) or "tool_calls" in message or isinstance(content, str) or parts


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    where: str,
    *,
    tools: object = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text that the tokenizer's template makes of a chat, special tokens written out.

    messages   of which `is_chat` is true
    where      what an error calls the chat
    tools      functions that may be called, as templates take them; anything but a list is none
    add_generation_prompt   whether the text ends where an answer would begin

    Raises TextError without a template that takes it, and for a part that is no text.
    """
    if tokenizer.chat_template is None:
        raise TextError(f"{where} is a chat, but the tokenizer has no chat template", "give plain text instead")
    for message in messages:
        _check_parts(message, where)
    refusal: Exception | None = None
    best, most = "", -1
    for form in _forms(messages):
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in form], tokenize=False, add_generation_prompt=add_generation_prompt,
                tools=tools if isinstance(tools, list) and tools else None,
            )  # fmt: skip
        except _TEMPLATE_ERRORS as error:
            refusal = refusal or error
            continue
        assert isinstance(text, str)
        score = _score(messages, text)
        if score == len(messages):
            return text
        best, most = (text, score) if score > most else (best, most)
    if most >= 0:
        return best  # a template may leave out what was said, as those do that drop an earlier answer's thoughts
    reason = str(refusal).strip().split("\n")[0]
    raise TextError(f"{where}: the tokenizer's chat template refuses it: {reason}", "leave this chat out") from refusal


def _check_parts(message: Mapping[str, Any], where: str) -> None:
    """Raises TextError for a part of a message that is no text."""
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and not isinstance(part.get("text"), str):
            raise TextError(
                f"{where} has a part of type {part.get('type')!r}, and only text is read", "leave this chat out"
            )


def _forms(messages: Messages) -> Iterator[Messages]:
    """The chat in all forms that mean the same: as it is, null as no text, parts as one text, texts as parts."""
    yield messages
    if any("content" in message and message["content"] is None for message in messages):
        messages = [
            _with(message, "" if message.get("content") is None else message["content"]) for message in messages
        ]
        yield messages
    if any(isinstance(message.get("content"), list) for message in messages):
        yield [_with(message, _said(message)) for message in messages]
    yield [_with(message, [{"type": "text", "text": _said(message)}]) for message in messages]


def _with(message: Mapping[str, Any], content: object) -> dict[str, Any]:
    """The message with other content."""
    return {**message, "content": content}


def _said(message: Mapping[str, Any]) -> str:
    """The text of a message, whatever form it has."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else str(part["text"]) for part in content)
    return content if isinstance(content, str) else ""


def _score(messages: Messages, text: str) -> int:
    """How many messages' words are in a rendered chat; -1 where its template was not written for the form it got.

    That is seen by a `None` that nobody wrote, or a part of a message in Python's form.
    """
    written = "".join(map(_said, messages)) + str([message.get("tool_calls") for message in messages])
    nulls = any(message.get("content") is None for message in messages)
    if (nulls and text.count("None") > written.count("None")) or text.count(_PART) > written.count(_PART):
        return -1
    return sum(_said(message).strip() in text for message in messages)


def whole(text: str) -> tuple[str, int]:
    """Text without halves of surrogate pairs, which JSON can hold and no UTF-8 can: U+FFFD in place of each.

    Returns it, and how many there were.
    """
    return _SURROGATE.subn(REPLACEMENT, text)
