from __future__ import annotations

import json
from pathlib import Path

import pytest

from plutino.assets import TINY_LLAMA_DIR
from plutino.data.readers import Message, Row
from plutino.data.templates import ChatTemplate, RenderedRow, compile_template, load_chat_template, render
from plutino.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROW = Row(
    7,
    (
        Message("system", "be brief"),
        Message("user", "one?"),
        Message("assistant", "1", carries_loss=True),
        Message("user", "two?"),
        Message("assistant", "2", carries_loss=True),
    ),
)


def template(source: str) -> ChatTemplate:
    return compile_template(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, origin=Path("t.jinja"))


def learned(row: RenderedRow) -> list[str]:
    return [row.text[start:end] for start, end in row.answers]


def test_render_every_answer_carries_loss_with_its_end_token_only() -> None:
    rendered = render(ROW, "messages", template(CHATML))

    assert learned(rendered) == ["1<|im_end|>", "2<|im_end|>"]
    assert rendered.text[: rendered.prompt_chars].endswith("two?<|im_end|>\n<|im_start|>assistant\n")


def test_render_message_without_loss_is_context() -> None:
    row = Row(1, (*ROW.messages[:2], Message("assistant", "1"), *ROW.messages[3:]))

    assert learned(render(row, "messages", template(CHATML))) == ["2<|im_end|>"]


def test_render_eos_that_only_ends_the_whole_conversation_is_not_learned_between_turns() -> None:
    source = CHATML.replace("{% if", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if")

    assert learned(render(ROW, "messages", template(source))) == ["1<|im_end|>", "2<|im_end|>"]


def test_render_template_that_strips_content_still_finds_the_answer() -> None:
    source = CHATML.replace("m.content", "m.content | trim")
    row = Row(1, (Message("user", "a"), Message("assistant", " b \n", carries_loss=True)))

    assert learned(render(row, "messages", template(source))) == ["b<|im_end|>"]


def test_render_prompt_completion_with_a_template_becomes_a_chat() -> None:
    row = Row(1, (Message("user", "a"), Message("assistant", "b", carries_loss=True)))

    rendered = render(row, "prompt_completion", template(CHATML))

    assert rendered.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert rendered.is_chat


def test_render_prompt_completion_without_template_is_plain_text() -> None:
    row = Row(1, (Message("user", "2 + 2 ="), Message("assistant", " 4", carries_loss=True)))

    rendered = render(row, "prompt_completion", None)

    assert rendered == RenderedRow("2 + 2 = 4", ((7, 9),), 7, is_chat=False)


def test_render_messages_without_template_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"no chat template .*; add one"):
        render(ROW, "messages", None)


@pytest.mark.parametrize(
    ("source", "trouble"),
    [
        ("{% for m in messages[-2:] %}{{ m.content }};{% endfor %}", "renders the prompt of an answer differently"),
        ("{{ messages | length }}" + CHATML, "renders the prompt of an answer differently"),
        ("{{ 'long' if messages | length > 3 }}" + CHATML, "renders an earlier answer differently"),
        (CHATML.replace("m.content", "loop.last and m.content or m.content | upper"), "answer differently"),
        (CHATML.replace("m.content", "m.content | replace('1', 'one')"), "changes what the assistant says"),
        ("{{ raise_exception('roles must alternate') }}", "refuses .* system, user.*: roles must alternate"),
        ("{{ messages[9].content }}", "refuses a conversation"),
        ("{{ 1 + 'a' }}", "refuses a conversation"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
        ("{{ messages.append(1) }}", "refuses a conversation"),
    ],
)
def test_render_unusable_template_is_refused_with_the_trouble(source: str, trouble: str) -> None:
    with pytest.raises(DataError, match=f"the chat template t.jinja .*{trouble}"):
        render(ROW, "messages", template(source))


def test_compile_template_syntax_error_names_file_and_line() -> None:
    with pytest.raises(DataError, match=r"t\.jinja is not valid Jinja, line 2"):
        template("\n{% if %}")


def test_compile_template_knows_generation_tag_loop_controls_and_plain_json() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ {'é<': m.content} | tojson }}{% endgeneration %}{% endfor %}"
    )

    assert template(source).text(ROW.messages) == '{"é<": "be brief"}'


def test_answer_end_is_the_end_token_of_the_template() -> None:
    assert template(CHATML).answer_end() == "<|im_end|>"
    assert template("{% for m in messages %}{{ m.content }}\n{% endfor %}").answer_end() == ""


def test_load_chat_template_file_wins_over_tokenizer_config(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "config {{ bos_token }}"}]
    config = {"chat_template": named, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    from_config = load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    from_file = load_chat_template(tmp_path)

    assert from_config is not None and from_config.text(()) == "config <s>"
    assert from_file is not None and from_file.text(()) == "file"


def test_load_chat_template_model_without_one_gives_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None


def test_load_chat_template_of_the_shipped_model_marks_answer_and_end() -> None:
    shipped = load_chat_template(TINY_LLAMA_DIR)

    assert learned(render(ROW, "messages", shipped)) == ["1<|end|>", "2<|end|>"]
