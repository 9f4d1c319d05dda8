"""How a row looks to the model, and which of its characters carry loss.

Entry points: :func:`load_chat_template` (the model folder's own template) and :func:`render`. A template is Jinja, run
as transformers runs it (same environment, same filters), so that text is the same at training and at inference.
It gives up: tools and documents, and ``strftime_now`` (a template that asks for today's date would make a job's bits
depend on the day; templates guard it with ``is defined``, and then fall back to a fixed date).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plutino.data.formats import Message, Row, RowFormat
from plutino.errors import DataError

# What follows an answer's content: the end token, with white space before it but not after it. A model stops at its
# end token, so the line break that many templates put behind it is never generated and shall not be learned.
_END_OF_ANSWER = re.compile(r"\s*\S+")


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as text."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """Half-open character ranges that carry loss: each answer with its end token, without its role header."""
    prompt_chars: int
    """``text[:prompt_chars]`` is the prompt of the row's last answer."""
    is_chat: bool
    """False for plain text (a prompt with its completion, a document): the tokenizer adds its own bos."""
    ends: bool = True
    """Of plain text: eos ends the row."""
    second: str | None = None
    """For models with an encoder: the second of two texts, or what is to be written. Special tokens are the
    tokenizer's own then."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled chat template."""

    template: jinja2.Template
    special_tokens: Mapping[str, str]
    """bos_token, eos_token, ...: variables that templates may use."""
    origin: Path
    """The file it came from, for messages."""

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render a conversation.

        Raises:
            DataError: the template refuses it.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.template.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        # A template is a program: what its authors did not foresee surfaces as Jinja's errors or as these.
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            roles = ", ".join(message.role for message in messages) or "none"
            raise DataError(
                f"the chat template {self.origin} refuses a conversation of the roles {roles}: {error}; "
                "change the rows or the template"
            ) from error

    def answer_end(self) -> str:
        """Text that follows an assistant's content: the chat's own end token, in most templates."""
        probe = Row(0, (Message("user", "question"), Message("assistant", "answer", carries_loss=True)))
        rendered = _render_chat(self, probe)
        return rendered.text[rendered.prompt_chars : rendered.answers[-1][1]].partition("answer")[2]


def load_chat_template(model_dir: Path) -> ChatTemplate | None:
    """Read the model's own chat template; None if it has none.

    ``chat_template.jinja`` wins over ``tokenizer_config.json``, as in transformers; of several named templates the one
    called default is taken.

    Raises:
        DataError: the template is not valid Jinja.
    """
    config_path = model_dir / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    path = model_dir / "chat_template.jinja"
    source: Any
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    else:
        path, source = config_path, config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    return compile_template(source, special_tokens=special_tokens(config), origin=path)


def compile_template(source: str, *, special_tokens: Mapping[str, str], origin: Path) -> ChatTemplate:
    """Compile a chat template in a sandbox that can read its variables and change nothing.

    Raises:
        DataError: it is not valid Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return ChatTemplate(environment.from_string(source), dict(special_tokens), origin)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template {origin} is not valid Jinja, line {error.lineno}: {error.message}; mend or remove it"
        ) from error


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Pick bos_token, eos_token, pad_token, ... out of a tokenizer_config.json, whichever way they are written."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def render(row: Row, row_format: RowFormat, template: ChatTemplate | None) -> RenderedRow:
    """Render a row: through the chat template if the model has one, else as prompt and completion.

    Raises:
        DataError: the template cannot be used for this row, or messages meet a model without a template.
    """
    if template is not None:
        return _render_chat(template, row)
    if len(row.messages) != 2 or row_format in ("messages", "sharegpt"):
        raise DataError(
            "the rows are messages but the model has no chat template (chat_template.jinja); "
            "add one, use an instruction-tuned model, or give prompt and completion rows"
        )
    prompt, completion = (message.content for message in row.messages)
    text = prompt + completion
    return RenderedRow(text, ((len(prompt), len(text)),), len(prompt), is_chat=False)


def _render_chat(template: ChatTemplate, row: Row) -> RenderedRow:
    whole = template.text(row.messages)
    answers = []
    prompt_chars = 0
    for index, message in enumerate(row.messages):
        if message.role != "assistant":
            continue
        header = template.text(row.messages[:index], add_generation_prompt=True)
        is_last = index == len(row.messages) - 1
        until_here = whole if is_last else template.text(row.messages[: index + 1])
        end = _answer_end_index(template, header, until_here, message.content)
        if not whole.startswith(until_here[:end]):
            raise _trouble(template, "renders an earlier answer differently once later messages follow")
        if message.carries_loss:
            answers.append((len(header), end))
        prompt_chars = len(header)
    return RenderedRow(whole, tuple(answers), prompt_chars, is_chat=True)


def _answer_end_index(template: ChatTemplate, header: str, until_here: str, content: str) -> int:
    if not until_here.startswith(header):
        raise _trouble(template, "renders the prompt of an answer differently than the whole conversation")
    for known in (content, content.strip()):
        at = until_here.find(known, len(header))
        if at >= 0:
            content_end = at + len(known)
            end_token = _END_OF_ANSWER.match(until_here, content_end)
            return end_token.end() if end_token else content_end
    raise _trouble(template, "changes what the assistant says")


def _trouble(template: ChatTemplate, what: str) -> DataError:
    return DataError(
        f"the chat template {template.origin} {what}, so it cannot be told which tokens are answers; "
        "mend the template, or give rows with a single answer"
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(Extension):
    """Accepts ``{% generation %}``, with which some templates mark answers; what it holds is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja declares it on the instance

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
