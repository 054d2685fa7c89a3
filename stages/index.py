"""The documents cut into passages, each with its vector, ready to be searched by meaning and by words."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

from llm_from_scratch import bundle, progress, tracking
from llm_from_scratch.config import Params
from llm_from_scratch.data.documents import read_documents
from llm_from_scratch.retrieval import embed
from llm_from_scratch.retrieval.embed import Embedder, embed_in_parts
from llm_from_scratch.retrieval.index import build_index
from llm_from_scratch.retrieval.passages import split


def run(params: Params, name: str, root: Path) -> None:
    """A killed run goes on where it was: vectors are kept in runs/ until the index stands."""
    wanted = params.index
    reads = [f"artifacts/raw/{wanted.documents}", f"artifacts/raw/{wanted.embedder}"]
    corpus = bundle.verify(root / reads[0], "corpus")
    embedder = Embedder.open(root / reads[1])
    passages = split(read_documents(root / reads[0]), embedder.spans, wanted.passage_tokens, wanted.overlap_tokens, wanted.maximum_passages)
    texts = [passage.searched for passage in passages]
    journal = root / "runs" / _identity(texts, embedder.digest)

    with tracking.stage_run(stage="index", name=name, params=wanted.model_dump(), reads=reads) as log:
        started = time.perf_counter()
        with progress.bar(total=len(texts), desc="embedding", unit=" passages") as bar:
            embedded = embed_in_parts(embedder, texts, wanted.batch, journal, bar.update)
        seconds = time.perf_counter() - started

        folder = root / "artifacts/index"
        with bundle.writing(folder) as partial:
            build_index(partial, passages, embedded.vectors, wanted)
            parents = {"corpus": corpus.digest, "embedder": embedder.digest}
            bundle.seal(partial, "index", "index", parents, passages=len(passages), dimension=embedder.dimension)
        metrics = {
            "passages": len(passages),
            "seconds": round(seconds, 3),
            "passages_per_s": round((len(passages) - embedded.resumed_at) / seconds, 1),
            "size_mb": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 3),
        }
        log(0, metrics)

    with bundle.writing(root / "artifacts/logs/index") as partial:
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(journal, ignore_errors=True)


def _identity(texts: list[str], embedder: str) -> str:
    """The name of this work: the same texts through the same encoder by the same code have the same vectors."""
    code = bundle.file_digest(Path(embed.__file__))
    return hashlib.sha256(json.dumps([texts, embedder, code]).encode()).hexdigest()[:16]
