"""Documents that come and go beside the graph: `python -m stages documents --add FOLDER --remove ID`.

What is new is embedded, and nothing else. The graph's own index stays as it is, as dvc repro would only build it again: a new one is sealed
beside it, can be changed further (`--source var/index`), and is answered from by `python -m pipelines serve --index var/index`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_from_scratch import bundle, progress
from llm_from_scratch.data.streams import folder_documents
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import PARAMS_FILE, Index, IndexParams


def main(given: Sequence[str]) -> None:
    """The command, `given` without its name, in the project's folder."""
    parser = argparse.ArgumentParser(prog="python -m stages documents", description="Add documents to an index, or remove some.")
    parser.add_argument("--add", type=Path, help="a folder of .txt, .md, .pdf, .jsonl or .parquet files, or one of them")
    parser.add_argument("--remove", nargs="+", default=[], metavar="ID", help="ids as search gives them; of files, their paths")
    parser.add_argument("--source", type=Path, default=Path("artifacts/index"), help="the index that is changed (default: %(default)s)")
    parser.add_argument("--target", type=Path, default=Path("var/index"), help="where the new one goes (default: %(default)s)")
    asked = parser.parse_args(given)
    if asked.add is None and not asked.remove:
        parser.error("nothing to do; give --add, --remove, or both")
    come, gone = change(Path("artifacts/raw"), asked.add, asked.remove, asked.source, asked.target)
    print(f"{come} passages came, {gone} went; the index is in {asked.target}", file=sys.stderr)
    print(f"to answer from it: python -m pipelines serve --index {asked.target}, or reload --index where one runs", file=sys.stderr)


def change(raw: Path, add: Path | None, remove: Sequence[str], source: Path, target: Path) -> tuple[int, int]:
    """How many passages came and went: the index in `source`, less the documents `remove`, with the files of `add`, sealed in `target`.

    The embedder is in the folder `raw`. A file takes the place of the one of its name where that is removed in the same call. Raises
    ValueError, and leaves `target` as it was, where a document to be removed is not there, or one to be added is.
    """
    before = bundle.verify(source, "index")
    index = Index.open(source, Embedder.open(raw / IndexParams.model_validate_json((source / PARAMS_FILE).read_text()).embedder))
    gone = index.remove(remove) if remove else 0
    come = 0
    if add is not None:
        with progress.bar(desc="embedding", unit=" passages") as bar:
            come = index.add(folder_documents(add, share=0.0), bar.update)
    with bundle.writing(target) as partial:
        index.write(partial)
        parents = {**before.parents, "index": before.digest}
        bundle.seal(partial, "index", before.made_by, parents, passages=len(index.passages), dimension=index.embedder.dimension)
    return come, gone
