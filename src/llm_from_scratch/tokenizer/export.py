"""Tokenizers as files that everybody else can read: tokenizer.json and its companions, in Hugging Face's layout.

tokenizer.json is all that is needed to load one again. It is written out here field by field, in the form the `tokenizers` library writes
itself, so the two can be compared whole. tokenizer_config.json and chat_template.jinja serve transformers, merges.txt is for the eye.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_from_scratch.bundle import BundleError, file_digest
from llm_from_scratch.tokenizer.base import END_OF_TEXT, END_OF_TURN, ROLES, printable

FILE = "tokenizer.json"

# The `generation` block tells transformers what the assistant said, for its own training masks; the end of the turn is part of it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in [" + ", ".join(f"'{role}'" for role in ROLES) + "] %}"
    "{{ raise_exception('the role of a message is one of " + ", ".join(ROLES) + "') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '" + END_OF_TURN + "' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '" + END_OF_TURN + "' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, the next free character from U+0100 where not."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF = _byte_characters()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def word_level(tokens: Sequence[str], special: Mapping[str, int], unknown: str) -> dict[str, Any]:
    """tokenizer.json of a tokenizer that looks up one character at a time."""
    vocabulary = {token: place for place, token in enumerate(tokens)} | dict(special)
    return document(
        _added(special),
        # Not "(?s).": the library's regex engine (Oniguruma) does not know that group option.
        pre_tokenizer={"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        decoder={"type": "Fuse"},
        model={"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown},
    )


def byte_level(tokens: Sequence[bytes], merges: Sequence[tuple[int, int]], special: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with GPT-2's split pattern (which `use_regex` stands for)."""
    spelled = ["".join(CHARACTER_OF[byte] for byte in token) for token in tokens]
    vocabulary = {token: place for place, token in enumerate(spelled)} | dict(special)
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pairs = [[spelled[left], spelled[right]] for left, right in merges]
    return document(_added(special), pre_tokenizer=split, decoder={**split, "add_prefix_space": True}, model=bpe(vocabulary, pairs))


def bpe(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The `model` of a tokenizer.json whose tokens are spelled in GPT-2's characters."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocabulary),
        "merges": [list(pair) for pair in merges],
    }


def write(folder: Path, document: Mapping[str, Any], unknown: str | None = None) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja in `folder`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / FILE, document)
    write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_merges(folder: Path, tokens: Sequence[bytes], merges: Sequence[tuple[int, int]]) -> None:
    """merges.txt: each merge in the order it was learned, its id and its bytes, to look at, not to load. `tokens` ends in theirs."""
    first = len(tokens) - len(merges)
    lines = [
        f"{first + rank}\t{printable(tokens[left])} + {printable(tokens[right])} → {printable(tokens[first + rank])}"
        for rank, (left, right) in enumerate(merges)
    ]
    (folder / "merges.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """tokenizer.json as a value. Raises BundleError when there is none or it is not JSON."""
    path = folder / FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"no {FILE} in {folder}; dvc repro builds it") from None
    except ValueError as error:
        raise damaged(folder, f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise damaged(folder, f"a JSON {type(document).__name__}, wanted an object")
    return document


def damaged(folder: Path, reason: str) -> BundleError:
    """The one-line error for a tokenizer that cannot be trusted."""
    return BundleError(f"{folder / FILE}: not a tokenizer of this project ({reason}); rebuild the folder with dvc repro --force")


def digest(folder: Path) -> str:
    """sha256 of tokenizer.json: equal digests mean equal ids for every text."""
    return file_digest(folder / FILE)


def document(added: Sequence[Mapping[str, Any]], **parts: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json of its added tokens, `pre_tokenizer`, `decoder` and `model`."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": None,
        "decoder": parts["decoder"],
        "model": parts["model"],
    }


def _added(special: Mapping[str, int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": place, "content": name, **flags} for name, place in special.items()]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented, and with every character as itself."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
