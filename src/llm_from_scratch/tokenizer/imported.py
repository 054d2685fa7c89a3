"""Other people's tokenizers: a byte-level BPE from a tokenizer.json, run by the library that wrote it, behind our interface.

What ours promise holds here too: no text can make a special token, and every token has its bytes. So what has none is refused (pieces of
SentencePiece, WordPiece), and so is what would put tokens around a text that nobody asked for. A folder is marked as imported in its
tokenizer_config.json, for a tokenizer.json alone cannot say which token ends a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from llm_from_scratch.bundle import BundleError
from llm_from_scratch.tokenizer import export
from llm_from_scratch.tokenizer.base import END_OF_TEXT, Table, well_formed
from llm_from_scratch.tokenizer.gpt2 import read_gpt2

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
MARK = "llm_from_scratch_tokenizer"
"""A key of tokenizer_config.json that transformers does not read."""
PLAIN = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
"""Fields of a BPE that would each make it another function."""
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class ImportedTokenizer(Table):
    """`named` maps bos_token, eos_token, … to the token of that part; `template` is the chat template in Jinja, if there is one.

    Raises ValueError for a tokenizer that is not a byte-level BPE, or whose ids would not be those of its library.
    """

    def __init__(self, document: Mapping[str, Any], named: Mapping[str, str], template: str | None = None) -> None:
        _require_byte_level(document)
        added = {token["id"]: token for token in document["added_tokens"]}
        special = {token["content"]: place for place, token in added.items() if token["special"]}
        ids = {**document["model"]["vocab"], **{token["content"]: place for place, token in added.items()}}
        table = [b""] * (1 + max(ids.values()))
        for token, place in ids.items():
            if token not in special:
                table[place] = token.encode("utf-8") if place in added else _bytes(token)
        for part, token in named.items():
            if token not in ids:
                raise ValueError(f"{part} is {token!r}, which is no token of this tokenizer; take both files from one folder")
        if named.get("eos_token") not in special:
            raise ValueError(f"eos_token is {named.get('eos_token')!r}, wanted one of its special tokens: without it no text ends")
        end = special[named["eos_token"]]
        super().__init__(table, special, special.get(END_OF_TEXT, end), end)
        self.named, self.template = dict(named), template
        self._document = dict(document)
        self._fast = tokenizers.Tokenizer.from_str(json.dumps(self._document))
        self._fast.encode_special_tokens = True  # as text: their names are nothing special in what a user types
        if self._fast.encode("").ids:
            raise ValueError("its post_processor puts tokens around every text, which is not done here; take a model without")

    def __reduce__(self) -> tuple[type[ImportedTokenizer], tuple[dict[str, Any], dict[str, str], str | None]]:
        return type(self), (self._document, self.named, self.template)

    def document(self) -> dict[str, Any]:
        """tokenizer.json as a value."""
        return self._document

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._fast.encode(well_formed(text), add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    def save(self, folder: Path) -> None:
        """tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.named,
            "clean_up_tokenization_spaces": False,
            **({"chat_template": self.template} if self.template else {}),
            MARK: "imported",
        }
        export.write_json(folder / export.FILE, self._document)
        export.write_json(folder / CONFIG, config)
        if self.template:
            (folder / TEMPLATE).write_text(self.template, encoding="utf-8")


def is_imported(folder: Path) -> bool:
    """Whether the tokenizer in `folder` was written by an import."""
    return _read_json(folder / CONFIG).get(MARK) == "imported"


def read_imported(folder: Path, ends: Mapping[str, int] | None = None) -> ImportedTokenizer:
    """The tokenizer in a folder of Hugging Face's layout: tokenizer.json or, of an old gpt2, vocab.json and merges.txt. `ends` has the ids
    of bos_token, eos_token, …, for folders where only the model's files say them.

    Raises BundleError where the files are missing, ValueError where they are of a kind that cannot run here.
    """
    config = _read_json(folder / CONFIG)
    document = export.read(folder) if (folder / export.FILE).exists() else _gpt2(folder)
    try:
        by_id = {place: token for token, place in document["model"]["vocab"].items()}
        by_id |= {token["id"]: token["content"] for token in document["added_tokens"]}
        told = {part: by_id[place] for part, place in (ends or {}).items() if place in by_id}
        return ImportedTokenizer(document, told | _named(config), _template(folder, config))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / export.FILE} lacks what a tokenizer has ({type(error).__name__}: {error}); fetch it again") from None
    except ValueError as error:
        raise ValueError(f"{folder / export.FILE}: {error}") from None
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder / export.FILE}: the tokenizers library cannot read it ({error}); fetch it again") from None


def _gpt2(folder: Path) -> dict[str, Any]:
    try:
        return read_gpt2(folder, special=(END_OF_TEXT,)).document()
    except ValueError as error:
        raise BundleError(f"no {export.FILE} in {folder}, and {error}") from None


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """Names stand as text, or as an object that holds it."""
    found = {part: config.get(part) for part in NAMED}
    return {part: token["content"] if isinstance(token, dict) else token for part, token in found.items() if token}


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own in newer folders, a field in older ones, where it may be several by name."""
    if (folder / TEMPLATE).exists():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None


def _require_byte_level(document: Mapping[str, Any]) -> None:
    model, splits = document["model"], _parts(document["pre_tokenizer"], "pretokenizers")
    kinds, changes = [part["type"] for part in splits], _parts(document.get("normalizer"), "normalizers")
    wrong = {f"model.{field}": model.get(field) for field in PLAIN if model.get(field)}
    if model["type"] != "BPE":
        wrong["model.type"] = model["type"]
    if kinds.count("ByteLevel") != 1:
        wrong["pre_tokenizer"] = kinds
    if any(part.get("add_prefix_space") for part in splits):
        wrong["pre_tokenizer.add_prefix_space"] = True
    if odd := [part["type"] for part in changes if part["type"] != "NFC"]:
        wrong["normalizer"] = odd
    for field, found in wrong.items():
        raise ValueError(f"{field} is {found!r}, and only byte-level BPE, as GPT-2, SmolLM and Qwen have it, is read")
    for token in document["added_tokens"]:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if token["special"] and (flags or len(token["content"]) < 2):
            found = f"has {flags[0]}" if flags else "is one character"
            raise ValueError(f"the special token {token['content']!r} {found}, which would change the text beside it; not read here")


def _parts(tree: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """A step, or the steps of a sequence."""
    if tree is None:
        return []
    return list(tree[inside]) if tree["type"] == "Sequence" else [tree]


def _bytes(token: str) -> bytes:
    try:
        return bytes(export.BYTE_OF[character] for character in token)
    except KeyError:
        raise ValueError(f"the token {token!r} is not spelled in GPT-2's 256 characters, so its bytes are not known") from None


def _read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises BundleError where it is not an object in JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BundleError(f"{path} is not JSON ({error}); fetch or rebuild the folder") from None
    if not isinstance(found, dict):
        raise BundleError(f"{path} holds a JSON {type(found).__name__}, wanted an object; fetch or rebuild the folder")
    return found
