"""Search by meaning: unit vectors in FAISS, looked through one by one where they are few, and only the nearest cells where they are many.

Past `flat_below` vectors they are sorted into cells by k-means (IVF), and a query looks into the `probes` cells whose centres are nearest.
Of FAISS' approximate indexes this is the one that suits documents that come and go: a vector is added to its cell and taken out of it, a
filter is obeyed while searching, and the same vectors give the same bytes. HNSW finds a little more in the same time, but it cannot remove,
and built on several threads no two are alike.

What it cannot do is notice that it has grown: an index that was flat stays flat until it is built anew.

Shapes: Q queries, N vectors, D dimensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llm_from_scratch.retrieval.embed import Vectors

Numbers = NDArray[np.int64]


class Dense:
    """Vectors by number. `probes` is how many cells a query looks into, where there are cells."""

    def __init__(self, store: Any, probes: int) -> None:
        self.store = store
        self.probes = probes

    @classmethod
    def build(cls, vectors: Vectors, flat_below: int, cells: int, probes: int) -> Self:
        """`vectors` (N, D), numbered from 0. Raises ValueError where there are to be more cells than vectors."""
        faiss = _faiss()
        count, dimension = vectors.shape
        flat = faiss.IndexFlatIP(dimension)
        if count <= flat_below:
            made = cls(faiss.IndexIDMap2(flat), probes)
        elif count < cells:
            raise ValueError(f"index.cells: found {cells}, wanted no more than the {count} vectors; lower it, or raise index.flat_below")
        else:
            made = cls(faiss.IndexIVFFlat(flat, dimension, cells, faiss.METRIC_INNER_PRODUCT), probes)
            made.store.train(np.ascontiguousarray(vectors))
        made.add(vectors, np.arange(count))
        return made

    @classmethod
    def open(cls, path: Path, probes: int) -> Self:
        """What `save` wrote. Check its digest first: FAISS trusts what it reads."""
        return cls(_faiss().read_index(str(path)), probes)

    def save(self, path: Path) -> None:
        _faiss().write_index(self.store, str(path))

    @property
    def exact(self) -> bool:
        return not hasattr(self.store, "nprobe")

    def add(self, vectors: Vectors, numbers: Numbers) -> None:
        """Vectors (N, D) under numbers (N,) that are not there yet."""
        self.store.add_with_ids(np.ascontiguousarray(vectors, np.float32), numbers)

    def remove(self, numbers: Numbers) -> None:
        self.store.remove_ids(np.ascontiguousarray(numbers))

    def search(self, queries: Vectors, depth: int, allowed: Numbers | None = None) -> list[list[tuple[int, float]]]:
        """For each of `queries` (Q, D), the (number, cosine) of the nearest `depth`, best first.

        With `allowed`, only those numbers are looked at, and all of them.
        """
        scores, numbers = self.store.search(np.ascontiguousarray(queries), depth, params=self._how(allowed))
        rows = zip(numbers.tolist(), scores.tolist(), strict=True)
        return [[(number, score) for number, score in zip(*row, strict=True) if number >= 0] for row in rows]

    def _how(self, allowed: Numbers | None) -> Any:
        faiss = _faiss()
        chosen = {} if allowed is None else {"sel": faiss.IDSelectorBatch(allowed)}
        if self.exact:
            return faiss.SearchParameters(**chosen)
        return faiss.SearchParametersIVF(nprobe=min(self.probes, self.store.nlist) if allowed is None else self.store.nlist, **chosen)


def _faiss() -> Any:
    import torch  # noqa: F401  faiss loaded before torch brings another OpenMP first, and the process can crash

    try:
        import faiss
    except ImportError:
        raise ValueError("no faiss here; pip install 'llm-from-scratch[retrieval]' brings it") from None
    return faiss
