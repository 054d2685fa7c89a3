"""Tokenizers in GGUF's metadata: the tokens, what each is for, the merges, and the name of the split pattern.

A name must do for the pattern, so only those are read whose pattern is known here, and ours are GPT-2's to the letter. A character
tokenizer goes out as byte pairs too, whose only merges put the bytes of one character together; a character it never saw is then nothing,
and not <unk>. What normalizes text (Qwen's NFC) has no place in the file. Ours carry a mark and come back as what they were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_from_scratch.tokenizer import export
from llm_from_scratch.tokenizer.bpe import BpeTokenizer
from llm_from_scratch.tokenizer.char import UNKNOWN, CharTokenizer
from llm_from_scratch.tokenizer.imported import ImportedTokenizer

Fields = Mapping[str, Any]

MARK = "llm_from_scratch.tokenizer"
NORMAL, UNKNOWN_TYPE, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""llama.cpp's types of tokens; the others (5, unused, and 6, a byte of SentencePiece) have no text here."""
NAMED = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id", "unk_token": "unknown_token_id"}
NEVER = b"\xfe\xff"
"""Bytes that UTF-8 does not use."""
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' mark around what the assistant says, which other engines of Jinja refuse."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
        {**BYTE_LEVEL, "trim_offsets": False, "use_regex": False},
    ],
}
"""llama.cpp's name of a split pattern, and the steps that the tokenizers library has for it."""


def fields(tokenizer: CharTokenizer | BpeTokenizer | ImportedTokenizer) -> dict[str, Any]:
    """The metadata that stands for `tokenizer`, by GGUF's names. Raises ValueError where llama.cpp has no name for its split pattern."""
    match tokenizer:
        case CharTokenizer():
            tokens, merges, pre = [_spelled(one.encode()) for one in tokenizer.characters], _whole_characters(tokenizer), "gpt-2"
        case BpeTokenizer():
            tokens, pre = [_spelled(token) for token in tokenizer.tokens], "gpt-2"
            merges = [f"{tokens[left]} {tokens[right]}" for left, right in tokenizer.merges]
        case ImportedTokenizer():
            return _imported_fields(tokenizer)
    types = [NORMAL] * len(tokens) + [UNKNOWN_TYPE if name == UNKNOWN else CONTROL for name in tokenizer.special]
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "padding_token_id": tokenizer.eot}
    if UNKNOWN in tokenizer.special:
        ends["unknown_token_id"] = tokenizer.special[UNKNOWN]
    made = _table([*tokens, *tokenizer.special], types, merges, pre, {**ends, "eot_token_id": tokenizer.end_of_turn})
    kind = "char" if isinstance(tokenizer, CharTokenizer) else "bpe"
    return made | {"tokenizer.chat_template": GENERATION.sub("", export.CHAT_TEMPLATE), MARK: kind}


def from_fields(metadata: Fields) -> CharTokenizer | BpeTokenizer | ImportedTokenizer:
    """The tokenizer that a file's metadata stands for. Raises ValueError naming the field that cannot be met."""
    try:
        table = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items() if name.startswith("tokenizer.ggml.")}
        _require_known(table)
        match metadata.get(MARK):
            case "char":
                return CharTokenizer([_characters(token) for token, kind in _typed(table) if kind == NORMAL])
            case "bpe":
                return _ours(table)
            case _:
                named = {part: table["tokens"][table[key]] for part, key in NAMED.items() if key in table}
                return ImportedTokenizer(_document(table), named, metadata.get("tokenizer.chat_template"))
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"its tokenizer is not whole ({type(error).__name__}: {error}); fetch the file again") from None


def _table(tokens: list[str], types: list[int], merges: list[str], pre: str, ends: Mapping[str, int]) -> dict[str, Any]:
    found = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges, **ends, "add_bos_token": False}
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


# --- out --------------------------------------------------------------------------------------------------------------------------


