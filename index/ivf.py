"""Inverted lists over float16 vectors; the only file that imports faiss.

N rows, M queries, D dimensions, K neighbours.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from mmalign import files
from mmalign.errors import StoreError
from mmalign.index.spec import Bools, Floats, Index, Ints, Shards, Spec, neighbour_recall
from mmalign.progress import bar

TRAINING_ROWS_PER_LIST = 64
ADD_ROWS = 50_000


class Ivf(Index):
    """A FAISS IVF index with its number of probes; final."""

    def __init__(self, index: Any, nprobe: int) -> None:
        self.index = index
        self.nprobe = nprobe
        self.rows = int(index.ntotal)

    def search(
        self, queries_MD: Floats, k: int, allow_N: Bools | None = None
    ) -> tuple[Floats, Ints]:
        """See `Index.search`. Parameters travel with the call: threads do not disturb another."""
        words: dict[str, Any] = {"nprobe": self.nprobe}
        if allow_N is not None:
            bits = np.packbits(allow_N, bitorder="little")
            words["sel"] = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]
        parameters = faiss.SearchParametersIVF(**words)
        queries = np.ascontiguousarray(queries_MD, dtype=np.float32)
        return self.index.search(queries, k, params=parameters)  # type: ignore[no-any-return]


def build(shards: Shards, spec: Spec, seed: int = 0) -> Ivf:
    """Cluster a random sample of the vectors, then file every vector under its nearest centre."""
    index = faiss.index_factory(spec.dim, f"IVF{spec.lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    sample = _sample(shards, TRAINING_ROWS_PER_LIST * spec.lists, seed)
    with bar("cluster", 1, "runs") as progress:
        index.train(sample)
        progress.update()
    with bar("index", spec.rows, "vectors") as progress:
        for shard in shards:
            for first in range(0, len(shard), ADD_ROWS):
                block = shard[first : first + ADD_ROWS].astype(np.float32)
                index.add(block)
                progress.update(len(block))
    return Ivf(index, spec.nprobe)


def tune(index: Ivf, queries_MD: Floats, true_MK: Ints, recall: float) -> Ivf:
    """Raise nprobe until the queries find the wanted share of their true neighbours."""
    nprobe = 1
    while nprobe < index.index.nlist:
        found = Ivf(index.index, nprobe).search(queries_MD, true_MK.shape[1])[1]
        if neighbour_recall(found, true_MK) >= recall:
            break
        nprobe = max(nprobe + 1, round(nprobe * 1.3))
    return Ivf(index.index, min(nprobe, index.index.nlist))


def save(index: Ivf, path: Path) -> None:
    """Write the FAISS file, whole or not at all."""
    files.write_through(path, lambda name: faiss.write_index(index.index, name))


def load(path: Path, spec: Spec) -> Ivf:
    """Open a FAISS file by memory-mapping its lists."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        reason = str(error).rsplit("Error:", 1)[-1].strip()
        raise StoreError(f"{path}: index cannot be read: {reason}") from None
    if index.ntotal != spec.rows or index.d != spec.dim:
        raise StoreError(f"{path}: holds {index.ntotal} vectors where {spec.rows} are named")
    return Ivf(index, spec.nprobe)


def with_probes(spec: Spec, index: Ivf) -> Spec:
    """Return the spec with the tuned parameters."""
    return replace(spec, nprobe=index.nprobe)


def _sample(shards: Shards, count: int, seed: int) -> Floats:
    """Draw rows at random from all shards, so that ordered data gives unbiased centres."""
    total = sum(len(s) for s in shards)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(total, size=min(count, total), replace=False))
    parts, first = [], 0
    for shard in shards:
        inside = rows[(rows >= first) & (rows < first + len(shard))] - first
        parts.append(shard[inside].astype(np.float32))
        first += len(shard)
    return np.concatenate(parts)
