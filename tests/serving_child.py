"""A server to be killed: serves the tiny parts in the folder of its first argument at the port of its second, until SIGTERM."""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

from llm_from_scratch.inference.batching import Batching
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.serving.app import create_app
from llm_from_scratch.serving.embedding import SharedEmbedder
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.serving.responder import Responder


def main(folder: Path, port: int) -> None:
    limits = ServeParams.model_validate_json((folder / "limits.json").read_text(encoding="utf-8"))
    engine = Engine.open(folder / "model", batching=Batching(slots=limits.slots, prefill_chunk=limits.prefill_chunk))
    index = Index.open(folder / "index", SharedEmbedder.open(folder / "embedder"))
    uvicorn.run(create_app(Responder(engine, index, limits, "fp_test")), port=port, log_level="warning")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
