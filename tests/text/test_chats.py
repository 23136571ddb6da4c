"""Chats as they come, to text: whatever form a template expects, what was said is in it, and nothing that was not."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import byte_tokenizer

from spicerack.errors import TextError
from spicerack.text.chats import is_chat, render, whole

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ADDING = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
CALLING = (
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}
TOOL = [
    {"role": "user", "content": "Will it rain?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "yes"},
]
SPLIT = [
    {"role": "user", "content": [{"type": "text", "text": "Will it "}, {"type": "text", "text": "rain?"}]},
    {"role": "assistant", "content": "yes"},
]


def rendered(template: Any, messages: list[dict[str, Any]], **more: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert is_chat(messages)
    return render(tokenizer, messages, "here", **more)


@pytest.mark.parametrize("template", [PLAIN, ADDING, PARTS, CALLING])
def test_calls_of_tools_and_content_in_parts(template: str) -> None:
    text = rendered(template, TOOL)
    assert text.replace("[weather]", "") == "<user>Will it rain?<assistant><tool>yes"
    assert ("[weather]" in text) == (template is CALLING)
    assert rendered(template, SPLIT) == "<user>Will it rain?<assistant>yes"
    assert rendered(template, [{"role": "user", "content": "None, {'type': 'text'}"}]).endswith("'text'}")


def test_tools_reach_the_template() -> None:
    assert rendered(CALLING, TOOL, tools=[CALL]).startswith("(weather)")
    assert rendered(CALLING, TOOL, tools="none").startswith("<user>")


def test_what_a_template_refuses_is_told() -> None:
    with pytest.raises(TextError, match="here: the tokenizer's chat template refuses it: alternate!"):
        rendered("{{ raise_exception('alternate!') }}", TOOL)
    with pytest.raises(TextError, match=r"here: .* refuses it: .*multiple chat templates"):
        rendered({"rag": PLAIN, "tool": PLAIN}, TOOL)
    with pytest.raises(TextError, match="here is a chat, but the tokenizer has no chat template"):
        render(byte_tokenizer(), TOOL, "here")
    with pytest.raises(TextError, match="here has a part of type 'image'"):
        rendered(PARTS, [{"role": "user", "content": [{"type": "image"}]}])


@pytest.mark.parametrize(
    "messages", [None, [], "text", ["text"], [{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}],
                 [{"role": "user", "content": 5}], [{"role": "user", "content": [5]}]]
)  # fmt: skip
def test_what_is_no_chat(messages: object) -> None:
    assert not is_chat(messages)


def test_half_a_pair_is_replaced_and_counted() -> None:
    assert whole("a\ud83db\udc00") == ("a\ufffdb\ufffd", 2)
    assert whole("a \U0001f600") == ("a \U0001f600", 0)
