"""Chat templates: conversations as the text that a model was trained on, by the Jinja template of its tokenizer."""

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_jax.data.text.conversations import ASSISTANT, Conversation
from subspace_jax.data.text.records import Passage
from subspace_jax.data.text.special_tokens import read_template
from subspace_jax.data.text.tokenizers import Tokenizer

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Of a private use area, so that no template or text is likely to hold them; repeated where one does.
_MARKS = ("\ue000", "\ue001")


class ChatTemplate:
    """A chat template, in a sandbox.

    Templates see what those of transformers see: ``messages``, ``tools``, ``add_generation_prompt``, the special tokens
    by their roles, ``raise_exception``, ``strftime_now``, ``tojson``, ``break`` and ``continue``.

    Args:
      source: Jinja template.
      special_tokens: Texts by role, such as ``{"eos_token": "</s>"}``.
      date: What ``strftime_now`` formats; the time of the call by default.
      name: Name of the template in messages of errors.

    Raises:
      ValueError: The template is malformed.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        date: datetime.date | None = None,
        name: str = "chat template",
    ):
        import jinja2

        self._source, self._special_tokens, self._name = source, dict(special_tokens or {}), name
        environment, self._marks = _environment(date)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name}, line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns the text of messages.

        Args:
          messages: Objects with ``role`` and ``content``.
          tools: Descriptions of tools, or None.
          add_generation_prompt: Whether the text ends where the assistant begins to speak.

        Raises:
          ValueError: The template raises.
        """
        try:
            return self._template.render(
                **self._special_tokens,
                messages=[dict(message) for message in messages],
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # whatever the template's code raises
            kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
            raise ValueError(f"{self._name} raises {kind}{' '.join(str(error).split())[:500]}") from error

    def passages(self, conversation: Conversation) -> list[Passage]:
        """Returns the text of a conversation, in which the loss covers what the assistant says after the prompt.

        Where the template has ``{% generation %}`` blocks, these are the parts.  Elsewhere a part begins where the text
        of the earlier messages, with the generation prompt, ends, and ends where that of the messages up to it does.
        Some templates change earlier messages when more follow (they drop the reasoning, say).  There each reply is a
        text of its own, as the model sees it when it speaks.

        Raises:
          ValueError: No message after the prompt is of the assistant, the template raises, or its texts don't tell
            where the assistant speaks; the message has file and line.
        """
        messages, tools, where, start = conversation
        try:
            turns = [i for i in range(start, len(messages)) if messages[i]["role"] == ASSISTANT]
            if not turns:
                roles = sorted({message["role"] for message in messages[start:]})
                name = "messages of the completion" if start else "messages"
                raise ValueError(f"{name}: expected one of the role {ASSISTANT!r}, got only {roles}")
            if _GENERATION.search(self._source):
                replied = any(message["role"] == ASSISTANT for message in messages[:start])
                given = len(self._marked(messages[:start], tools)[1]) if replied else 0
                text, spans = self._marked(messages, tools)
                return [Passage(text, tuple(span for span in spans[given:] if span[0] < span[1]))]
            return self._by_prefixes(messages, tools, turns)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _marked(self, messages, tools) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of messages, and first character and end of each generation block."""
        given = self._source + json.dumps([messages, tools, self._special_tokens], ensure_ascii=False, default=str)
        repeats = next(n for n in range(1, len(given) + 2) if not any(mark * n in given for mark in _MARKS))
        opening, closing = (mark * repeats for mark in _MARKS)
        plain = self.render(messages, tools=tools)
        self._marks[:] = opening, closing
        try:
            marked = self.render(messages, tools=tools)
        finally:
            self._marks[:] = "", ""
        text, spans = "", []
        for number, part in enumerate(re.split(f"{opening}(.*?){closing}", marked, flags=re.DOTALL)):
            if number % 2:
                spans.append((len(text), len(text) + len(part)))
            text += part
        if text != plain:
            raise ValueError(f"{self._name}: expected generation blocks whose text is printed as it is")
        return text, spans

    def _by_prefixes(self, messages, tools, turns) -> list[Passage]:
        whole = self.render(messages, tools=tools)
        replies = []
        for i in turns:
            before = self.render(messages[:i], tools=tools, add_generation_prompt=True)
            through = self.render(messages[: i + 1], tools=tools)
            if len(through) <= len(before) or not through.startswith(before):
                raise ValueError(
                    f"{self._name}: expected the text up to messages[{i}] to begin with that of the messages before it "
                    "and the generation prompt; generation blocks in the template would mark what the assistant says"
                )
            replies.append(Passage(through, ((len(before), len(through)),)))
        if all(whole.startswith(reply.text) for reply in replies):
            return [Passage(whole, tuple(span for reply in replies for span in reply.spans))]
        return replies

    def end_tokens(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Returns the special token that the template puts after a reply, or nothing where there is none.

        It may be another one than the end-of-sequence token: generation stops at either.
        """
        said = "yes"
        try:
            text = self.render([{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": said}])
        except ValueError:  # a template for other conversations
            return ()
        after = text.rpartition(said)[2]
        tokens = tokenizer.encode(after.lstrip()) if after.strip() else []
        return tuple(tokens[:1]) if tokens and not tokenizer.decode(tokens[:1]) else ()


def load_chat_template(
    tokenizer: Tokenizer, path: str | os.PathLike = "", *, date: datetime.date | None = None
) -> ChatTemplate | None:
    """Returns the chat template of a file, or that of a tokenizer, or None where there is neither.

    Args:
      tokenizer: Its special tokens are known to the template.
      path: File with a Jinja template; "" for the tokenizer's own.
      date: See :class:`ChatTemplate`.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file is not UTF-8, or the template malformed.
    """
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"chat template: no file {path}")
    source = read_template(Path(path)) if path else tokenizer.chat_template
    if source is None:
        return None
    name = f"the chat template {path}" if path else "the chat template of the tokenizer"
    return ChatTemplate(source, tokenizer.special_tokens, date=date, name=name)


def _environment(date: datetime.date | None):
    """Returns an environment as of transformers, and the marks that it prints around generation blocks."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    marks = ["", ""]

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - as Jinja asks for it

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller):
            return f"{marks[0]}{caller()}{marks[1]}"

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: (date or datetime.datetime.now()).strftime(pattern)
    return environment, marks
