"""What `Searcher` costs beside its index: processor time of one query by a vector.

    python -m bench search [--rows 20000] [--dim 256] [--shards 10 1000] [--threads 1 8]
        [--deleted 0.01] [--queries 400] [--k 10]

A store of random vectors is written in some number of shards, with and without deleted rows. The
index is replaced by one that returns stored answers at once, so that what is left is the cost of
`Searcher.search`: filter, snapshot, rows read from the store, hits. `added_ms` is the processor
time of all threads for one query; `wall_ms` the time that passes, times the threads. Rounds of
all cases run in turns; a row gives the median.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench import measure
from bench.store import name_of, unit_vectors
from mmalign import Searcher, open_store
from mmalign.index import Index
from mmalign.store import ModelCard, Row, Writer, delete, pair_vectors

ROUNDS = 5


class Stored(Index):
    """Returns rows that were drawn before."""

    def __init__(self, rows: int, k: int) -> None:
        self.rows = rows
        draw = np.random.default_rng(1)
        self.answers = [np.sort(draw.choice(rows, k, replace=False))[None] for _ in range(64)]
        self.scores = np.linspace(1, 0, k, dtype=np.float32)[None]
        self.next = 0

    def search(
        self, queries_MD: Any, k: int, allow_N: Any = None, *, query_modality: str = "text"
    ) -> tuple[Any, Any]:
        """See `Index.search`."""
        self.next += 1
        return self.scores, self.answers[self.next % len(self.answers)]


def written(folder: Path, rows: int, dim: int, shards: int, deleted: float) -> Path:
    """Write a store of so many shards."""
    path = folder / f"{shards}-{deleted}.store"
    vectors = unit_vectors(rows, dim)
    with Writer(path, ModelCard("bench", "bench", dim), rows_per_shard=-(-rows // shards)) as out:
        for number, vector in enumerate(vectors):
            words = (f"caption of {number}",)
            out.add(
                Row(name_of(number), f"{number}.jpg", words, pair_vectors(vector, vector[None]))
            )
    if deleted:
        step = round(1 / deleted)
        delete(path, [name_of(number) for number in range(0, rows, step)])
    return path


def timed(search: Callable[[], object], threads: int, queries: int) -> tuple[float, float]:
    """Return milliseconds for one query: of processor time, and of time times threads."""
    barrier = threading.Barrier(threads + 1)

    def work() -> None:
        barrier.wait()
        for _ in range(queries // threads):
            search()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    used, began = time.process_time(), time.perf_counter()
    for worker in workers:
        worker.join()
    done = queries // threads * threads
    passed = time.perf_counter() - began
    return 1e3 * (time.process_time() - used) / done, 1e3 * passed * threads / done


def main(arguments: list[str]) -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(prog="bench search")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--deleted", type=float, default=0.01, help="share of the rows")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("-k", type=int, default=10)
    options = parser.parse_args(arguments)
    cases: dict[tuple[int, float, int], tuple[Callable[[], object], list[Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for shards, deleted in product(options.shards, (0.0, options.deleted)):
            path = written(Path(folder), options.rows, options.dim, shards, deleted)
            encoder: Any = SimpleNamespace(identity="bench", space="bench", dim=options.dim)
            searcher = Searcher(open_store(path), encoder)
            searcher._current.snapshot._indexes["image", False] = Stored(options.rows, options.k)
            vector = unit_vectors(1, options.dim)[0]

            ask = partial(searcher.search, vector, options.k)
            timed(ask, 1, 2 * options.shards[-1])  # every shard's columns are checked once
            for threads in options.threads:
                cases[shards, deleted, threads] = ask, []
        for _ in range(ROUNDS):
            for (_, _, threads), (search, times) in cases.items():
                times.append(timed(search, threads, options.queries))
    for (shards, deleted, threads), (_, times) in cases.items():
        added, wall = (median(values) for values in zip(*times, strict=True))
        row = {
            "shards": shards, "rows": options.rows, "deleted": deleted, "search_threads": threads,
            "k": options.k, "added_ms": round(added, 4), "wall_ms": round(wall, 4),
        }  # fmt: skip
        measure.append("search", row)
