"""Models from elsewhere, and ours for elsewhere: `python -m stages import SOURCE --name NAME`, `python -m stages export NAME --gguf FILE`.

Not nodes of the graph: what is imported has no params here, and what is exported leaves.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_from_scratch import bundle, tokenizer

MODELS, RAW = Path("artifacts/models"), Path("artifacts/raw")
MADE_BY = "import@"


def main(given: Sequence[str]) -> None:
    """Run one of the two commands, in the project's folder. Raises a one-line error where it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("import", help="a .gguf file or a Hugging Face folder becomes a bundle")
    taking.add_argument("source", help="a .gguf file, a folder with config.json, or a corpus in artifacts/raw that holds one of them")
    taking.add_argument("--name", required=True, help="of the bundle, in artifacts/models")
    giving = commands.add_parser("export", help="a bundle becomes a .gguf file, for llama.cpp")
    giving.add_argument("name", help="of the bundle, in artifacts/models, or its folder")
    giving.add_argument("--gguf", type=Path, required=True, help="the file to write")
    giving.add_argument("--type", choices=("f16", "q8_0"), default="f16", help="how its matrices are stored")
    arguments = parser.parse_args(given)
    if arguments.command == "import":
        folder = take(find(arguments.source), arguments.name)
        print(f"{folder}: serve it, or complete with Engine.open", file=sys.stderr)
    else:
        give(arguments.name, arguments.gguf, arguments.type)
        print(f"{arguments.gguf}: {arguments.gguf.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def find(source: str) -> Path:
    """The .gguf file or the Hugging Face folder that `source` means. Raises ValueError where there is none, or more than one."""
    place = Path(source) if Path(source).exists() else RAW / source
    if place.is_file() and place.suffix == ".gguf":
        return place
    if (place / bundle.MANIFEST).exists():
        bundle.verify(place, "corpus")
    if (place / "config.json").exists():
        return place
    found = sorted(place.rglob("*.gguf")) or sorted(path.parent for path in place.rglob("config.json"))
    if not found:
        raise ValueError(f"no .gguf file and no folder with config.json at {source} or in {RAW / source}; dvc repro download@{source}?")
    if len(found) > 1:
        raise ValueError(f"{place} holds {len(found)} models, {found[0].name} and {found[1].name} among them; name one")
    return found[0]


def take(source: Path, name: str) -> Path:
    """Write artifacts/models/NAME, which holds all that the model needs. Raises ValueError where that is somebody else's."""
    from llm_from_scratch.model import imports, registry
    from llm_from_scratch.tokenizer import gguf, read_imported

    folder = place_for(name)
    if source.is_file():
        found, sha256 = imports.read_gguf(source), bundle.file_digest(source)
        words: Any = gguf.from_fields(found.metadata)
        licence = str(found.metadata.get("general.license", "see its source"))
    else:
        found, sha256 = imports.read_folder(source), None
        first = {part.removesuffix("_id"): ids[0] if isinstance(ids, list) else ids for part, ids in found.ends.items()}
        words, licence = read_imported(source, first), "see its source"
    model = imports.fitted(found.model, words.vocab_size)
    facts: dict[str, Any] = {"architecture": type(model).__name__.lower(), "parameters": registry.parameters(model), "source": source.name}
    with bundle.writing(folder) as partial:
        registry.save_as(model, partial, registry.config_of(model, words.eot) | one_each(found.ends), found.ends)
        words.save(partial)
        (partial / "README.md").write_text(card(name, licence, facts), encoding="utf-8")
        facts |= {"tokenizer_digest": tokenizer.digest(partial), "context": model.context}
        bundle.seal(partial, "model", f"{MADE_BY}{name}", {}, **facts, **({"source_sha256": sha256} if sha256 else {}))
    return folder


def give(name: str, path: Path, kind: Any) -> None:
    """Write a bundle as one .gguf file, whole or not at all."""
    from llm_from_scratch.inference.quantize import load_bundle
    from llm_from_scratch.model import gguf as files
    from llm_from_scratch.model.gpt import Gpt
    from llm_from_scratch.model.llama import Llama
    from llm_from_scratch.tokenizer import gguf

    folder = Path(name) if Path(name).is_dir() else MODELS / name
    bundle.verify(folder, "model")
    model = load_bundle(folder)
    if not isinstance(model, Gpt | Llama):
        raise ValueError(f"{folder} holds a {type(model).__name__}, and GGUF knows only gpt and llama; take one of them")
    fields = {"general.name": folder.name} | gguf.fields(tokenizer.load(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        files.write(partial, model, kind, fields)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def place_for(name: str) -> Path:
    """The folder of a bundle called `name`, if that is free or was imported before."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"--name is {name!r}, wanted letters, digits, _, - and .: it becomes a folder in {MODELS}")
    folder = MODELS / name
    if folder.exists() and not (made_by := bundle.read_manifest(folder).made_by).startswith(MADE_BY):
        raise ValueError(f"{folder} is what {made_by} makes; choose another --name")
    return folder


def one_each(ends: dict[str, Any]) -> dict[str, Any]:
    """config.json names the first of several ends; generation_config.json has them all."""
    return {name: ids[0] if isinstance(ids, list) else ids for name, ids in ends.items()}


def card(name: str, licence: str, facts: dict[str, Any]) -> str:
    """README.md of an imported bundle."""
    return f"""# {name}

Imported from `{facts["source"]}`, its {facts["parameters"]:,} weights in float32, and read as this project's {facts["architecture"]}.
Licence: {licence}. Nothing of it was trained here.

Load it with `llm_from_scratch.inference.engine.Engine.open(folder)` or `transformers.AutoModelForCausalLM`.

What it was made from is in `manifest.json`.
"""
