"""The stage of fine-tuning in a process that a test can kill. It imports nothing that only tests need, so that it starts soon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llm_from_scratch.config import Params
from llm_from_scratch.data.corpora import Source
from llm_from_scratch.finetune import FinetuneParams
from stages import finetune as stage

SHARE = 0.3


def told(section: dict[str, Any]) -> Params:
    """What the stage reads of params.yaml: an entry, named by its method, and where its records came from."""
    source = {"kind": "records", "path": "mine.jsonl", "sha256": "", "licence": "mine", "language": "en", "validation": SHARE}
    sources = {section["records"]: TypeAdapter(Source).validate_python(source)}
    return Params.model_construct(sources=sources, finetune={section["method"]: TypeAdapter(FinetuneParams).validate_python(section)})


def run(root: Path, section: dict[str, Any]) -> None:
    stage.run(told(section), section["method"], root)
