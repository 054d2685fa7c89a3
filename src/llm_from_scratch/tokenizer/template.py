"""The chat templates of other people's models, run so that a message can say anything and still be only a message.

A template is a program in Jinja that makes one string of a conversation, with special tokens spelled out in it. Splitting that string at
their names would let a user close a turn by typing one. So each such name in a content is broken by a character that no message has
before the template runs, and mended after the string was split: the ids are those of transformers wherever contents hold no such names.
Templates come from strangers: they run in Jinja's sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm_from_scratch.tokenizer.imported import ImportedTokenizer

Turn = Mapping[str, str]  # {"role": …, "content": …}


def template_ids(turns: Sequence[Turn], tokenizer: ImportedTokenizer, prompt: bool) -> list[int]:
    """The ids of a conversation in the form its model was taught; with `prompt`, up to where the assistant begins.

    Raises ValueError where there is no template, or it refuses the conversation.
    """
    names = re.compile("|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True))))
    breaker = _unused(turns)
    broken = [{**turn, "content": _break(turn["content"], names, breaker)} for turn in turns]
    ids: list[int] = []
    place = 0
    text = _render(broken, tokenizer, prompt)
    for found in names.finditer(text):
        ids += tokenizer.encode(text[place : found.start()].replace(breaker, ""))
        ids.append(tokenizer.special[found[0]])
        place = found.end()
    return ids + tokenizer.encode(text[place:].replace(breaker, ""))


def _render(turns: Sequence[Turn], tokenizer: ImportedTokenizer, prompt: bool) -> str:
    """As transformers does: its settings of Jinja, its variables, its `raise_exception`, and no clock."""
    if tokenizer.template is None:
        raise ValueError("this model has no chat template, so it only goes on with a text; ask for a completion")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    try:
        template = environment.from_string(tokenizer.template)
        return template.render(messages=list(turns), add_generation_prompt=prompt, tools=None, documents=None, **tokenizer.named)
    except (TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"the model's chat template refuses these messages: {' '.join(str(error).split())}") from None


def _unused(turns: Sequence[Turn]) -> str:
    """A character of the private use area, where Unicode puts no letters, that no content has."""
    said = {character for turn in turns for character in turn["content"]}
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in said)


def _break(content: str, names: re.Pattern[str], breaker: str) -> str:
    """Again until nothing is found: what is left of one name may be part of another."""
    while names.search(content):
        content = names.sub(lambda found: found[0][0] + breaker + found[0][1:], content)
    return content


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Generation(Extension):
    """{% generation %} marks what the assistant said, for transformers' training masks; here it is only looked through."""

    tags = {"generation"}  # noqa: RUF012 (the name and form that Jinja asks for)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
