"""A corpus beyond one machine: the same pieces as on one, encoded by Ray Data on whatever nodes a cluster has.

Each row of the data set is a range of documents.jsonl. A worker reads its own range, from storage that all nodes share, and encodes it;
this process only puts the pieces into the shards, in order, so the files are the same to the byte. The nodes need this package.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_from_scratch.data import shards
from llm_from_scratch.data.documents import Split, parts, read_documents
from llm_from_scratch.data.shards import Encoder, Piece

PART_BYTES = 1 << 23
NOTHING = Piece(b"", b"", 0, 0, 0)
QUIET = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}


@contextmanager
def connected(**options: Any) -> Iterator[None]:
    """Ray for a while: the cluster that RAY_ADDRESS names, or one on this machine. `options` are those of ray.init.

    Raises ValueError where Ray is not installed.
    """
    ray = _ray()
    ray.init(**{**QUIET, **options})
    try:
        yield
    finally:
        ray.shutdown()


def write_shards(folder: Path, source: Path, encoder: Encoder) -> dict[str, Any]:
    """train.bin and val.bin in `folder` from the corpus bundle `source`, and the facts for its manifest, as `shards.write_pieces` has them.

    Needs a connection (see `connected`). Raises ValueError for what is wrong with a document, as `Encoder` does.
    """
    return shards.write_pieces(folder, {split: encoded(source, split, encoder) for split in shards.FILES}, encoder)


def encoded(source: Path, split: Split, encoder: Encoder) -> Iterator[Piece]:
    """The pieces of a split, in order, as they become ready."""
    ray = _ray()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    rows = [{"start": part.start, "stop": part.stop} for part in parts(source, PART_BYTES)]
    most = max(1, min(len(rows), int(ray.cluster_resources()["CPU"])))
    todo = ray.data.from_items(rows, override_num_blocks=len(rows))
    # A class is set up once a worker, and so is the tokenizer in it.
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
    done = todo.map(_Encode, fn_constructor_args=(source.resolve(), split, encoder), compute=workers)
    for row in done.iter_rows():
        if fault := row.pop("fault"):
            raise ValueError(fault)
        if row["documents"]:
            yield Piece(**row)


def _ray() -> Any:
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise ValueError(f"no {error.name} here, which `workers: ray` needs; pip install 'llm-from-scratch[cluster]'") from None
    return ray


class _Encode:
    """What a worker does with a row. A fault of a document comes back in the row: raised here, it would be a page of Ray's own frames."""

    def __init__(self, source: Path, split: Split, encoder: Encoder) -> None:
        self.source, self.split, self.encoder = source, split, encoder

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        part = range(row["start"], row["stop"])
        texts = [document.text for document in read_documents(self.source, self.split, part)]
        try:
            return {**asdict(self.encoder(texts) if texts else NOTHING), "fault": ""}
        except ValueError as error:
            return {**asdict(NOTHING), "fault": str(error)}
