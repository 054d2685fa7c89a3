"""A conversation as ids: each message is its role's token, its content, and the token that ends a turn.

The special tokens are placed by id and the content is encoded as ordinary text, so nobody can close a turn or open another role by typing
its name. transformers renders the same template to a string first and splits special tokens out of it, content or not; for contents
without such names the ids are the same. An imported model brings its own template, and the same promise holds for it (see `template`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_from_scratch.tokenizer.base import END_OF_TURN, ROLES, Tokenizer
from llm_from_scratch.tokenizer.imported import ImportedTokenizer
from llm_from_scratch.tokenizer.template import template_ids

Message = Mapping[str, object]  # {"role": …, "content": …}: wide enough for a TypedDict and for parsed JSON


def render(messages: Sequence[Message], tokenizer: Tokenizer, prompt: bool) -> tuple[list[int], list[bool]]:
    """(ids, learned): `learned` is true on what the assistant said and on its end of turn, the part a model is trained to produce.

    With `prompt` the ids end in the assistant's token, for a model to go on. Raises ValueError for a message that is not one.
    """
    checked = [_checked(place, message) for place, message in enumerate(messages)]
    if isinstance(tokenizer, ImportedTokenizer):
        return _render_imported(checked, tokenizer, prompt)
    ids: list[int] = []
    learned: list[bool] = []
    for role, content in checked:
        turn = [*tokenizer.encode(content), tokenizer.special[END_OF_TURN]]
        ids += [tokenizer.special[f"<|{role}|>"], *turn]
        learned += [False, *[role == "assistant"] * len(turn)]
    if prompt:
        ids.append(tokenizer.special["<|assistant|>"])
        learned.append(False)
    return ids, learned


def _render_imported(said: Sequence[tuple[str, str]], tokenizer: ImportedTokenizer, prompt: bool) -> tuple[list[int], list[bool]]:
    """By the model's own template; what is learned is what each answer adds to the prompt before it. Prompts teach nothing."""
    turns = [{"role": role, "content": content} for role, content in said]
    ids = template_ids(turns, tokenizer, prompt)
    learned = [False] * len(ids)
    for place, turn in enumerate([] if prompt else turns):
        if turn["role"] == "assistant":
            asked, answered = template_ids(turns[:place], tokenizer, True), template_ids(turns[: place + 1], tokenizer, False)
            if answered[: len(asked)] != asked or ids[: len(answered)] != answered:
                raise ValueError(f"messages[{place}]: the model's chat template rewrites earlier turns, so nothing says what was answered")
            learned[len(asked) : len(answered)] = [True] * (len(answered) - len(asked))
    return ids, learned


def _checked(place: int, message: Message) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"messages[{place}]: role is {role!r}, wanted one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"messages[{place}]: content is {type(content).__name__}, wanted text")
    return str(role), content
