"""A conversation as ids: each message is its role's token, its content, and the token that ends a turn.

The special tokens are placed by id and the content is encoded as ordinary text, so nobody can close a turn or open another role by typing
its name. transformers renders the same template to a string first and splits special tokens out of it, content or not; for contents
without such names the ids are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_from_scratch.tokenizer.base import END_OF_TURN, ROLES, Tokenizer

Message = Mapping[str, object]  # {"role": …, "content": …}: wide enough for a TypedDict and for parsed JSON


def render(messages: Sequence[Message], tokenizer: Tokenizer, prompt: bool) -> tuple[list[int], list[bool]]:
    """(ids, learned): `learned` is true on what the assistant said and on its end of turn, the part a model is trained to produce.

    With `prompt` the ids end in the assistant's token, for a model to go on. Raises ValueError for a message that is not one.
    """
    ids: list[int] = []
    learned: list[bool] = []
    for place, message in enumerate(messages):
        role, content = _checked(place, message)
        turn = [*tokenizer.encode(content), tokenizer.special[END_OF_TURN]]
        ids += [tokenizer.special[f"<|{role}|>"], *turn]
        learned += [False, *[role == "assistant"] * len(turn)]
    if prompt:
        ids.append(tokenizer.special["<|assistant|>"])
        learned.append(False)
    return ids, learned


def _checked(place: int, message: Message) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"messages[{place}]: role is {role!r}, wanted one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"messages[{place}]: content is {type(content).__name__}, wanted text")
    return str(role), content
