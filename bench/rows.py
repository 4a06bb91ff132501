"""Rows with several vectors: recall by row of an index, and QPS beside exact search.

    python -m bench rows [--rows 200000] [--vectors 5] [--dim 512] [--recall 0.95] [--memory 2GB]
        [--queries 1000] [--k 10 100] [--folder DIR]

Vectors are captions of the rows of `bench/standin.py`: 1 to 2 V - 1 for each row, V on average.
Queries are images that are not among the rows. The index is built as `mmalign index` does, with
other images to tune and to measure. `recall` is the share of the true k nearest rows that it finds
for fresh queries, with its 95 % interval, `promised` what its build measured. QPS is that of one
thread, one query at a time; the index and exact search run in turns. Results go to
bench/results/rows.csv.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench import measure
from bench.standin import BLOCK, StandIn
from mmalign.arrays import Floats, Halves, Ints
from mmalign.index import (
    Index,
    Queries,
    VectorReader,
    open_index,
    write_description,
    write_index,
)
from mmalign.index.approximate import set_threads
from mmalign.index.measure import interval, neighbour_recall
from mmalign.index.plan import true_neighbours
from mmalign.search.build import memory_bytes

SHARD_VECTORS, BUILD_THREADS = 50_000, 2
TUNING, HELD_OUT, TIMED, ROUNDS = 8_000, 1_000, 50, 5


def captions(world: StandIn, vectors: int, folder: Path) -> tuple[Halves, Ints]:
    """Draw captions of each row, into a file, and the row of each."""
    counts = np.random.default_rng(0).integers(1, 2 * vectors, size=world.rows)
    owners = np.repeat(np.arange(world.rows), counts)
    starts = np.cumsum(counts) - counts
    drawn = np.lib.format.open_memmap(
        folder / "captions.npy", mode="w+", dtype=np.float16, shape=(len(owners), world.dim)
    )
    for first in range(0, world.rows, BLOCK):
        numbers = np.arange(first, min(first + BLOCK, world.rows))
        for caption in range(int(counts[numbers].max())):
            some = numbers[counts[numbers] > caption]
            drawn[starts[some] + caption] = world.captions(some, seed=caption)
    return drawn, owners


def one_by_one(index: Index, queries_MD: Floats, k: int) -> None:
    """Answer each query alone."""
    for number in range(len(queries_MD)):
        index.search(queries_MD[number : number + 1], k, query_modality="image")


def main(words: list[str]) -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(prog="bench rows")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--vectors", type=int, default=5, help="of a row, on average")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("-k", "--k", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--folder", help="where vectors and index are kept meanwhile")
    given = parser.parse_args(words)
    torch.set_num_threads(BUILD_THREADS)
    set_threads(BUILD_THREADS)
    world = StandIn(given.rows, given.dim)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        vectors, owners = captions(world, given.vectors, folder)
        shards = [
            vectors[first : first + SHARD_VECTORS]
            for first in range(0, len(vectors), SHARD_VECTORS)
        ]
        built = folder / "index"
        built.mkdir()
        images = world.held_out(TUNING + HELD_OUT, seed=1)
        started = time.perf_counter()
        part = write_index(
            built, "text", shards, owners=owners, recall=given.recall,
            queries_by_modality={"image": Queries(images[HELD_OUT:], images[:HELD_OUT])},
            memory=memory_bytes(given.memory),
        )  # fmt: skip
        build_s = time.perf_counter() - started
        write_description(built, {"modalities": {"text": part}})
        promised = {t["point"]["k"]: t["recall"] for t in part["measured"]}
        reader = VectorReader(shards, owners=owners)
        queries = world.held_out(given.queries, seed=2)
        true_MK = true_neighbours(reader, queries, max(given.k))
        index = open_index(built, "text", shards, owners)
        exact = open_index(None, "text", shards, owners)
        torch.set_num_threads(1)
        set_threads(1)
        for k in given.k:
            found_MK = index.search(queries, k, query_modality="image")[1]
            shares_M = neighbour_recall(reader.rows_of(found_MK), reader.rows_of(true_MK[:, :k]))
            low, high = interval(shares_M)
            few = queries[:TIMED]
            tasks = {"index": partial(one_by_one, index, few, k)}
            tasks["exact"] = partial(one_by_one, exact, few, k)
            times = measure.in_turn(tasks, ROUNDS)
            measure.append(
                "rows",
                {
                    "rows": given.rows, "vectors": len(vectors), "dim": given.dim, "k": k,
                    "design": part["name"], "wanted": given.recall,
                    "promised": round(promised.get(k, part["recall"]), 4),
                    "recall": round(float(shares_M.mean()), 4),
                    "low": round(low, 4), "high": round(high, 4),
                    "qps": round(1e3 * len(few) / times["index"]["p50_ms"], 1),
                    "exact_qps": round(1e3 * len(few) / times["exact"]["p50_ms"], 1),
                    "build_s": round(build_s, 1),
                },
            )  # fmt: skip