def _imported_fields(tokenizer: ImportedTokenizer) -> dict[str, Any]:
    document = tokenizer.document()
    steps = _steps(document["pre_tokenizer"])
    pre = next((name for name, known in PATTERNS.items() if steps == list(map(_plain, known))), None)
    if pre is None:
        raise ValueError(f"this tokenizer splits text by {steps}, for which llama.cpp has no name known here; {', '.join(PATTERNS)} have")
    added = {token["id"]: token for token in document["added_tokens"]}
    ids = {place: token for token, place in document["model"]["vocab"].items()} | {
        place: token["content"] for place, token in added.items()
    }
    places = range(tokenizer.vocab_size)
    types = [NORMAL if place not in added else CONTROL if added[place]["special"] else USER_DEFINED for place in places]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    ends = {NAMED[part]: place for place, token in ids.items() for part, name in tokenizer.named.items() if name == token}
    made = _table([ids.get(place, f"[PAD{place}]") for place in places], types, merges, pre, ends)
    return made | ({"tokenizer.chat_template": GENERATION.sub("", tokenizer.template)} if tokenizer.template else {})


def _steps(pre_tokenizer: Fields) -> list[dict[str, Any]]:
    return [_plain(step) for step in (pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer])]


def _plain(step: Fields) -> dict[str, Any]:
    """A step without what does not change ids, and with what older files leave out."""
    found = {key: value for key, value in step.items() if key != "trim_offsets"}
    return {"use_regex": True} | found if step["type"] == "ByteLevel" else found


def _whole_characters(tokenizer: CharTokenizer) -> list[str]:
    """The merges that make one token of each character of several bytes, each once; llama.cpp wants at least one, if only of bytes that
    no text has.
    """
    merges: dict[str, None] = {}
    for one in tokenizer.characters:
        spelled = _spelled(one.encode())
        merges |= {f"{spelled[:place]} {spelled[place]}": None for place in range(1, len(spelled))}
    return list(merges) or [f"{_spelled(NEVER[:1])} {_spelled(NEVER[1:])}"]


def _spelled(token: bytes) -> str:
    return "".join(export.CHARACTER_OF[byte] for byte in token)


# --- in ---------------------------------------------------------------------------------------------------------------------------


def _require_known(table: Fields) -> None:
    if table["model"] != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {table['model']!r}, and only byte-level BPE (gpt2) is read, not pieces of SentencePiece")
    if (pre := table.get("pre", "default")) not in PATTERNS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}, a split pattern not known here; {', '.join(PATTERNS)} are")
    for field in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if table.get(field):
            raise ValueError(f"tokenizer.ggml.{field} is set, and nothing is put around a text here; take a model without")


def _typed(table: Fields) -> list[tuple[str, int]]:
    return list(zip(table["tokens"], table["token_type"], strict=True))


def _characters(token: str) -> str:
    return bytes(export.BYTE_OF[one] for one in token).decode("utf-8")


def _ours(table: Fields) -> BpeTokenizer:
    ids = {token: place for place, token in enumerate(table["tokens"])}
    pairs: list[list[str]] = [merge.split(" ") for merge in table.get("merges", [])]
    special: Sequence[str] = [token for token, kind in _typed(table) if kind == CONTROL]
    made = BpeTokenizer([(ids[left], ids[right]) for left, right in pairs], special)
    if [*map(_spelled, made.tokens), *made.special] != table["tokens"]:
        raise ValueError(f"{MARK} is 'bpe', but its merges do not give its tokens; export it again")
    return made


def _document(table: Fields) -> dict[str, Any]:
    """tokenizer.json as the tokenizers library writes it."""
    steps = PATTERNS[table.get("pre", "default")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": place, "content": token, **flags, "special": kind != USER_DEFINED}
        for place, (token, kind) in enumerate(_typed(table))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN_TYPE)
    ]
    return export.document(
        added,
        pre_tokenizer=steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        decoder={**BYTE_LEVEL, "add_prefix_space": True},
        model=export.bpe({token: place for place, token in enumerate(table["tokens"])}, [merge.split(" ") for merge in table["merges"]]),
    )
